"""Streams: the order of classes, the cut into tasks, validation, and the sources by name."""

import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_folders import CALTECH, CLASSES, colour, folder, grow
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR100

from training.config import DataConfig
from training.data import build_stream, loader
from training.data import test_transform as evaluation_transform
from training.data.stream import cut_tasks


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return grow(tmp_path / "tree", {"train": 5, "test": 2})


# --- the order of classes and the cut into tasks


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_tasks_cut_the_labels_in_order(count: int, first: int, increment: int) -> None:
    config = DataConfig(classes=count, init_cls=min(first, count), increment=increment)
    tasks = cut_tasks(config, 60)
    assert [label for task in tasks for label in task] == list(range(count))
    assert len(tasks[0]) == config.init_cls
    assert all(len(task) == increment for task in tasks[1:-1])
    assert len(tasks) == 1 or 1 <= len(tasks[-1]) <= increment


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"classes": 11}, "data.classes"),
        ({"init_cls": 11}, "data.init_cls"),
        ({"classes": 3, "init_cls": 4}, "data.init_cls"),
        ({"tasks": 6}, "data.tasks"),
    ],
)
def test_a_stream_that_asks_for_too_much_is_refused(settings: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_stream(DataConfig(**settings), 0)  # type: ignore[arg-type]


def test_digits_keep_their_fixed_split_under_the_new_labels() -> None:
    bunch = load_digits()
    train, test = train_test_split(
        np.arange(1797), test_size=360, stratify=bunch.target, random_state=0
    )
    stream = build_stream(DataConfig(), 1993)
    order = np.random.RandomState(1993).permutation(10)
    assert stream.order == order.tolist()
    assert stream.class_names == [str(number) for number in order]
    for images, expected in ((stream.train, train), (stream.test, test)):
        assert len(images) == len(expected)
        for position in (0, 100, len(expected) - 1):
            pixels, label = images[position]
            np.testing.assert_array_equal(pixels[0] * 16, bunch.images[expected[position]])
            assert order[label] == bunch.target[expected[position]]


def test_order_seed_replaces_the_seed_of_the_run() -> None:
    orders = [build_stream(DataConfig(order_seed=4), seed).order for seed in (0, 1)]
    assert orders[0] == orders[1] == np.random.RandomState(4).permutation(10).tolist()
    assert build_stream(DataConfig(), 0).order != build_stream(DataConfig(), 1).order


def test_classes_and_tasks_cut_the_stream() -> None:
    stream = build_stream(DataConfig(classes=7, init_cls=3, increment=2, tasks=2), 0)
    assert stream.tasks == [(0, 1, 2), (3, 4)]
    assert stream.order == np.random.RandomState(0).permutation(10)[:5].tolist()
    for images in (stream.train, stream.test):
        assert set(images.labels.tolist()) == set(range(5))
        assert images.labels.dtype == torch.int64


def test_tasks_of_given_sizes_leave_out_what_follows() -> None:
    stream = build_stream(DataConfig(task_sizes=[1, 4, 2]), 3)
    assert stream.tasks == [(0,), (1, 2, 3, 4), (5, 6)]
    assert set(stream.train.labels.tolist()) == set(range(7))
    assert len(build_stream(DataConfig(task_sizes=[1, 4, 2], tasks=2), 3).tasks) == 2
    with pytest.raises(ValueError, match=r"data.task_sizes \[6, 5\] are 11 classes.* only 10"):
        build_stream(DataConfig(task_sizes=[6, 5]), 3)
    with pytest.raises(ValueError, match=r"10 classes give 2 tasks \(data.task_sizes \[6, 4\]\)"):
        build_stream(DataConfig(task_sizes=[6, 4], tasks=3), 3)


def test_classes_stay_in_the_order_of_their_numbers_without_shuffle() -> None:
    stream = build_stream(DataConfig(shuffle=False, classes=6), 3)
    assert stream.order == list(range(6))
    assert stream.class_names == list("012345")


def test_subset_keeps_pairs_and_order() -> None:
    train = build_stream(DataConfig(), 0).train
    part = train.subset((3, 1))
    expected = [index for index, label in enumerate(train.labels.tolist()) if label in (1, 3)]
    assert len(part) == len(expected)
    for position in (0, len(part) - 1):
        pixels, label = part[position]
        assert label == train[expected[position]][1]
        assert torch.equal(pixels, train[expected[position]][0])


# --- validation


@pytest.mark.parametrize(("share", "count"), [(0.4, 2), (0.01, 1), (0.9, 4)])
def test_validation_holds_out_a_share_of_each_class(tree: Path, share: float, count: int) -> None:
    stream = build_stream(folder(tree, validation=share), 0)
    assert torch.bincount(stream.test.labels).tolist() == [count] * 5
    assert torch.bincount(stream.train.labels).tolist() == [5 - count] * 5
    seen = [tuple(p[:, 0, 0].tolist()) for part in (stream.train, stream.test) for p, _ in part]
    assert sorted(seen) == sorted(colour(name, i) for name in CLASSES for i in range(5))


def test_validation_never_opens_the_test_split(tree: Path) -> None:
    for path in (tree / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    build_stream(folder(tree, validation=0.2), 0)
    (tree / "test").rename(tree / "elsewhere")
    build_stream(folder(tree, validation=0.2), 0)
    with pytest.raises(FileNotFoundError, match="val"):
        build_stream(folder(tree), 0)


def test_validation_holds_out_the_same_images_in_every_order(tree: Path) -> None:
    held = [
        {tuple(p[:, 0, 0].tolist()) for p, _ in build_stream(folder(tree, validation=0.4), s).test}
        for s in (0, 1)
    ]
    assert held[0] == held[1]


def test_validation_needs_two_images(tmp_path: Path) -> None:
    grow(tmp_path, {"train": 1, "test": 1})
    with pytest.raises(ValueError, match=r"class [a-z]+ has 1 training image"):
        build_stream(folder(tmp_path, validation=0.5, classes=5), 0)


# --- CIFAR-100


def fake_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = root / CIFAR100.base_folder
    base.mkdir(parents=True)
    names = [f"class{index:03d}" for index in range(100)]
    for kind, count in (("train", 2), ("test", 1)):
        labels = [index % 100 for index in range(100 * count)]
        data = np.repeat(np.array(labels, dtype=np.uint8)[:, None], 3072, axis=1)
        (base / kind).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    digest = {
        name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in ("train", "test")
    }
    meta = hashlib.md5((base / "meta").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", digest["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", digest["test"]]])
    monkeypatch.setattr(
        CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": meta}
    )


def test_cifar100_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cifar(tmp_path, monkeypatch)
    config = DataConfig(
        name="cifar100", root=str(tmp_path), image_size=32, init_cls=10, increment=10
    )
    stream = build_stream(config, 1)
    assert stream.order == np.random.RandomState(1).permutation(100).tolist()
    assert (len(stream.tasks), len(stream.train), len(stream.test)) == (10, 200, 100)
    for pixels, label in stream.train:
        assert pixels.shape == (3, 32, 32)
        assert stream.class_names[label] == f"class{int(pixels[0, 0, 0]):03d}"


def test_cifar100_without_files_or_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(_: object) -> None:
        msg = "no network"
        raise URLError(msg)

    monkeypatch.setattr(CIFAR100, "download", offline)
    config = DataConfig(name="cifar100", root=str(tmp_path), image_size=32)
    with pytest.raises(FileNotFoundError, match=r"no network.*cifar-100-python\.tar\.gz"):
        build_stream(config, 0)


# --- Caltech-101


def test_caltech_as_the_reference_used_it(shared: Path) -> None:
    config = DataConfig(
        name="folder",
        root=str(shared / "data" / "caltech101"),
        classes=100,
        init_cls=10,
        increment=10,
        tasks=2,
        mean=0.5,
        std=0.5,
        **CALTECH,  # type: ignore[arg-type]
    )
    stream = build_stream(config, 1993)
    assert stream.order == np.random.RandomState(1993).permutation(101)[:20].tolist()
    assert len(stream.tasks) == 2
    test = stream.test.subset(stream.tasks[0]).with_transform(evaluation_transform(config))
    images, labels = next(iter(loader(test, 64, shuffle=False, seed=0)))
    assert images.shape[1:] == (3, 32, 32)
    assert -1 <= images.min() < images.max() <= 1
    assert labels.max() < 10
