"""Loaders: batches that depend on the seed alone, whatever the workers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from image_folders import augmented, folder, grow
from PIL import Image

from training.data import loader, train_transform
from training.data.dataset import SeededSampler


def epochs(
    tree: Path, *, workers: int = 0, seed: int = 5, shuffle: bool = True
) -> list[torch.Tensor]:
    batches = loader(augmented(tree, workers), 4, shuffle=shuffle, seed=seed, workers=workers)
    return [torch.cat([images for images, _ in batches]) for _ in range(2)]


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    root = grow(tmp_path / "noisy", {"train": 5, "test": 1})
    rng = np.random.default_rng(0)
    for path in sorted((root / "train").rglob("*.png")):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_depend_on_the_seed_and_not_on_the_workers(noisy: Path, shuffle: bool) -> None:
    torch.manual_seed(1)
    alone = epochs(noisy, shuffle=shuffle)
    torch.manual_seed(2)
    shared = epochs(noisy, shuffle=shuffle, workers=2)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert not torch.equal(alone[0], alone[1])  # each epoch augments anew
    assert not torch.equal(alone[0], epochs(noisy, shuffle=shuffle, seed=6)[0])


def test_loading_leaves_the_global_generator_alone(noisy: Path) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    epochs(noisy)
    assert torch.equal(torch.rand(3), expected)


def test_every_image_comes_once_and_the_last_batch_is_short(noisy: Path) -> None:
    train = augmented(noisy, 0)
    batches = list(loader(train, 4, shuffle=True, seed=0))
    assert [len(labels) for _, labels in batches] == [4] * 6 + [1]
    assert torch.bincount(torch.cat([labels for _, labels in batches])).tolist() == [5] * 5
    assert batches[0][0].dtype == torch.float32
    ordered = torch.cat([y for _, y in loader(train, 4, shuffle=False, seed=0)])
    assert torch.equal(ordered, train.labels)


def test_a_pass_can_be_repeated_by_its_number(noisy: Path) -> None:
    batches = loader(augmented(noisy, 0), 4, shuffle=True, seed=5)
    second = epochs(noisy)[1]
    assert isinstance(batches.sampler, SeededSampler)
    batches.sampler.set_epoch(1)
    assert torch.equal(torch.cat([images for images, _ in batches]), second)


def test_accelerate_gives_the_same_batches(noisy: Path) -> None:
    plain = loader(augmented(noisy, 0), 4, shuffle=True, seed=5)
    prepared = Accelerator(cpu=True).prepare(loader(augmented(noisy, 0), 4, shuffle=True, seed=5))
    for _ in range(2):
        for (a, x), (b, y) in zip(plain, prepared, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(x, y)


def test_augmenting_does_not_write_into_kept_images(noisy: Path) -> None:
    train = augmented(noisy, 0)
    before = torch.stack([image for image, _ in train.with_transform(None)])
    for config in (folder(noisy, mean=0.5, std=0.5), folder(noisy, flip=True, mean=0.5, std=0.5)):
        list(train.with_transform(train_transform(config)))
    after = torch.stack([image for image, _ in train.with_transform(None)])
    assert torch.equal(before, after)
