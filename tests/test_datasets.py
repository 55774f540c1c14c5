"""Data sets: folder trees, published ones, DomainNet's lists, CIFAR-100, and timm's factory."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torch
from image_folders import CLASSES, PLAIN, colour, folder, grow
from own_components import Few, FewDomains
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from training.data import (
    DATA_SETS,
    DataConfig,
    UnreadableImageError,
    build_stream,
    check_data,
    loader,
    train_transform,
    verify_data,
)
from training.data.datasets import IMAGE_SUFFIXES

DOMAINS = ("clipart", "sketch")


# --- folder trees


@pytest.mark.parametrize("second", ["test", "val"])
def test_folder_labels_follow_the_sorted_names(tmp_path: Path, second: str) -> None:
    stream = build_stream(folder(grow(tmp_path, {"train": 3, second: 2})), 7)
    order = np.random.RandomState(7).permutation(5)
    assert stream.class_names == [CLASSES[index] for index in order]
    for images, count in ((stream.train, 3), (stream.test, 2)):
        assert len(images) == 5 * count
        for pixels, label in images:
            assert pixels.shape == (3, 8, 8)
            assert pixels.dtype == torch.uint8
            assert int(pixels[0, 0, 0]) == colour(stream.class_names[label])[0]


def test_folder_ignores_other_files_and_finds_nested_images(tree: Path) -> None:
    (tree / "train" / "ant" / "notes.txt").write_text("no image")
    (tree / "train" / "ant" / "._0.png").write_text("no image")
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / "ant" / "more").mkdir()
    Image.new("RGB", (9, 9), colour("ant")).save(tree / "train" / "ant" / "more" / "x.JPEG")
    assert len(build_stream(folder(tree), 0).train) == 26


def lose(name: str) -> Callable[[Path], object]:
    return lambda tree: (tree / name).rename(tree.with_name("moved"))


@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (lose(""), FileNotFoundError, "no folder .*ROOT/train/CLASS/IMAGE"),
        (lose("train"), ValueError, "no folder train; expected ROOT"),
        (lose("test/cat"), ValueError, "test lacks cat"),
        (lose("train/cat"), ValueError, "train lacks cat"),
        (
            lambda t: [p.rename(p.with_suffix(".txt")) for p in (t / "test" / "cat").iterdir()],
            ValueError,
            "no images for cat",
        ),
        (lambda t: (t / "train" / "fox").mkdir(), ValueError, "no images for fox"),
        (
            lambda t: [p.rename(t / p.name) for p in [*(t / "train").iterdir()]],
            ValueError,
            "beside it: ant, bee",
        ),
    ],
)
def test_a_wrong_tree_is_refused_at_the_start(
    tree: Path, spoil: Callable[[Path], object], kind: type[Exception], says: str
) -> None:
    spoil(tree)
    with pytest.raises(kind, match=says):
        build_stream(folder(tree), 0)


# --- folders as people have them


def photos(root: Path, counts: dict[str, int]) -> Path:
    """Class folders with some images each, without a split."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = Image.new("RGB", (12, 10), (20 * number, index, 7))
            image.save(root / name / f"{index}.png")
    return root


def test_without_a_split_a_fifth_of_every_class_is_held_out(tmp_path: Path) -> None:
    counts = {"ant": 10, "bee": 7, "cat": 3, "dog": 2}
    root = photos(tmp_path / "photos", counts)
    config = folder(root)
    streams = [build_stream(config, seed) for seed in (0, 1)]
    for stream in streams:
        held = dict(zip(stream.class_names, stream.test.labels.bincount().tolist(), strict=True))
        assert held == {"ant": 2, "bee": 1, "cat": 1, "dog": 1}
        assert len(stream.train) + len(stream.test) == sum(counts.values())
        assert any("held out" in note and "5 of 22" in note for note in stream.notes)
    first, second = ({tuple(x[:, 0, 0].tolist()) for x, _ in s.test} for s in streams)
    assert first == second
    assert config.resolved(None).validation == 0.2
    # Another share is a setting; a test split is evaluated on.
    assert len(build_stream(folder(root, validation=0.5), 0).test) == 5 + 4 + 2 + 1
    for name in counts:
        (root / "train").mkdir(exist_ok=True)
        (root / name).rename(root / "train" / name)
    assert len(build_stream(config, 0).test) == 5
    photos(root / "Validation", dict.fromkeys(counts, 2))
    assert config.resolved(None).validation == 0
    assert len(build_stream(config, 0).test) == 8


def test_a_class_of_one_image_is_refused_where_some_are_held_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bee, dog have one: add images"):
        build_stream(folder(photos(tmp_path, {"ant": 2, "bee": 1, "cat": 4, "dog": 1})), 0)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", {"ant": 6, "bee": 6})
    (root / "ant" / "text.txt").write_text("x")
    (root / "Thumbs.db").write_text("x")
    (root / "bee" / "0.png").write_bytes(b"x")
    truncated = root / "bee" / "1.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-500])
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        (root / name / "ant").mkdir(parents=True)
        (root / name / "ant" / "0.png").write_bytes(b"x")
    stream = build_stream(folder(root), 0)
    assert sorted(stream.class_names) == ["ant", "bee"]
    assert len(stream.train) + len(stream.test) == 11
    assert stream.left_out == ["bee/0.png", "bee/1.jpg"]
    said = "\n".join(stream.notes)
    assert "1 .db, 1 .txt" in said
    assert "2 damaged images" in said
    assert str(truncated) in said
    # Results do not depend on it: without these files, the images are the same.
    (root / "bee" / "0.png").unlink()
    truncated.unlink()
    assert build_stream(folder(root), 0).fingerprint() == stream.fingerprint()


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="HEIC can be read here")
def test_kinds_of_images_without_a_reader_are_counted(tmp_path: Path) -> None:
    root = photos(tmp_path, {"ant": 3, "bee": 3})
    for name in ("a.heic", "b.HEIC"):
        (root / "ant" / name).write_bytes(b"x")
    (root / "bee" / "d.heic").write_bytes(b"x")
    said = "\n".join(build_stream(folder(root), 0).notes)
    assert "3 .heic" in said
    assert "pillow-heif" in said
    for path in (root / "bee").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no images for bee; \.heic: pip install pillow-heif"):
        build_stream(folder(root), 0)


def test_copies_in_both_parts_are_said(tree: Path) -> None:
    notes = build_stream(folder(tree), 0).notes
    assert any("10 of the evaluation images are copies" in note for note in notes)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda r: photos(r / "photos", {"ant": 2, "bee": 2}), "give .*photos instead"),
        (lambda r: [photos(r / x, {"ant": 2, "bee": 2}) for x in ("one", "two")], "two levels"),
        (lambda r: Image.new("RGB", (8, 8)).save(r / "x.png"), "no class folders, but 1 images"),
        (lambda r: photos(r, {"train": 2, "bee": 2}), "beside it: bee"),
        (lambda r: photos(r, {"test": 2, "bee": 2}), "give its folder another name"),
        (lambda r: photos(r, {"caf\u00e9": 2, "cafe\u0301": 2}), "Unicode"),
        (lambda r: photos(r, {"ant": 2, os.fsdecode(b"caf\xe9"): 2}), r"caf.*not UTF-8"),
    ],
)
def test_folders_that_can_be_read_in_several_ways_are_refused_with_a_cure(
    tmp_path: Path, build: Callable[[Path], object], said: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    build(root)
    with pytest.raises(ValueError, match=said):
        build_stream(folder(root), 0)


def test_names_of_classes_meet_in_any_unicode_form(tmp_path: Path) -> None:
    photos(tmp_path / "train", {"caf\u00e9": 3, "ant": 3})
    photos(tmp_path / "test", {"cafe\u0301": 1, "ant": 1})
    assert sorted(build_stream(folder(tmp_path), 0).class_names) == ["ant", "caf\u00e9"]


def test_files_are_read_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or real(path))
    stream = build_stream(folder(tree), 0)
    before = stream.fingerprint(), stream.test_record()
    assert len(reads) == len(set(reads)) == 35
    (tree / "train").rename(tree / "elsewhere")  # all images are in memory
    assert all(image.shape == (3, 8, 8) for image, _ in stream.train)
    assert (stream.fingerprint(), stream.test_record()) == before


# --- image folders under the names of LAMDA-PILOT


def few(root: Path, kind: str = "Few") -> DataConfig:
    return DataConfig(f"own_components.{kind}", {"root": str(root)}, resize=8, train_crop="none")


@pytest.mark.parametrize("kind", [Few, FewDomains])
@pytest.mark.parametrize("split", ["test", "val"])
def test_a_published_folder_is_found_by_its_name(
    tmp_path: Path, kind: type[Few], split: str
) -> None:
    grow(tmp_path / "cub", {"train": 2, split: 1})
    plain = folder(tmp_path / "cub").build()
    for root in (tmp_path, tmp_path / "cub"):
        data = kind(str(root), name="cub")
        for name, count in (("train", 10), ("test", 5)):
            part, same = data.load(name), plain.load(name)
            assert len(part.images) == count
            assert part.images == same.images
            assert (part.classes, list(part.targets)) == (same.classes, list(same.targets))


@pytest.mark.parametrize("name", ["cub", "domainnet"])
def test_a_root_without_the_data_set_says_which_folder_is_missing(
    tmp_path: Path, name: str
) -> None:
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=f"{root / name}"):
            build_stream(DataConfig(name, {"root": str(root)}, resize=8), 0)


def test_a_folder_is_not_mistaken_for_a_data_set_of_its_name(tmp_path: Path) -> None:
    grow(tmp_path, {"train": 2, "test": 1})
    (tmp_path / "folder").mkdir()
    verify_data(folder(tmp_path, validation=0.5))  # the images of the two splits are the same
    assert len(build_stream(folder(tmp_path), 0).train) == 10


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    grow(tmp_path / "cub", {"train": 1, "test": 1}, CLASSES[:4])
    with pytest.raises(ValueError, match=r"5.*4"):
        Few(str(tmp_path), name="cub").load("train")


def test_the_published_numbers_of_classes() -> None:
    names = {"imagenet-r": 200, "imagenet-a": 200, "cub": 200, "domainnet": 345}
    assert {name: DATA_SETS.find(name).count for name in names} == names


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
    data = FewDomains(str(lists.parent), name="domainnet")
    assert data.load("train").classes == CLASSES[::-1]
    assert data.load("train").images == FewDomains(str(lists), name="any").load("train").images
    stream = build_stream(few(lists, "FewDomains"), 7)
    order = np.random.RandomState(7).permutation(5)
    assert stream.class_names == [CLASSES[4 - number] for number in order]
    for images, count in ((stream.train, 4), (stream.test, 2)):
        assert torch.bincount(images.labels).tolist() == [count] * 5
        for pixels, label in images:
            assert int(pixels[0, 0, 0]) == colour(stream.class_names[label])[0]


def test_lists_of_the_splits_may_number_the_classes_differently(lists: Path) -> None:
    before = build_stream(few(lists, "FewDomains"), 7)
    for domain in DOMAINS:
        path = lists / f"{domain}_test.txt"
        rows = [line.rpartition(" ") for line in path.read_text().splitlines()]
        path.write_text("".join(f"{name} {4 - int(label)}\n" for name, _, label in rows))
    after = build_stream(few(lists, "FewDomains"), 7)
    assert before.class_names == after.class_names
    for pixels, label in after.test:
        assert int(pixels[0, 0, 0]) == colour(after.class_names[label])[0]


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
        (lambda r: edit(r, "clipart_test.txt", " 0\n", " 9\n"), ValueError, "one class two labels"),
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
        build_stream(few(lists, "FewDomains"), 0)


# --- digits


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
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


def test_cifar100_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cifar(tmp_path, monkeypatch)
    options = {"root": str(tmp_path)}
    config = DataConfig("cifar100", options, image_size=32, init_cls=10, increment=10)
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
    config = DataConfig("cifar100", {"root": str(tmp_path)}, image_size=32)
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python\.tar\.gz"):
        build_stream(config, 0)


# --- timm's factory


OPTIONS = {"train_split", "test_split", "image_key", "label_key", "download"}


def by_timm(dataset: str, root: Path | None = None, **settings: Any) -> DataConfig:
    names = {key: settings.pop(key) for key in OPTIONS & settings.keys()}
    options = {"dataset": dataset, "root": None if root is None else str(root), **names}
    return DataConfig("timm", options, **{**PLAIN, "image_size": 8, **settings})


def same_images(ours: DataConfig, theirs: DataConfig) -> None:
    one, other = build_stream(ours, 2), build_stream(theirs, 2)
    assert (one.class_names, one.order) == (other.class_names, other.order)
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(a, b, strict=True))


@pytest.mark.parametrize("dataset", ["torch/image_folder", "folder"])
def test_folders_by_timm_are_those_of_our_own(tmp_path: Path, dataset: str) -> None:
    grow(tmp_path, {"train": 2, "val": 1})
    same_images(folder(tmp_path), by_timm(dataset, tmp_path))


class Pictures(CIFAR10):
    """CIFAR-10 as torchvision holds it in memory, without its files."""

    labels: ClassVar[Any] = [index % 10 for index in range(30)]

    def __init__(self, root: str, *, train: bool, download: bool) -> None:
        count = 30 if train else 20
        self.transform = self.target_transform = None
        self.targets = self.labels[:count]
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


def test_what_reads_hugging_face_sets_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="datasets"):
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
        ([index % 9 for index in range(30)], "no training image of class 9"),
    ],
)
def test_targets_that_are_no_classes_are_refused(
    tmp_path: Path, pictures: None, monkeypatch: pytest.MonkeyPatch, targets: Any, said: str
) -> None:
    monkeypatch.setattr(Pictures, "labels", targets)
    with pytest.raises(ValueError, match=said):
        build_stream(by_timm("torch/cifar10", tmp_path, resize=32, image_size=32), 0)


def test_image_files_are_at_least_those_of_torchvision() -> None:
    assert set(IMG_EXTENSIONS) <= set(IMAGE_SUFFIXES)


# --- data sets of the Hugging Face library itself


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library, without a network."""
    datasets = pytest.importorskip("datasets", reason="pip install 'loda[hf]' for its data sets")
    for place in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{place}.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def by_library(place: Path, cache: Path, **settings: str) -> DataConfig:
    return by_timm(f"hfds/{place}", cache, **{"test_split": "test", **settings})


def test_image_folders_of_the_library_are_those_of_our_own(datasets: Any, tmp_path: Path) -> None:
    root = grow(tmp_path / "Images", {"train": 2, "test": 1})  # names keep their capitals
    theirs = by_library(root, tmp_path / "cache")
    same_images(folder(root), theirs)
    images = build_stream(theirs, 2).train.with_transform(train_transform(theirs))
    labels = [labels for _, labels in loader(images, 4, shuffle=False, seed=0)]
    assert torch.cat(labels).bincount().tolist() == [2] * len(CLASSES)


def test_a_damaged_image_is_named_and_never_replaced_by_another(
    datasets: Any, tmp_path: Path
) -> None:
    grow(tmp_path / "tree", {"train": 2, "test": 1})
    sorted((tmp_path / "tree" / "train").rglob("*.png"))[3].write_text("text")
    theirs = by_library(tmp_path / "tree", tmp_path / "cache")
    images = theirs.build().load("train").images
    with pytest.raises(UnreadableImageError, match=f"3 of hfds/{tmp_path / 'tree'}"):
        images[3]
    assert images[4].mode == "RGB"
    with pytest.raises(ValueError, match="dev"):
        build_stream(by_library(tmp_path / "tree", tmp_path / "cache", test_split="dev"), 0)


@pytest.fixture
def table(datasets: Any, tmp_path: Path) -> Path:
    """Files of rows, whose columns have names of their own."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = grow(tmp_path / "tree", {"train": 2, "test": 1})
    (tmp_path / "table").mkdir()
    kinds = datasets.ClassLabel(names=CLASSES)
    features = datasets.Features({"img": datasets.Image(), "fine_label": kinds})
    for split in ("train", "test"):
        paths = sorted((root / split).rglob("*.png"))
        columns = {
            "img": [{"bytes": path.read_bytes(), "path": None} for path in paths],
            "fine_label": [CLASSES.index(path.parent.name) for path in paths],
        }
        rows = pyarrow.Table.from_pydict(columns, schema=features.arrow_schema)
        parquet.write_table(rows, tmp_path / "table" / f"{split}.parquet")
    return tmp_path / "table"


def test_columns_may_have_other_names(table: Path, tmp_path: Path) -> None:
    cache, columns = tmp_path / "cache", {"image_key": "img", "label_key": "fine_label"}
    same_images(folder(tmp_path / "tree"), by_library(table, cache, **columns))
    for key in columns:  # the other one is left out
        lost = "label" if key == "image_key" else "image"
        with pytest.raises(ValueError, match=rf"img, fine_label: .*data\.{lost}_key"):
            build_stream(by_library(table, cache, **{key: columns[key]}), 0)
