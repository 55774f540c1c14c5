"""From a decoded image to what the backbone reads: crops, flips, and the scaling of pixels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from training.data.config import DataConfig


@dataclass(frozen=True)
class Window:
    """A random square cut from a reflect-padded image, and perhaps its mirror image.

    It gives what torchvision's RandomCrop and RandomHorizontalFlip give from the same state of the
    global generator, but only the draws are made image by image: `cut` serves a whole batch, on
    the device where it lies.

    Parameters
    ----------
    size
        Side of the square; that of the image without ``crop``.
    pad
        Pixels of reflected border on every side.
    crop
        Whether the square is cut at a random place of the padded image.
    flip
        Whether it is mirrored with probability 0.5.
    """

    size: int
    pad: int = 0
    crop: bool = False
    flip: bool = False

    def draw(self, side: int) -> tuple[int, int, int]:
        """First row and column in a padded image of this side, and whether to mirror."""
        row, column = (self._start(side), self._start(side)) if self.crop else (0, 0)
        return row, column, int(self.flip and bool(torch.rand(1) < 0.5))

    def _start(self, side: int) -> int:
        spare = side + 2 * self.pad - self.size
        return int(torch.randint(0, spare + 1, size=())) if spare > 0 else 0

    def cut(self, images: Tensor, draws: Tensor) -> Tensor:
        """Cut from images (B, C, S, S) by draws (B, 3)."""
        mirrored = draws[:, 2, None].bool()
        if not self.crop:
            return images.where(~mirrored[:, None, None], images.flip(-1)) if self.flip else images
        span = torch.arange(self.size, device=images.device)
        rows = draws[:, 0, None] + span
        columns = draws[:, 1, None] + span.where(~mirrored, self.size - 1 - span)
        rows, columns = (
            _reflected(places - self.pad, images.shape[-1]) for places in (rows, columns)
        )
        image, channel = (torch.arange(n, device=images.device) for n in images.shape[:2])
        return images[
            image[:, None, None, None],
            channel[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


def _reflected(places: Tensor, side: int) -> Tensor:
    # 3 2 1 | 0 1 2 3 4 | 3 2 1: the border pixel itself is not repeated.
    places = places.abs()
    return places.where(places < side, 2 * (side - 1) - places)


@dataclass(frozen=True)
class Transform:
    """From a decoded image to what the backbone reads, in two halves.

    The first gives images one size, where they are decoded. The second cuts, mirrors and scales a
    whole batch on the device that it was moved to, as bytes if it was decoded as bytes.

    Calling it on one image of shape (C, H, W), uint8 or float in [0, 1], gives float32 of shape
    (C, image_size, image_size).
    """

    resized: Callable[[Tensor], Tensor]
    window: Window
    mean: float
    std: float

    def __call__(self, image: Tensor) -> Tensor:
        """Transform one image."""
        pixels, draws = self.prepare(image)
        return self.finish(pixels[None], draws[None])[0]

    def prepare(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The first half for one image (C, H, W), and its draws for the second, int64 (3,)."""
        pixels = self.resized(image)
        return pixels, torch.tensor(self.window.draw(pixels.shape[-1]))

    def finish(self, images: Tensor, draws: Tensor) -> Tensor:
        """The second half for images (B, C, S, S) and draws (B, 3) on one device.

        Pixels are mapped to [0, 1], the mean is subtracted, and the standard deviation divides.
        """
        cut = self.window.cut(images, draws)
        # A float image may leave [0, 1] in a bicubic resize; bytes are clipped there already.
        whole = cut.dtype == torch.uint8
        scaled = cut.to(torch.float32) / 255 if whole else cut.float().clamp(0, 1)
        return scaled if (self.mean, self.std) == (0, 1) else scaled.sub_(self.mean).div_(self.std)


def train_transform(config: DataConfig) -> Transform:
    """Build the random crop and flip of training images, drawing from torch's global generator.

    Examples
    --------
    >>> import torch
    >>> config = DataConfig(resize=8, train_crop="pad", pad=2, flip=True)
    >>> train_transform(config)(torch.zeros(1, 8, 8, dtype=torch.uint8)).shape
    torch.Size([1, 8, 8])
    """
    size, crop = config.image_size, config.train_crop == "pad"
    window = Window(size, config.pad if crop else 0, crop=crop, flip=config.flip)
    steps: list[Callable[[Tensor], Tensor]] = []
    if config.train_crop == "random_resized":
        low, high = config.crop_scale
        steps.append(v2.RandomResizedCrop(size, scale=(low, high), antialias=True))
    return Transform(_chain(steps), window, config.mean, config.std)


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
    return Transform(_chain(steps), Window(config.image_size), config.mean, config.std)


# pytest would take a function of this name, imported into a test module, for a test.
test_transform.__test__ = False  # type: ignore[attr-defined]


def _chain(steps: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    if not steps:
        return _same
    return steps[0] if len(steps) == 1 else v2.Compose(steps)


def _same(image: Tensor) -> Tensor:
    return image
