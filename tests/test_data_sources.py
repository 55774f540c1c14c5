"""Published folder layouts, DomainNet's lists, and what timm's factory names."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import CLASSES, colour, folder, grow
from PIL import Image
from timm.data.dataset import ImageDataset
from torchvision.datasets import CIFAR10

from training.config import CLASS_COUNTS, DataConfig
from training.data import (
    UnreadableImageError,
    build_stream,
    check_data,
    loader,
    train_transform,
    verify_data,
)
from training.data.factory import timm_source

DOMAINS = ("clipart", "sketch")


@pytest.fixture(autouse=True)
def _five_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.folder.CLASS_COUNTS", dict.fromkeys(CLASS_COUNTS, 5))


def named(name: str, root: Path, **settings: Any) -> DataConfig:
    return replace(folder(root), name=name, image_size=8, **settings)


# --- image folders under the names of LAMDA-PILOT


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a", "cub", "domainnet"])
@pytest.mark.parametrize("split", ["test", "val"])
def test_a_published_folder_is_found_by_its_name(tmp_path: Path, name: str, split: str) -> None:
    grow(tmp_path / name, {"train": 2, split: 1})
    above = build_stream(named(name, tmp_path), 3)
    itself = build_stream(named(name, tmp_path / name), 3)
    plain = build_stream(folder(tmp_path / name), 3)
    assert above.class_names == itself.class_names == plain.class_names
    assert above.order == np.random.RandomState(3).permutation(5).tolist()
    assert (len(above.train), len(above.test)) == (10, 5)


@pytest.mark.parametrize("name", ["cub", "domainnet"])
def test_a_root_without_the_data_set_says_which_folder_is_missing(
    tmp_path: Path, name: str
) -> None:
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=rf"no folder {root / name}, .*ROOT/train/"):
            build_stream(named(name, root), 0)


def test_a_folder_is_not_mistaken_for_a_data_set_of_its_name(tmp_path: Path) -> None:
    grow(tmp_path, {"train": 2, "test": 1})
    (tmp_path / "folder").mkdir()
    verify_data(folder(tmp_path, validation=0.5))  # the images of the two splits are the same
    assert len(build_stream(folder(tmp_path), 0).train) == 10


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    grow(tmp_path / "cub", {"train": 1, "test": 1}, CLASSES[:4])
    with pytest.raises(ValueError, match=r"cub has 5 classes, but .*cub has 4.*data.name folder"):
        build_stream(named("cub", tmp_path), 0)


def test_the_published_numbers_of_classes() -> None:
    assert CLASS_COUNTS == {"imagenet-r": 200, "imagenet-a": 200, "cub": 200, "domainnet": 345}


# --- DomainNet's lists


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Two domains; labels are not in the order of the sorted names."""
    root = tmp_path / "domainnet"
    for domain in DOMAINS:
        for split, count in (("train", 2), ("test", 1)):
            lines = []
            for label, name in enumerate(reversed(CLASSES)):
                for index in range(count):
                    path = f"{domain}/{name}/{split} {index}.png"  # official names have no blanks
                    (root / path).parent.mkdir(parents=True, exist_ok=True)
                    green = DOMAINS.index(domain) * 100 + (split == "test") * 50 + index
                    Image.new("RGB", (9, 9), colour(name, green)).save(root / path)
                    lines.append(f"{path} {label}\n")
            (root / f"{domain}_{split}.txt").write_text("".join(lines))
    return root


def test_lists_number_the_classes_and_join_the_domains(lists: Path) -> None:
    for root in (lists.parent, lists):
        stream = build_stream(named("domainnet", root), 7)
        order = np.random.RandomState(7).permutation(5)
        assert stream.class_names == [CLASSES[4 - number] for number in order]
        for images, count in ((stream.train, 4), (stream.test, 2)):
            assert torch.bincount(images.labels).tolist() == [count] * 5
            for pixels, label in images:
                assert int(pixels[0, 0, 0]) == colour(stream.class_names[label])[0]


def test_lists_are_checked_as_folders_are(lists: Path) -> None:
    report = check_data(lists)
    assert report.passed
    assert [split.images for split in report.splits] == [20, 10]
    (lists / "clipart" / "ant" / "test 0.png").unlink()
    assert check_data(lists).problems == [
        f"there is no image file {lists / 'clipart' / 'ant' / 'test 0.png'}."
    ]


def edit(lists: Path, name: str, old: str, new: str) -> None:
    path = lists / name
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (lambda r: (r / "sketch_test.txt").unlink(), FileNotFoundError, "lacks one .* of sketch"),
        (
            lambda r: edit(r, "clipart_train.txt", "train 1.png 2", "train 1.png two"),
            ValueError,
            "clipart_train.txt, line 6: expected a path and a label",
        ),
        (
            lambda r: edit(r, "sketch_train.txt", " 0\n", " 1\n"),
            ValueError,
            "sketch_train.txt, line 1: label 1 is dog elsewhere, here eel",
        ),
        (
            lambda r: edit(r, "clipart_test.txt", " 0\n", " 9\n"),
            ValueError,
            "give one class two labels",
        ),
        (
            lambda r: [edit(r, f"{d}_test.txt", "eel", "ell") for d in DOMAINS],
            ValueError,
            "test lacks eel and train lacks ell",
        ),
        (
            lambda r: (r / "sketch" / "ant" / "test 0.png").unlink(),
            UnreadableImageError,
            "no image file .*sketch/ant/test 0.png",
        ),
    ],
)
def test_wrong_lists_are_refused(
    lists: Path, spoil: Callable[[Path], object], kind: type[Exception], said: str
) -> None:
    spoil(lists)
    with pytest.raises(kind, match=said):
        build_stream(named("domainnet", lists), 0)


# --- timm's factory


def by_timm(dataset: str, root: Path | None = None, **settings: Any) -> DataConfig:
    return DataConfig(
        name="timm",
        dataset=dataset,
        root=None if root is None else str(root),
        **{"resize": 8, "image_size": 8, **settings},
    )


@pytest.mark.parametrize("dataset", ["torch/image_folder", "folder"])
def test_folders_by_timm_are_those_of_our_own(tmp_path: Path, dataset: str) -> None:
    grow(tmp_path, {"train": 2, "val": 1})
    theirs = build_stream(by_timm(dataset, tmp_path), 2)
    ours = build_stream(folder(tmp_path), 2)
    assert theirs.class_names == ours.class_names
    for mine, other in ((ours.train, theirs.train), (ours.test, theirs.test)):
        assert torch.equal(mine.labels, other.labels)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(mine, other, strict=True))


class Pictures(CIFAR10):
    """CIFAR-10 as torchvision holds it in memory, without its files."""

    def __init__(self, root: str, *, train: bool, download: bool) -> None:
        count = 30 if train else 20
        self.transform = self.target_transform = None
        self.targets = [index % 10 for index in range(count)]
        rng = np.random.default_rng(count)
        self.data = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.class_to_idx = {f"class {number}": number for number in range(10)}
        self.fetched = download


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.data.dataset_factory._TORCH_BASIC_DS", {"cifar10": Pictures})


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1])
def test_torchvision_sets_are_read_by_position(
    tmp_path: Path, pictures: None, workers: int
) -> None:
    config = by_timm("torch/cifar10", tmp_path, resize=32, image_size=32, workers=workers)
    stream = build_stream(config, 1)
    assert (len(stream.train), len(stream.test), len(stream.tasks)) == (30, 20, 5)
    raw = Pictures("", train=True, download=False)
    task = stream.train.subset(stream.tasks[0]).with_transform(train_transform(config))
    images, labels = next(iter(loader(task, 99, shuffle=False, seed=0, workers=workers)))
    assert labels.bincount().tolist() == [3, 3]
    wanted = [index for index, t in enumerate(raw.targets) if t in stream.order[:2]]
    expected = torch.from_numpy(raw.data[wanted]).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(images, expected)


class Reader:
    """What timm's reader of Hugging Face data sets does: encoded images, classes by number."""

    def __init__(self, root: Path, split: str) -> None:
        self.files = sorted((root / split).rglob("*.png"))
        self.class_to_idx = {name: number for number, name in enumerate(CLASSES)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.files[index].open("rb"), self.class_to_idx[self.files[index].parent.name]

    def iter_targets(self) -> Iterator[int]:
        return (self.class_to_idx[path.parent.name] for path in self.files)


@pytest.fixture
def hugging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that timm reads as the Hugging Face data set of that name."""
    grow(tmp_path, {"train": 2, "validation": 1})

    def create_dataset(name: str, root: str | None, *, split: str, download: bool) -> Any:
        if split not in ("train", "validation"):
            msg = f"Unknown split {split!r}."
            raise ValueError(msg)
        return ImageDataset(root, reader=Reader(tmp_path, split))

    monkeypatch.setattr("training.data.factory.find_spec", lambda name: object())
    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", create_dataset)
    return tmp_path


def test_readers_of_encoded_images_are_decoded_as_files_are(hugging: Path) -> None:
    stream = build_stream(by_timm("hfds/any/name"), 2)  # needs no root: the library has a cache
    (hugging / "test").symlink_to(hugging / "validation")
    ours = build_stream(folder(hugging), 2)
    assert stream.class_names == ours.class_names
    assert len(stream.train) == len(ours.train) == 10
    for (a, x), (b, y) in zip(stream.train, ours.train, strict=True):
        assert x == y
        assert torch.equal(a, b)


def test_columns_are_passed_on_where_they_are_named(
    hugging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def create_dataset(name: str, root: str | None, **settings: Any) -> Any:
        given.append({key: settings[key] for key in settings if key not in ("split", "download")})
        return ImageDataset(root, reader=Reader(hugging, settings["split"]))

    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", create_dataset)
    build_stream(by_timm("hfds/any/name"), 2)
    build_stream(by_timm("hfds/any/name", image_key="img", label_key="fine_label"), 2)
    assert given == [{}] * 2 + [{"input_key": "img", "target_key": "fine_label"}] * 2


def test_a_damaged_image_is_named_and_never_replaced_by_another(hugging: Path) -> None:
    sorted((hugging / "train").rglob("*.png"))[3].write_text("text")
    source = timm_source(by_timm("hfds/any/name"))
    with pytest.raises(UnreadableImageError, match="cannot read the image 3 of hfds/any/name: "):
        source.train.images[3]
    assert source.train.images[4].shape == (3, 8, 8)


def test_splits_have_the_names_that_the_data_set_gives_them(hugging: Path) -> None:
    with pytest.raises(ValueError, match=r"hfds/any: timm cannot open split test: Unknown split"):
        build_stream(by_timm("hfds/any", test_split="test"), 0)


def test_what_reads_hugging_face_sets_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.data.factory.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install datasets"):
        build_stream(by_timm("hfds/any/name"), 0)


@pytest.mark.parametrize(
    ("dataset", "kind", "said"),
    [
        ("torch/nowhere", ValueError, "timm cannot open split train: Unknown torchvision dataset"),
        ("torch/cifar10", ValueError, "not found or corrupted.*data.download true"),
        ("tfds/mnist", ValueError, "tfds/ data sets can only be streamed"),
        ("wds/x", ValueError, "can only be streamed"),
        ("folder", ValueError, "timm cannot open split train: Found 0 images"),
    ],
)
def test_what_timm_cannot_open_is_refused(
    tmp_path: Path, dataset: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        build_stream(by_timm(dataset, tmp_path), 0)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ([[0, 1]] * 30, "the number of one class"),
        ([0.5] * 30, "the number of one class"),
        ([-1] + [1] * 29, "without a class"),
        ([index % 9 for index in range(30)], "no image of class 9 in train"),
    ],
)
def test_targets_that_are_no_classes_are_refused(
    tmp_path: Path, pictures: None, monkeypatch: pytest.MonkeyPatch, targets: Any, said: str
) -> None:
    create = Pictures.__init__

    def spoilt(self: Pictures, root: str, *, train: bool, download: bool) -> None:
        create(self, root, train=train, download=download)
        self.targets = targets

    monkeypatch.setattr(Pictures, "__init__", spoilt)
    with pytest.raises(ValueError, match=said):
        build_stream(by_timm("torch/cifar10", tmp_path, resize=32, image_size=32), 0)
