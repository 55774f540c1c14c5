"""Looking through a folder of images: what is counted, what is found, and what the command says."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_folders import CLASSES, folder, grow
from PIL import Image
from small_runs import changed, tiny

from training import cli
from training.data import build_stream, check_data, verify_data
from training.train import prepare


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Noise, so that no two images are the same."""
    root = grow(tmp_path / "tree", {"train": 3, "test": 2})
    rng = np.random.default_rng(0)
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        size = (10 + number % 3, 20, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
    return root


def test_a_sound_folder_is_counted(tree: Path) -> None:
    report = check_data(tree)
    train, test = report.splits
    assert (train.name, train.images, test.name, test.images) == ("train", 15, "test", 10)
    assert train.classes == dict.fromkeys(CLASSES, 3)
    assert {width for width, _ in train.sizes} == {20}
    assert {height for _, height in train.sizes} == {10, 11, 12}
    assert report.passed
    first, second, *_ = str(report).splitlines()
    columns = ["split", "classes", "images", "per class", "width", "height", "unreadable", "twice"]
    assert first.split() == " ".join([*columns, "ignored", "loops"]).split()
    expected = ["train", "5", "15", "3/3/3", "20/20/20", "10/11/12", "0", "0", "0", "0"]
    assert second.split() == expected


def test_files_that_are_not_read_and_links_in_circles_are_counted(tree: Path) -> None:
    for name in ("a.txt", "b.TXT", "notes", ".hidden"):
        (tree / "train" / "ant" / name).write_text("x")
    (tree / "train" / "beside.png").write_text("x")
    (tree / "train" / "ant" / ".ipynb_checkpoints").mkdir()
    shutil.copy(tree / "train" / "ant" / "0.png", tree / "train" / "ant" / ".ipynb_checkpoints")
    (tree / "train" / "ant" / "more").mkdir()
    (tree / "train" / "ant" / "more" / "up").symlink_to(tree / "train" / "ant")
    (tree / "train" / "all").symlink_to(tree)
    # A link to another folder is no circle: its images are read.
    (tree.parent / "elsewhere").mkdir()
    shutil.copy(tree / "train" / "ant" / "0.png", tree.parent / "elsewhere")
    (tree / "train" / "ant" / "linked").symlink_to(tree.parent / "elsewhere")
    report = check_data(tree)
    train, test = report.splits
    assert report.passed
    assert (train.images, train.classes["ant"], set(train.classes)) == (16, 4, set(CLASSES))
    assert len(train.ignored) == 4
    assert {path.name for path in train.loops} == {"up", "all"}
    assert (test.ignored, test.loops) == ((), ())
    lines = str(report).splitlines()
    assert lines[1].split()[-2:] == ["4", "2"]
    assert lines[2].split()[-2:] == ["0", "0"]
    assert f"train: ignored .png 1, .txt 2, no extension 1, such as {tree}/train/" in lines[4]
    # A training reads the same.
    names, labels = list(train.classes), build_stream(folder(tree, shuffle=False), 0).train.labels
    assert dict(zip(names, labels.bincount().tolist(), strict=True)) == train.classes


def test_numbers_of_workers_are_checked(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in ("0", "-1"):
        assert cli.main(["data", "check", str(tree), "--workers", number]) == 2
        assert f"workers must be from 1 to 1024, got {number}" in capsys.readouterr().err


def test_val_serves_as_test_and_the_camera_turns_images(tree: Path) -> None:
    (tree / "test").rename(tree / "val")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 40)).save(tree / "val" / "ant" / "0.png", exif=exif)
    report = check_data(tree)
    assert report.splits[1].name == "val"
    assert (40, 30) in report.splits[1].sizes


def truncate(tree: Path) -> None:
    path = tree / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:-40])


def no_image(tree: Path) -> None:
    (tree / "train" / "dog" / "1.png").write_text("text")


def again(tree: Path, name: str, mode: str) -> None:
    """Save a training image among the evaluation images."""
    with Image.open(tree / "train" / "cat" / "0.png") as image:
        image.convert(mode).save(tree / "test" / "bee" / name)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tree: None, "a training would start"),
        (truncate, "cannot read the image {root}/test/dog/1.png: "),
        (no_image, "cannot read the image {root}/train/dog/1.png: "),
        (
            lambda tree: again(tree, "again.bmp", "RGB"),
            "{root}/test/bee/again.bmp has the same pixels as {root}/train/cat/0.png",
        ),
        (
            lambda tree: again(tree, "again.png", "RGBA"),
            "{root}/test/bee/again.png has the same pixels as {root}/train/cat/0.png",
        ),
        (lambda tree: shutil.rmtree(tree / "test"), "train  5        15      3/3/3"),
        (lambda tree: (tree / "train" / "fox").mkdir(), "no images for fox"),
        (lambda tree: shutil.rmtree(tree / "test" / "eel"), "test lacks the classes eel"),
        (lambda tree: shutil.rmtree(tree / "train"), "no folder train"),
        (lambda tree: (tree / "train").rename(tree / "cat"), "no folder train"),
        (lambda tree: damage(tree, "train", "dog"), "no image that can be read of dog"),
        (lambda tree: damage(tree, "test", "dog"), "no image that can be read of dog"),
        (lambda tree: one_image(tree, split=True), "a training would start"),
        (lambda tree: one_image(tree, split=False), "ant: a class needs two images"),
        (lambda tree: nest(tree), "two levels deep"),
        (lambda tree: again(tree, "../../more/x.png", "RGB"), "beside it: more"),
    ],
)
def test_the_status_is_1_exactly_where_a_training_would_refuse(
    tree: Path, spoil: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "more").mkdir()
    spoil(tree)
    try:
        build_stream(folder(tree), 0)
        refused = 0
    except (ValueError, OSError):
        refused = 1
    assert cli.main(["data", "check", str(tree), "--workers", "2"]) == refused
    printed = capsys.readouterr()
    assert printed.err == ""
    assert said.format(root=tree) in printed.out
    verdict = printed.out.splitlines()[-1]
    assert ("would refuse" in verdict, "would start" in verdict) == (refused == 1, refused == 0)


def damage(tree: Path, split: str, name: str) -> None:
    """Leave no sound image in a class folder."""
    for path in (tree / split / name).iterdir():
        path.write_text("text")


def one_image(tree: Path, *, split: bool) -> None:
    """Leave one training image of a class, in a folder with or without a test split."""
    for path in sorted((tree / "train" / "ant").iterdir())[1:]:
        path.unlink()
    if not split:
        shutil.rmtree(tree / "test")


def nest(tree: Path) -> None:
    """Put all class folders one level deeper, without a split."""
    shutil.rmtree(tree / "test")
    (tree / "train").rename(tree / "photos")


def test_without_a_test_split_the_images_are_one_split(tree: Path) -> None:
    shutil.rmtree(tree / "test")
    shutil.copy(tree / "train" / "cat" / "0.png", tree / "train" / "cat" / "copy.png")
    for path in (tree / "train").iterdir():
        path.rename(tree / path.name)
    (tree / "train").rmdir()
    report = check_data(tree)
    assert [(split.name, split.images) for split in report.splits] == [("all", 16)]
    assert [(a.name, b.name) for a, b in report.duplicates] == [("0.png", "copy.png")]
    assert report.passed
    with pytest.raises(ValueError, match="same pixels"):
        verify_data(folder(tree))


def test_a_folder_without_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    assert "expected ROOT/CLASS/IMAGE" in capsys.readouterr().out
    assert cli.main(["data", "check", str(tmp_path / "none")]) == 2


def test_long_lists_of_problems_are_cut(tree: Path) -> None:
    for path in (tree / "train").rglob("*.png"):
        path.write_text("text")
    lines = str(check_data(tree)).splitlines()
    assert lines[-2] == "and 6 more"  # of 15 images and the classes without any
    assert lines[1].split()[-6:] == ["-", "-", "15", "0", "0", "0"]


def test_a_run_can_ask_for_the_check(tree: Path, tmp_path: Path) -> None:
    experiment = tiny(tree, tmp_path / "run", data={"verify": True})
    prepare(experiment).folder.close()
    truncate(tree)
    with pytest.raises(ValueError, match=r"dog.1\.png"):
        prepare(changed(experiment, out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_on_held_out_images_the_test_split_is_not_opened(tree: Path) -> None:
    truncate(tree)
    verify_data(folder(tree, validation=0.3))
    no_image(tree)
    with pytest.raises(ValueError, match=r"train.dog.1\.png"):
        verify_data(folder(tree, validation=0.3))
