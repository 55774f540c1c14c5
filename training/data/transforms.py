"""From a decoded image to what the backbone reads: crops, flips, and the scaling of pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torchvision.transforms import v2

from training.config import DataConfig


@dataclass(frozen=True)
class Transform:
    """Geometry, image by image, then the scaling of pixels, for a whole batch at once.

    Calling it on one image of shape (C, H, W), uint8 or float in [0, 1], gives float32 of shape
    (C, image_size, image_size).
    """

    geometry: Callable[[Tensor], Tensor]
    mean: float
    std: float

    def __call__(self, image: Tensor) -> Tensor:
        """Transform one image."""
        return self.scale(self.geometry(image))

    def scale(self, images: Tensor) -> Tensor:
        """Map pixels to [0, 1], then subtract the mean and divide by the standard deviation."""
        whole = images.dtype == torch.uint8
        # A float image may leave [0, 1] in a bicubic resize; bytes are clipped there already.
        scaled = images.to(torch.float32) / 255 if whole else images.float().clamp(0, 1)
        return scaled if (self.mean, self.std) == (0, 1) else scaled.sub_(self.mean).div_(self.std)


@dataclass(frozen=True)
class PadCropFlip:
    """Reflect-pad, cut a random square window and perhaps mirror it, in one indexing operation.

    It gives what torchvision's RandomCrop and RandomHorizontalFlip give from the same state of the
    global generator, in a sixth of the time, which small images would else mostly spend there.
    """

    size: int
    pad: int
    flip: bool

    def __call__(self, image: Tensor) -> Tensor:
        """Cut from one square image of shape (C, S, S)."""
        mirror = _reflection(image.shape[-1], self.pad)
        rows, columns = (self._window(mirror) for _ in range(2))
        if self.flip and torch.rand(1) < 0.5:
            columns = columns.flip(0)
        return image[:, rows[:, None], columns]

    def _window(self, mirror: Tensor) -> Tensor:
        spare = len(mirror) - self.size
        start = int(torch.randint(0, spare + 1, size=())) if spare > 0 else 0
        return mirror[start : start + self.size]


@cache
def _reflection(side: int, pad: int) -> Tensor:
    # 3 2 1 | 0 1 2 3 4 | 3 2 1: the border pixel itself is not repeated.
    positions = torch.arange(-pad, side + pad).abs()
    return torch.where(positions < side, positions, 2 * (side - 1) - positions)


def train_transform(config: DataConfig) -> Transform:
    """Build the random crop and flip of training images, drawing from torch's global generator.

    Examples
    --------
    >>> import torch
    >>> config = DataConfig(resize=8, train_crop="pad", pad=2, flip=True)
    >>> train_transform(config)(torch.zeros(1, 8, 8, dtype=torch.uint8)).shape
    torch.Size([1, 8, 8])
    """
    size = config.image_size
    steps: list[Callable[[Tensor], Tensor]] = []
    if config.train_crop == "pad":
        steps.append(PadCropFlip(size, config.pad, config.flip))
    elif config.train_crop == "random_resized":
        low, high = config.crop_scale
        steps.append(v2.RandomResizedCrop(size, scale=(low, high), antialias=True))
    if config.flip and config.train_crop != "pad":
        steps.append(v2.RandomHorizontalFlip())
    return Transform(_chain(steps), config.mean, config.std)


def test_transform(config: DataConfig) -> Transform:
    """Build the resize and centre crop of evaluation images; nothing in it is random.

    Examples
    --------
    >>> import torch
    >>> test_transform(DataConfig(mean=0.5, std=0.5))(torch.zeros(1, 8, 8)).unique()
    tensor([-1.])
    """
    steps: list[Callable[[Tensor], Tensor]] = []
    if config.test_resize is not None:
        bicubic = v2.InterpolationMode.BICUBIC
        steps.append(v2.Resize(config.test_resize, interpolation=bicubic, antialias=True))
    if config.test_crop == "center":
        steps.append(v2.CenterCrop(config.image_size))
    return Transform(_chain(steps), config.mean, config.std)


# pytest would take a function of this name, imported into a test module, for a test.
test_transform.__test__ = False  # type: ignore[attr-defined]


def _chain(steps: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    if not steps:
        return _same
    return steps[0] if len(steps) == 1 else v2.Compose(steps)


def _same(image: Tensor) -> Tensor:
    return image
