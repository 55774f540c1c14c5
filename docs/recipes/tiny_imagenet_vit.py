"""Pretrain a small vision transformer on 100 classes of Tiny-ImageNet.

``python docs/recipes/tiny_imagenet_vit.py --data FOLDER --out FILE`` trains the model of
:mod:`training.backbones.conv_vit` with eight blocks and writes its weights. FOLDER holds
``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``, 32 x 32 pixels. One thread of a processor does it in
about 25 minutes. The same settings give the same weights on the same machine.

The weights are not packaged: the images have terms of their own, and the recipe makes the weights.
"""

from pathlib import Path

import cifar_vit
import numpy as np
import torch
from photographs import SIDE, Images, Source, run

from training.data.image_files import decode


def read(root: Path, split: str) -> Images:
    """Read ``<root>/<split>/<class>/*.jpg``, each of 32 x 32 pixels, in the order of their names.

    Raises
    ------
    FileNotFoundError
        If there are no such files.
    ValueError
        If an image cannot be read or has another size.
    """
    paths = sorted((root / split).glob("*/*.jpg"))
    if not paths:
        msg = f"no {split}/CLASS/*.jpg under {root}: give the folder with one folder a class."
        raise FileNotFoundError(msg)
    pixels = np.empty((len(paths), SIDE, SIDE, 3), dtype=np.uint8)
    for row, path in enumerate(paths):
        image = decode(path)
        if image.size != (SIDE, SIDE):
            msg = (
                f"{path} has {image.width} x {image.height} pixels, not {SIDE} x {SIDE}: "
                "scale the images first."
            )
            raise ValueError(msg)
        pixels[row] = np.asarray(image)
    numbers = {name: label for label, name in enumerate(sorted({p.parent.name for p in paths}))}
    labels = torch.tensor([numbers[path.parent.name] for path in paths])
    return Images(torch.from_numpy(pixels), labels)


SOURCE = Source(
    program="python docs/recipes/tiny_imagenet_vit.py",
    version=1,
    options={**cifar_vit.SOURCE.options, "depth": 8, "num_classes": 100},
    folder="folder with SPLIT/CLASS/*.jpg",
    read=read,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    run(SOURCE, __doc__, arguments)


if __name__ == "__main__":
    main()
