"""Data sets and backbones of somebody's own, chosen by their import path."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from training.data.datasets import DomainNet, Published


class Few(Published):
    """A published data set of five classes."""

    count = 5


class FewDomains(DomainNet):
    """DomainNet with five classes."""

    count = 5


class Squares:
    """Grey squares, a shade a class; needs nothing of the package.

    Parameters
    ----------
    count
        Images a class.
    kind
        What images are given as: array, pictures or tensors.
    spoil
        What is wrong with them.
    """

    side = 6
    mode = "L"

    def __init__(self, count: int = 3, kind: str = "array", spoil: str | None = None) -> None:
        if count < 1:
            msg = f"count must be at least 1, got {count}"
            raise ValueError(msg)
        self.count, self.kind, self.spoil = count, kind, spoil

    def load(self, split: str) -> tuple[Any, Any, list[str]]:
        names = ["dark", "grey", "light"] if split == "train" else ["light", "dark", "grey"]
        shades = {"dark": 10, "grey": 100, "light": 250}
        targets = np.repeat(np.arange(3), self.count)
        pixels = np.array([np.full((1, 6, 6), shades[names[t]], np.uint8) for t in targets])
        images: Any = pixels
        if self.kind == "pictures":
            images = Pictures(pixels)
        elif self.kind == "tensors":
            images = Tensors(torch.from_numpy(pixels))
        if self.spoil == "floats":
            images = Tensors(torch.from_numpy(pixels).float())
        if self.spoil == "targets":
            targets = targets[:-1]
        if self.spoil == "numbers":
            targets = targets + 1
        if self.spoil == "shares":
            targets = targets / 2
        if self.spoil == "names":
            names = ["dark", "dark", "grey"]
        if self.spoil == "empty" and split == "train":
            names = [*names, "white"]
        if self.spoil == "nothing":
            return None  # type: ignore[return-value]
        if self.spoil == "channels":
            images = pixels[:, 0]
        if self.spoil == "other" and split == "test":
            names = ["light", "dark", "white"]
        return images, targets, names


class Tensors:
    """A sequence of tensors."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Any:
        return self.pixels[index]


class Pictures(Tensors):
    """A sequence of PIL images."""

    def __getitem__(self, index: int) -> Any:
        return Image.fromarray(np.asarray(self.pixels[index][0]))


class Net:
    """A convolution, averaged over the image.

    Parameters
    ----------
    width
        Number of features.
    """

    def __init__(self, width: int = 4) -> None:
        self.width = width

    def build(self, *, initialise: bool) -> nn.Module:
        layers = nn.Conv2d(2, self.width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        module = nn.Sequential(*layers)
        module.num_features = self.width  # type: ignore[assignment]
        return module


class Nameless:
    """A network that does not say how many features it has."""

    def build(self, *, initialise: bool) -> nn.Module:
        return nn.Flatten()


class NoNet:
    """A backbone whose function build forgets to return the network."""

    def build(self, *, initialise: bool) -> None:
        pass
