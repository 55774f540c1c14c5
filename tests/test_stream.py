"""Streams: the order of classes, the cut into tasks, validation, and the sources by name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_folders import CALTECH, CLASSES, colour, folder, grow, repaint

from training.data import DataConfig, build_stream, loader
from training.data import test_transform as evaluation_transform
from training.data.stream import cut_tasks

# --- the order of classes and the cut into tasks


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_tasks_cut_the_labels_in_order(count: int, first: int, increment: int) -> None:
    config = DataConfig(classes=count, init_cls=min(first, count), increment=increment)
    tasks = cut_tasks(config, 60)
    assert [label for task in tasks for label in task] == list(range(count))
    assert len(tasks[0]) == config.init_cls
    assert all(len(task) == increment for task in tasks[1:-1])
    assert len(tasks) == 1 or 1 <= len(tasks[-1]) <= increment


@given(st.integers(1, 200))
def test_tasks_are_equal_unless_they_are_chosen(count: int) -> None:
    sizes = [len(task) for task in cut_tasks(DataConfig(classes=count), 200)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 5 if count >= 10 else len(sizes) < 5
    assert min(sizes) >= 2 or count == 1


@pytest.mark.parametrize("settings", [{"init_cls": 3}, {"increment": 3}])
def test_one_size_of_tasks_stands_for_both(settings: dict[str, int]) -> None:
    tasks = cut_tasks(DataConfig(**settings), 10)  # type: ignore[arg-type]
    assert [len(task) for task in tasks] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"classes": 11}, "data.classes"),
        ({"init_cls": 11}, "data.init_cls"),
        ({"classes": 3, "init_cls": 4}, "data.init_cls"),
        ({"tasks": 6}, "data.tasks"),
        ({"tasks": 11, "increment": 1}, "data.tasks"),
    ],
)
def test_a_stream_that_asks_for_too_much_is_refused(settings: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_stream(DataConfig(**settings), 0)  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match="task_sizes"):
        build_stream(DataConfig(task_sizes=[6, 5]), 3)
    with pytest.raises(ValueError, match=r"data.tasks is 3.*2 tasks"):
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
    (tree / "test").rename(tree.with_name("elsewhere"))
    build_stream(folder(tree, validation=0.2), 0)
    with pytest.raises(FileNotFoundError, match="val"):
        build_stream(folder(tree, validation=0), 0)


def test_validation_holds_out_the_same_images_in_every_order(tree: Path) -> None:
    held = [
        {tuple(p[:, 0, 0].tolist()) for p, _ in build_stream(folder(tree, validation=0.4), s).test}
        for s in (0, 1)
    ]
    assert held[0] == held[1]


def test_validation_needs_two_images(tmp_path: Path) -> None:
    grow(tmp_path, {"train": 1, "test": 1})
    with pytest.raises(ValueError, match="ant, bee, cat, dog, eel have one"):
        build_stream(folder(tmp_path, validation=0.5, classes=5), 0)


# --- Caltech-101


def test_caltech_as_the_reference_used_it(shared: Path) -> None:
    settings = {"classes": 100, "init_cls": 10, "increment": 10, "tasks": 2}
    config = folder(shared / "data" / "caltech101", **settings, mean=0.5, std=0.5, **CALTECH)
    stream = build_stream(config, 1993)
    assert stream.order == np.random.RandomState(1993).permutation(101)[:20].tolist()
    assert len(stream.tasks) == 2
    test = stream.test.subset(stream.tasks[0]).with_transform(evaluation_transform(config))
    images, labels = next(iter(loader(test, 64, shuffle=False, seed=0)))
    assert images.shape[1:] == (3, 32, 32)
    assert -1 <= images.min() < images.max() <= 1
    assert labels.max() < 10


# --- what a stream holds


def test_the_fingerprint_is_that_of_the_data_wherever_they_lie(tree: Path) -> None:
    config = folder(tree, validation=0.2)
    repaint(tree / "train" / "ant" / "0.png", 1)
    before = build_stream(config, 0).fingerprint()
    assert build_stream(config, 0).fingerprint() == before
    moved = tree.rename(tree.with_name("moved"))
    assert build_stream(folder(moved, validation=0.2), 0).fingerprint() == before
    others = {build_stream(folder(moved, validation=0.4), 0).fingerprint()}
    others.add(build_stream(folder(moved, validation=0.2), 1).fingerprint())
    others.add(build_stream(folder(moved, validation=0.2, tasks=1), 0).fingerprint())
    path = moved / "train" / "ant" / "0.png"
    repaint(path, 2)
    others.add(build_stream(folder(moved, validation=0.2), 0).fingerprint())
    path.rename(path.with_name("a.png"))
    others.add(build_stream(folder(moved, validation=0.2), 0).fingerprint())
    assert len(others | {before}) == 6


# --- data sets of one's own


def own(**options: object) -> DataConfig:
    return DataConfig("own_components.Squares", dict(options), image_size=6, shuffle=False)


def test_a_data_set_of_ones_own_is_chosen_by_its_path() -> None:
    config = own(count=4)
    assert (config.side, config.mode) == (6, "L")
    stream = build_stream(config, 0)
    assert (stream.class_names, stream.tasks) == (["dark", "grey", "light"], [(0, 1, 2)])
    shades = {"dark": 10, "grey": 100, "light": 250}
    for images in (stream.train, stream.test):  # whose classes have other numbers
        assert torch.bincount(images.labels).tolist() == [4] * 3
        for pixels, label in images:
            assert (pixels == shades[stream.class_names[label]]).all()


@pytest.mark.parametrize("kind", ["pictures", "tensors"])
@pytest.mark.parametrize("cache", [True, False])
def test_images_may_come_one_by_one(kind: str, cache: bool) -> None:
    one, other = (
        build_stream(replace(own(kind=kind), resize=12, image_size=12, cache=cache), 0)
        for kind in ("array", kind)
    )
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(a, b, strict=True))


@pytest.mark.parametrize("cache", [True, False])
def test_images_of_one_size_are_kept_where_that_is_asked_for(cache: bool) -> None:
    config = replace(own(kind="pictures"), cache=cache)
    assert config.images.resize is None
    images = build_stream(config, 0).train.images
    first, again = images[0], images[0]
    assert (first.data_ptr() == again.data_ptr()) is cache


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("nothing", "load"),
        ("channels", "shape"),
        ("targets", "one class number"),
        ("shares", "one class number"),
        ("numbers", "class numbers from 0 to 2"),
        ("names", "differently"),
        ("empty", "no training image of white"),
        ("other", "test lacks grey and train lacks white"),
    ],
)
def test_mistakes_in_a_data_set_of_ones_own_are_named(spoil: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_stream(own(spoil=spoil), 0)
    with pytest.raises(TypeError, match="uint8"):
        build_stream(own(spoil="floats"), 0).train[0]


def test_options_of_ones_own_data_set_are_checked_as_any() -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        own(count=0)
    with pytest.raises(ValueError, match=r"data\.root"):
        own(root="x")


# --- a declared order, and extensions


def test_classes_may_be_declared_in_the_order_of_learning(tmp_path: Path) -> None:
    tree = grow(tmp_path, {"train": 3, "test": 2})
    order = [CLASSES[3], CLASSES[0], CLASSES[4]]
    for seed in (0, 1):
        stream = build_stream(folder(tree, class_order=order, task_sizes=[1, 2]), seed)
        assert (stream.class_names, stream.tasks) == (order, [(0,), (1, 2)])
        assert stream.order == [3, 0, 4]
        assert stream.train.labels.bincount().tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="fox"):
        build_stream(folder(tree, class_order=["fox"]), 0)


def extended(tmp_path: Path) -> DataConfig:
    """Ant and bee; then cat and new images of bee; then new images of ant and cat; then dog."""
    roots = [tmp_path / str(number) for number in range(4)]
    held = [["ant", "bee"], ["bee", "cat"], ["ant", "cat"], ["dog"]]
    for number, (root, classes) in enumerate(zip(roots, held, strict=True)):
        grow(root, {"train": 2 + number, "test": 1 + number}, classes, blue=number)
    return folder(
        roots[0],
        class_order=["bee", "ant", "cat", "dog"],
        task_sizes=[1, 1, 1, 1],
        extensions=[str(root) for root in roots[1:]],
        extension_tasks=[1, 0, 1],
    )


def test_extensions_bring_tasks_and_images_of_known_classes(tmp_path: Path) -> None:
    stream = build_stream(extended(tmp_path), 0)
    assert stream.tasks == [(0,), (1,), (2,), (3,)]
    assert stream.train.labels.bincount().tolist() == [2, 2, 3, 5]
    assert [x.first_task for x in stream.extensions] == [2, 3, 3]
    counts = [x.known.labels.bincount(minlength=4).tolist() for x in stream.extensions]
    assert counts == [[3, 0, 0, 0], [0, 4, 4, 0], [0, 0, 0, 0]]
    # What is evaluated after so many tasks and extensions.
    evaluated = {
        (1, 0): [1, 0, 0, 0],
        (2, 0): [1, 1, 0, 0],
        (2, 1): [3, 1, 0, 0],
        (3, 1): [3, 1, 2, 0],
        (3, 2): [3, 4, 5, 0],
        (4, 3): [3, 4, 5, 4],
    }
    for (tasks, extensions), expected in evaluated.items():
        images = stream.evaluated(tasks, extensions)
        assert images.labels.bincount(minlength=4).tolist() == expected
    for image, label in [*stream.train, *stream.test]:
        red = int(image[0, 0, 0])  # each class has its own colour, see image_folders
        assert stream.class_names[label] == CLASSES[(red - 10) // 40]


def test_no_image_counts_twice_by_another_path(tmp_path: Path) -> None:
    root = grow(tmp_path / "photos", {"train": 2, "test": 1}, ["ant", "bee"])
    (tmp_path / "link").symlink_to(root)
    settings = {"class_order": ["ant", "bee"], "task_sizes": [1, 1], "extension_tasks": [1]}
    for same in (root / ".." / "photos", tmp_path / "link"):
        stream = build_stream(folder(root, extensions=[str(same)], **settings), 0)
        assert stream.train.labels.bincount().tolist() == [2, 2]
        assert len(stream.extensions[0].known) == 0
        assert stream.test.labels.tolist() == [0, 1]


def test_the_fingerprint_covers_the_extensions(tmp_path: Path) -> None:
    config = extended(tmp_path)
    before = build_stream(config, 0).fingerprint()
    assert build_stream(config, 1).fingerprint() == before  # no seed matters
    repaint(tmp_path / "2" / "train" / "ant" / "0.png", 1)
    assert build_stream(config, 0).fingerprint() != before


def test_images_of_an_extended_stream_may_be_gone(tmp_path: Path) -> None:
    config = extended(tmp_path)
    for gone, counts, first in (("0", [0, 0, 3, 5], 0), ("1", [2, 2, 0, 5], 2)):
        (tmp_path / gone).rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}/{gone}"):
            build_stream(config, 0)
        stream = build_stream(config, 0, partial=True)
        assert stream.train.labels.bincount().tolist() == counts
        assert (len(stream.missing), stream.base) == (1, first)
        assert stream.tasks == [(0,), (1,), (2,), (3,)]
        (tmp_path / "away").rename(tmp_path / gone)


def test_floats_and_files_make_one_type(tmp_path: Path) -> None:
    grow(tmp_path, {"train": 2, "test": 2}, ["ant"])
    names = [str(number) for number in range(10)]
    config = DataConfig(
        class_order=[*names, "ant"],
        task_sizes=[10, 1],
        extensions=[str(tmp_path)],
        extension_tasks=[1],
    )
    stream = build_stream(config, 0)
    alone = build_stream(DataConfig(shuffle=False), 0)
    for mixed, digits in ((stream.train, alone.train), (stream.test, alone.test)):
        assert len(mixed) == len(digits) + 2
        assert torch.equal(mixed[0][0], digits[0][0])
        image, label = mixed[len(mixed) - 1]
        assert (image.dtype, tuple(image.shape), label) == (torch.float32, (1, 8, 8), 10)
        assert 0 <= float(image.min()) <= float(image.max()) <= 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"class_order": []}, "class_order"),
        ({"class_order": ["ant", "ant"]}, "class_order"),
        ({"extensions": ["x"]}, "extension_tasks"),
        ({"extensions": ["x"], "extension_tasks": [-1]}, "extension_tasks"),
        ({"extensions": ["x"], "extension_tasks": [1], "task_sizes": [2]}, "extension_tasks"),
        ({"extensions": ["x"], "extension_tasks": [1], "task_sizes": [2, 1]}, "class_order"),
        (
            {
                "extensions": ["x"],
                "extension_tasks": [1],
                "task_sizes": [1, 1],
                "class_order": ["a", "b"],
                "tasks": 1,
            },
            "data.tasks",
        ),
    ],
)
def test_extensions_need_a_declared_order(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DataConfig(**settings)  # type: ignore[arg-type]


def flat(root: Path, classes: list[str], count: int, *, blue: int = 7) -> Path:
    """Class folders without a split."""
    grow(root / "split", {"train": count}, classes, blue=blue)
    for name in classes:
        (root / "split" / "train" / name).rename(root / name)
    (root / "split" / "train").rmdir()
    (root / "split").rmdir()
    return root


def test_a_class_that_is_added_moves_no_image_from_one_split_to_the_other(tmp_path: Path) -> None:
    def evaluated() -> list[str]:
        stream = build_stream(folder(root, class_order=["bee", "dog"], task_sizes=[1, 1]), 0)
        files = stream.test.images.files()
        return [str(files[index]) for index in stream.test.indices]

    root = flat(tmp_path, ["bee", "dog"], 10)
    before = evaluated()
    assert len(before) == 4
    flat(root, ["ant", "cat"], 10)
    assert evaluated() == before


@pytest.mark.parametrize("split", [False, True])
def test_an_extension_is_evaluated_on_its_own_test_split_or_on_a_fifth(
    tmp_path: Path, split: bool
) -> None:
    base = flat(tmp_path / "base", ["ant"], 10)
    added = tmp_path / "added"
    if split:
        grow(added, {"train": 10, "test": 4}, ["bee"])
    else:
        flat(added, ["bee"], 10)
        flat(added, ["ant"], 1, blue=8)  # one new image of a known class is no reason to refuse
    config = folder(
        base,
        class_order=["ant", "bee"],
        task_sizes=[1, 1],
        extensions=[str(added)],
        extension_tasks=[1],
    )
    for chosen in (config, replace(config, validation=config.held_out)):  # as set, as recorded
        stream = build_stream(chosen, 0)
        assert stream.test.labels.bincount().tolist() == [2, 4 if split else 2]
        assert stream.train.labels.bincount().tolist() == [8, 10 if split else 8]
        assert len(stream.extensions[0].known) == int(not split)
