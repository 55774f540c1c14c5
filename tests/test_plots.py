"""Figures are whole PNG, SVG or PDF files that show the numbers, and leave nothing else behind."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from training.metrics import AccuracyMatrix
from training.plots import (
    Curve,
    Panel,
    accuracy_figure,
    confusion_figure,
    interval_figure,
    line_figure,
    line_style,
    matrix_figure,
    spread_curves,
)


def decaying(tasks: int) -> AccuracyMatrix:
    matrix = AccuracyMatrix()
    for i in range(tasks):
        matrix = matrix.extended(
            1, [max(0, 50 - 2 * (i - j)) for j in range(i + 1)], [50] * (i + 1)
        )
    return matrix


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def colours(path: Path) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(pixels(path).reshape(-1, 3), axis=0).tolist()}


BLUE, RED = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


@pytest.mark.parametrize("classes", [2, 20, 150])
def test_confusions_of_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    right = np.eye(classes, dtype=int) * 10
    names = [f"class ${number}" for number in range(classes)]
    ends = []
    for place, wrong in ((1, 0), (1, 5), (classes - 1, 5)):
        confusion = right.copy()
        confusion[0, place] += wrong
        path = confusion_figure(confusion, names, tmp_path / "c.png", starts=[0, classes // 2])
        image = pixels(path)
        assert min(image.shape[:2]) > 400
        ends.append(image.tobytes())
    assert len(set(ends)) == (3 if classes > 2 else 2)


def test_confusions_of_no_images_or_of_other_classes_are_refused(tmp_path: Path) -> None:
    confusion_figure(np.diag([1, 0]), ["a", "b"], tmp_path / "c.png")  # one class has images
    for confusion in (np.diag([0, 0]), np.eye(3, dtype=int)):
        with pytest.raises(ValueError, match="2 classes"):
            confusion_figure(confusion, ["a", "b"], tmp_path / "c.png")


@pytest.mark.parametrize("tasks", [1, 5, 25])
def test_any_number_of_tasks(tmp_path: Path, tasks: int) -> None:
    path = accuracy_figure(decaying(tasks), tmp_path / "new" / "figure.png", title="A $run_{$")
    assert min(pixels(path).shape[:2]) > 400
    assert len(colours(path)) > 20
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_figure_depends_on_the_numbers_alone(tmp_path: Path, kind: str) -> None:
    changed = AccuracyMatrix.from_dict({**decaying(3).to_dict(), "correct": [[1], [1, 1], [1] * 3]})
    first, again, other = (
        accuracy_figure(matrix, tmp_path / f"{name}.{kind}", title="A $title_{$").read_bytes()
        for name, matrix in {"a": decaying(3), "b": decaying(3), "c": changed}.items()
    )
    assert again == first != other
    if kind == "svg":
        assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"


def test_curves_have_colours_of_their_own(tmp_path: Path) -> None:
    curves = spread_curves({"LoDA": [[1.0, 0.9], [0.98, 0.8]], "frozen": [[0.9, 0.7]]})
    panel = Panel(curves, "x", "y", "Two $methods_{$")
    assert {BLUE, RED} <= colours(line_figure([panel], tmp_path / "c.png"))


def test_mean_and_band_over_seeds() -> None:
    first, single = spread_curves({"a": [[0.5, 0.7], [0.7, 0.9]], "none": [], "b": [[0.4]]})
    assert first.label == "a"
    np.testing.assert_allclose(first.centre, [0.6, 0.8])
    np.testing.assert_allclose(np.subtract(first.high, first.low), [2 * np.sqrt(0.02)] * 2)
    # One value, of a method that learns all at once, stands at the end; colours stay put.
    assert (list(single.x), single.low, single.style) == ([2], [], 2)


def test_curves_differ_without_colour(tmp_path: Path) -> None:
    styles = [tuple(line_style(k)[key] for key in ("marker", "ls")) for k in range(36)]
    assert len(set(styles)) == 36
    name = "a method with a rather long name"
    curves = [Curve(f"{name} {k}", [1, 2], [1, k + 1], style=k) for k in range(9)]
    image = pixels(line_figure([Panel(curves, "x", "y", log=True)] * 2, tmp_path / "a.png"))
    assert image.shape[0] > image.shape[1]  # panels one above the other


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = accuracy_figure(decaying(2), tmp_path / "a.png")
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        msg = "disk full"
        raise OSError(msg)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        accuracy_figure(decaying(3), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_more_bands_than_can_be_read_are_bars_beside_the_ends(tmp_path: Path) -> None:
    def drawn(count: int) -> np.ndarray:
        curves = spread_curves(
            {f"m{k}": [[0.1 * k, 0.1 * k], [0.1 * k + 0.5] * 2] for k in range(count)}
        )
        return pixels(line_figure([Panel(curves, "x", "y")], tmp_path / f"{count}.png"))

    # What is neither white nor ink is a band: four would cover most of the axes, one does not.
    few, many = ((drawn(count) != 255).any(axis=2).mean() for count in (3, 4))
    assert many < few


def test_many_ends_leave_room_for_the_curves(tmp_path: Path) -> None:
    curves = spread_curves({f"method {k}": [[0.5, 0.4]] for k in range(30)})
    # A warning of the layout would be an error.
    line_figure([Panel(curves, "x", "y", ends=True)], tmp_path / "a.svg")


def test_intervals_of_several_series(tmp_path: Path) -> None:
    columns = ["lead", "low", "high"]
    one = {"frozen $x$": (5.0, 4.0, 6.0), "joint": (-2.0, np.nan, np.nan)}
    series = {
        name: pd.DataFrame.from_dict(values, orient="index", columns=columns)
        for name, values in {"glyphs": one, "cifar_vit": {"frozen $x$": (3.0, 1.0, 5.0)}}.items()
    }
    path = interval_figure(series, tmp_path / "a.png", x="lead (points)")
    assert {BLUE, RED} <= colours(path)


def test_a_heat_map_of_rows(tmp_path: Path) -> None:
    assert pixels(matrix_figure([[0.5], [0.4, 0.9]], tmp_path / "a.png")).size


@pytest.mark.parametrize(
    ("draw", "word"),
    [
        (lambda path: accuracy_figure(AccuracyMatrix(), path), "at least one task"),
        (lambda path: accuracy_figure(decaying(2), path.with_suffix(".gif")), r"\.gif"),
        (lambda path: line_figure([Panel([], "x", "y")], path), "panel"),
        (lambda path: line_figure([], path), "panel"),
        (lambda path: matrix_figure([[0.5], [0.5]], path), r"got \[1, 1\]"),
        (lambda _: spread_curves({"a": [[1.0], [1.0, 0.5]]}), r"got \[1, 2\]"),
        (lambda path: interval_figure({"a": pd.DataFrame()}, path, x="x"), "difference"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path, draw: Callable[[Path], object], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        draw(tmp_path / "a.png")
    assert not [*tmp_path.iterdir()]


def test_matplotlib_is_imported_late() -> None:
    code = "import sys, training.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
