"""From a decoded image to the input of the backbone: crops, flips, and scaling of pixels."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from training.data.config import DataConfig, Interpolation


@dataclass(frozen=True, kw_only=True)
class Transform:
    """From a decoded image to the input of the backbone, in two halves.

    The first half runs in the process that decodes an image and gives it its size. The second
    crops, mirrors and scales a whole batch on its device, where it arrives as bytes if it was
    decoded as bytes. Where to crop and whether to mirror is drawn with the image, as torchvision's
    RandomCrop and RandomHorizontalFlip would draw it from the same state of the global generator.

    Calling it on one image of shape (C, H, W), uint8 or float in [0, 1], gives float32 of shape
    (C, image_size, image_size).

    Parameters
    ----------
    resized
        Function that gives an image its size.
    size
        Side of the square that is cut; without ``crop``, that of the image.
    pad
        Pixels of reflected border on every side.
    crop
        Whether the square is cut at a random place of the padded image.
    flip
        Whether it is mirrored with probability 0.5.
    mean, std
        Mean subtracted from pixels in [0, 1], and divisor of the difference: one number, or one a
        channel.
    """

    resized: Callable[[Tensor], Tensor]
    size: int
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    pad: int = 0
    crop: bool = False
    flip: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        """Transform one image."""
        pixels, draws = self.prepare(image)
        return self.finish(pixels[None], draws[None])[0]

    def prepare(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The first half for one image (C, H, W), and its draws for the second, int64 (3,).

        The draws are the first row and column in the padded image, and whether to mirror.
        """
        pixels = self.resized(image)
        spare = pixels.shape[-1] + 2 * self.pad - self.size if self.crop else 0
        row, column = (
            int(torch.randint(0, spare + 1, size=())) if spare > 0 else 0 for _ in range(2)
        )
        mirrored = self.flip and bool(torch.rand(1) < 0.5)
        return pixels, torch.tensor([row, column, int(mirrored)])

    def finish(self, images: Tensor, draws: Tensor) -> Tensor:
        """The second half for images (B, C, S, S) and draws (B, 3) on one device."""
        cut = self._cut(images, draws)
        # A float image may leave [0, 1] in a bicubic resize; bytes are clipped there already.
        whole = cut.dtype == torch.uint8
        scaled = cut.to(torch.float32) / 255 if whole else cut.float().clamp(0, 1)
        if (self.mean, self.std) == (0, 1):
            return scaled
        mean, std = (
            scaled.new_tensor(value)[:, None, None] if isinstance(value, tuple) else value
            for value in (self.mean, self.std)
        )
        return scaled.sub_(mean).div_(std)

    def _cut(self, images: Tensor, draws: Tensor) -> Tensor:
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


class Unchanged(Transform):
    """Leaves what it is given as it is."""

    def __init__(self) -> None:
        super().__init__(resized=nn.Identity(), size=0, mean=0, std=1)

    def prepare(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The input itself, and draws without a meaning."""
        return image, torch.zeros(3, dtype=torch.int64)

    def finish(self, images: Tensor, draws: Tensor) -> Tensor:
        """The inputs themselves."""
        del draws
        return images


def _reflected(places: Tensor, side: int) -> Tensor:
    # 3 2 1 | 0 1 2 3 4 | 3 2 1: the border pixel itself is not repeated.
    places = places.abs()
    return places.where(places < side, 2 * (side - 1) - places)


def train_transform(config: DataConfig) -> Transform:
    """Build the random crop and flip of training images, drawing from torch's global generator.

    Without a crop, images get their size as in evaluation.

    Examples
    --------
    >>> import torch
    >>> config = DataConfig(resize=8, train_crop="pad", pad=2, flip=True)
    >>> train_transform(config)(torch.zeros(1, 8, 8, dtype=torch.uint8)).shape
    torch.Size([1, 8, 8])
    """
    images = config.images
    plain, padded = test_transform(config), images.train_crop == "pad"
    resized = plain.resized
    if images.train_crop == "random_resized":
        low, high = config.crop_scale
        resized = v2.RandomResizedCrop(images.image_size, scale=(low, high), antialias=True)
    elif padded:
        resized = nn.Identity()
    pad = config.pad if padded else 0
    return replace(plain, resized=resized, pad=pad, crop=padded, flip=images.flip)


def test_transform(config: DataConfig) -> Transform:
    """Build the resize and centre crop of evaluation images; nothing in it is random.

    Examples
    --------
    >>> import torch
    >>> test_transform(DataConfig(mean=0.5, std=0.5))(torch.zeros(1, 8, 8)).unique()
    tensor([-1.])
    """
    images, steps = config.images, list[nn.Module]()
    if config.test_resize is not None:
        steps.append(
            v2.Resize(
                config.test_resize,
                interpolation=tensor_filter(images.interpolation),
                antialias=True,
            )
        )
    if images.test_crop == "center":
        steps.append(v2.CenterCrop(images.image_size))
    return Transform(
        resized=nn.Sequential(*steps), size=images.image_size, mean=images.mean, std=images.std
    )


# pytest would take a function of this name, imported into a test module, for a test.
test_transform.__test__ = False  # type: ignore[attr-defined]


def tensor_filter(interpolation: Interpolation) -> v2.InterpolationMode:
    """The filter for tensors; bicubic for those that torchvision has only for Pillow images."""
    named = {"nearest", "bilinear", "bicubic"}
    return v2.InterpolationMode(interpolation if interpolation in named else "bicubic")
