"""Loaders: batches that depend on the seed alone, whatever the workers."""

import os
import resource
import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import augmented, folder, grow
from PIL import Image
from small_runs import tiny

from training.data import build_stream, loader, train_transform
from training.data.loaders import SeededBatches


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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_one_clear_error(noisy: Path, workers: int) -> None:
    others = {*active_children()}
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader(augmented(noisy, workers), 2, shuffle=True, seed=0, workers=workers))
    next(batches)
    # torch's own would raise anywhere, where a checkpoint is written, say.
    assert signal.getsignal(signal.SIGCHLD) == before
    for worker in {*active_children()} - others:
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
    with pytest.raises(ChildProcessError, match="SIGKILL"):
        list(batches)


_killed_at_birth: list[bool] = []
os.register_at_fork(
    after_in_child=lambda: _killed_at_birth and os.kill(os.getpid(), signal.SIGKILL)
)


def test_a_worker_that_is_killed_before_the_others_are_there(noisy: Path) -> None:
    batches = loader(augmented(noisy, 2), 2, shuffle=True, seed=0, workers=2)
    _killed_at_birth.append(True)
    try:
        with pytest.raises(ChildProcessError, match="SIGKILL"):
            list(batches)
    finally:
        _killed_at_birth.clear()


def test_too_little_shared_memory_is_an_error_and_no_wait(noisy: Path) -> None:
    # The system lets no file grow, also none in memory, as where /dev/shm is full.
    images = augmented(noisy, 1, cache=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OSError, match=r"^the processes .* --shm-size"):
            list(loader(images, 4, shuffle=True, seed=0, workers=1))
        with pytest.raises(OSError, match=r"data\.cache"):
            augmented(noisy, 1, cache=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_in_a_worker_is_told_as_here(noisy: Path) -> None:
    images = augmented(noisy, 1, cache=False)
    (noisy / "train" / "bee" / "0.png").write_bytes(b"gone bad")
    said = []
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"0\.png") as refused:
            list(loader(images, 4, shuffle=False, seed=0, workers=workers))
        said.append((type(refused.value), str(refused.value)))
    assert said[0] == said[1]


def test_every_image_comes_once_and_the_last_batch_is_short(noisy: Path) -> None:
    train = augmented(noisy, 0)
    batches = list(loader(train, 4, shuffle=True, seed=0))
    assert [len(labels) for _, labels in batches] == [4] * 6 + [1]
    assert torch.bincount(torch.cat([labels for _, labels in batches])).tolist() == [5] * 5
    assert batches[0][0].dtype == torch.float32
    ordered = torch.cat([y for _, y in loader(train, 4, shuffle=False, seed=0)])
    assert torch.equal(ordered, train.labels)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_over_several_epochs_is_theirs_in_a_row(noisy: Path, workers: int) -> None:
    one_by_one = loader(augmented(noisy, workers), 4, shuffle=True, seed=5, workers=workers)
    expected = [images for _ in range(3) for images, _ in one_by_one][2:]
    batches = loader(augmented(noisy, workers), 4, shuffle=True, seed=5, workers=workers)
    batches.order.start_at(0, 2, epochs=3)
    found = [images for images, _ in batches]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert batches.order.epoch == 3
    assert len(list(batches)) == len(batches) == 7  # the next pass is one epoch again
    batches.order.start_at(1, 0)  # any pass can be repeated by its number
    assert all(torch.equal(x, y) for x, (y, _) in zip(expected[5:12], batches, strict=True))


@pytest.mark.parametrize("pad", [0, 3])
def test_batches_hold_what_the_transform_gives_image_by_image(noisy: Path, pad: int) -> None:
    config = folder(noisy, image_size=8, train_crop="pad", pad=pad, flip=True, mean=0.4, std=0.3)
    images = build_stream(config, 0).train
    transform = train_transform(config)
    batches = loader(images.with_transform(transform), 4, shuffle=True, seed=5)
    for keys, (pixels, labels) in zip(
        SeededBatches(25, 4, shuffle=True, seed=5), batches, strict=True
    ):
        for (position, seed), one, label in zip(keys, pixels, labels, strict=True):
            torch.manual_seed(seed)
            assert torch.equal(one, transform(images[position][0]))
            assert images[position][1] == label


def test_bytes_go_to_the_device_and_are_augmented_there(noisy: Path) -> None:
    # The meta device holds no numbers: what is computed on the CPU could not get there and back.
    train = augmented(noisy, 0)
    pixels, draws, _ = train.prepared([(0, 1), (3, 2)])
    assert pixels.dtype == torch.uint8
    assert draws.shape == (2, 3)
    images, labels = next(iter(loader(train, 4, shuffle=True, seed=0, device="meta")))
    assert images.device.type == "meta"
    assert images.shape == (4, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_augments_as_the_processor_does(noisy: Path, workers: int) -> None:
    settings = {"shuffle": True, "seed": 5, "workers": workers}
    here = loader(augmented(noisy, workers), 4, **settings)  # type: ignore[arg-type]
    there = loader(augmented(noisy, workers), 4, **settings, device="cuda")  # type: ignore[arg-type]
    for (pixels, labels), (moved, same) in zip(here, there, strict=True):
        assert moved.device.type == "cuda"
        torch.testing.assert_close(moved.cpu(), pixels, rtol=1e-6, atol=1e-6)  # a division rounds
        assert torch.equal(labels, same)


def test_batches_need_a_transform(noisy: Path) -> None:
    with pytest.raises(TypeError, match="use with_transform"):
        loader(augmented(noisy, 0).with_transform(None), 4, shuffle=True, seed=0)


def test_augmenting_does_not_write_into_kept_images(noisy: Path) -> None:
    train = augmented(noisy, 0)
    before = torch.stack([image for image, _ in train.with_transform(None)])
    for config in (folder(noisy, mean=0.5, std=0.5), folder(noisy, flip=True, mean=0.5, std=0.5)):
        list(train.with_transform(train_transform(config)))
    after = torch.stack([image for image, _ in train.with_transform(None)])
    assert torch.equal(before, after)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
def test_workers_heed_their_parent_alone(root: Path) -> None:
    data = tiny(root, None).data
    images = build_stream(data, seed=0).train.with_transform(train_transform(data))
    batches = iter(loader(images, 4, shuffle=True, seed=0, workers=1))
    others = {*active_children()}  # of other tests in this process
    next(batches)
    (worker,) = {*active_children()} - others
    for number in (signal.SIGTERM, signal.SIGINT):
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    assert len(list(batches)) == 8  # it still works
    again = iter(loader(images, 4, shuffle=True, seed=0, workers=1))
    next(again)
    (worker,) = {*active_children()} - others
    worker.terminate()  # as Python does at its end, where a pass is still open
    worker.join()
    assert worker.exitcode == 0
