"""Labelled images as a torch data set."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.data.images import Images
from training.data.transforms import Transform

Key = tuple[int, int]
"""Position of an image, and the seed of its augmentation."""


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images with their labels in the class order of the stream.

    Parameters
    ----------
    images
        The images, shared by all subsets.
    indices
        Positions in ``images``, int64 of shape (N,).
    labels
        The label of each position, int64 of shape (N,).
    transform
        Applied to an image on access; without it an image comes as it was decoded.
    """

    images: Images
    indices: Tensor
    labels: Tensor
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, label = self.images[int(self.indices[position])], int(self.labels[position])
        return (image if self.transform is None else self.transform(image)), label

    def prepared(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, Tensor]:
        """Images after the first half of the transform, their draws for the second, and labels.

        Every image is drawn for from its seed, so it does not matter who does it. torch's global
        generator is left as it was: loading data does not disturb the training's draws.

        Parameters
        ----------
        keys
            At least one.
        """
        if self.transform is None:
            msg = "images are loaded in batches under a transform: use with_transform"
            raise TypeError(msg)
        # Seeding the CPU generator itself takes 2 us, torch.manual_seed 200 us: it seeds every
        # device.
        generator = torch.default_generator
        state = generator.get_state()
        positions = [position for position, _ in keys]
        pixels, draws = [], []
        try:
            for index, (_, seed) in zip(self.indices[positions].tolist(), keys, strict=True):
                generator.manual_seed(seed)
                image, drawn = self.transform.prepare(self.images[index])
                pixels.append(image)
                draws.append(drawn)
        finally:
            generator.set_state(state)
        return torch.stack(pixels), torch.stack(draws), self.labels[positions]

    def subset(self, labels: Collection[int]) -> "ImageSet":
        """Only the images with one of these labels, in the same order."""
        wanted = torch.isin(self.labels, torch.tensor(sorted(labels), dtype=torch.int64))
        return replace(self, indices=self.indices[wanted], labels=self.labels[wanted])

    def with_transform(self, transform: Transform | None) -> "ImageSet":
        """The same images under another transform."""
        return replace(self, transform=transform)
