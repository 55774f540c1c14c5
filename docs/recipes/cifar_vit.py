"""Pretrain the small vision transformer of the Caltech-101 experiment on CIFAR-10.

``python docs/recipes/cifar_vit.py --data FOLDER --out FILE`` trains the model of
:mod:`training.backbones.conv_vit` and writes its weights. FOLDER holds one picture a class and
split, a grid of tiles. One thread of a processor does it in about an hour. The same settings give
the same weights on the same machine.
"""

from pathlib import Path

import numpy as np
import torch
from photographs import SIDE, Images, Source, run
from PIL import Image


def read(root: Path, split: str) -> Images:
    """Read ``<root>/<split>_<class>.webp``, each a grid of tiles of 32 x 32 pixels.

    Raises
    ------
    FileNotFoundError
        If there are no such files.
    ValueError
        If a picture is no grid of such tiles.
    """
    paths = sorted(root.glob(f"{split}_*.webp"))
    if not paths:
        msg = f"no {split}_CLASS.webp under {root}: give the folder with one picture a class."
        raise FileNotFoundError(msg)
    tiles = [_tiles(path) for path in paths]
    labels = torch.arange(len(tiles)).repeat_interleave(torch.tensor([len(t) for t in tiles]))
    return Images(torch.from_numpy(np.concatenate(tiles)), labels)


def _tiles(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    height, width, _ = pixels.shape
    if height % SIDE or width % SIDE:
        msg = f"{path} has {width} x {height} pixels: not a grid of tiles of {SIDE} x {SIDE}."
        raise ValueError(msg)
    grid = pixels.reshape(height // SIDE, SIDE, width // SIDE, SIDE, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)


SOURCE = Source(
    program="python docs/recipes/cifar_vit.py",
    version=1,
    options={
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 6,
        "mlp_ratio": 2.0,
        "widths": [64, 128],
        "num_classes": 10,
    },
    folder="folder with SPLIT_CLASS.webp",
    read=read,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    run(SOURCE, __doc__, arguments)


if __name__ == "__main__":
    main()
