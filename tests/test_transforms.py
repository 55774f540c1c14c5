"""Crops, resizing and scaling of images, for training and for evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import CALTECH, folder
from PIL import Image
from torchvision.transforms import v2

from training.data import DataConfig, train_transform
from training.data import test_transform as evaluation_transform

PAPER = folder(
    Path(),
    resize=None,
    image_size=224,
    train_crop="random_resized",
    crop_scale=(0.05, 1.0),
    flip=True,
    test_resize=256,
    test_crop="center",
)


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))


def test_pad_crops_are_windows_of_the_reflected_image() -> None:
    image = noise(3, 32, 32)
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    flat = (padded.astype(np.float32) / 255 - 0.5) / 0.5
    windows = {
        flip: [flat[:, i : i + 32, j : j + 32][..., ::flip] for i in range(9) for j in range(9)]
        for flip in (1, -1)
    }
    transform = train_transform(folder(Path(), mean=0.5, std=0.5, **CALTECH))
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        crop = transform(image).numpy()
        found = [
            (f, k) for f in windows for k, w in enumerate(windows[f]) if np.array_equal(crop, w)
        ]
        assert len(found) == 1
        seen.update(found)
    assert {flip for flip, _ in seen} == {1, -1}
    assert len(seen) > 20


@pytest.mark.parametrize(("size", "pad"), [(32, 4), (32, 0), (20, 3), (38, 31)])
@pytest.mark.parametrize("flip", [True, False])
def test_pad_crops_are_those_of_torchvision(size: int, pad: int, flip: bool) -> None:
    settings = {**CALTECH, "image_size": size, "pad": pad, "flip": flip, "test_resize": size}
    transform = train_transform(folder(Path(), **settings))
    steps: list[torch.nn.Module] = [v2.RandomCrop(size, pad or None, padding_mode="reflect")]
    reference = v2.Compose([*steps, v2.RandomHorizontalFlip()] if flip else steps)
    for seed in range(20):
        image = noise(3, 32, 32)
        torch.manual_seed(seed)
        expected = reference(image).float() / 255
        torch.manual_seed(seed)
        assert torch.equal(transform(image), expected)


def test_random_resized_crops_have_the_settings_of_the_paper() -> None:
    image = noise(3, 60, 80)
    torch.manual_seed(3)
    ours = train_transform(PAPER)(image)
    torch.manual_seed(3)
    reference = v2.Compose(
        [
            v2.RandomResizedCrop(
                224, (0.05, 1.0), (3 / 4, 4 / 3), v2.InterpolationMode.BILINEAR, antialias=True
            ),
            v2.RandomHorizontalFlip(0.5),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )(image)
    assert ours.shape == (3, 224, 224)
    torch.testing.assert_close(ours, reference)


def test_evaluation_images_are_those_of_pillow() -> None:
    image = noise(3, 60, 80)
    reference = v2.Compose(
        [
            v2.Resize(256, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )(Image.fromarray(image.permute(1, 2, 0).numpy()))
    levels = ((evaluation_transform(PAPER)(image) - reference) * 255).abs().round()
    # Tensors and Pillow round the two passes of a resize differently, seldom and little.
    assert levels.max() <= 2
    assert (levels > 0).float().mean() < 0.02


def test_pixels_are_plain_by_default_and_scaled_exactly() -> None:
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    transform = evaluation_transform(DataConfig(image_size=16, resize=16))
    plain = transform(image)
    np.testing.assert_array_equal(plain.numpy().ravel(), np.arange(256, dtype=np.float32) / 255)
    assert torch.equal(transform(plain.double()), plain)
