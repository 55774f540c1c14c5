"""Figures are whole PNG or SVG files that show the numbers, and leave nothing else behind."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from training.metrics import AccuracyMatrix
from training.plots import (
    Curve,
    Interval,
    Panel,
    accuracy_figure,
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


@pytest.mark.parametrize("tasks", [1, 5, 25])
def test_any_number_of_tasks(tmp_path: Path, tasks: int) -> None:
    path = accuracy_figure(decaying(tasks), tmp_path / "new" / "figure.png", title="A $run_{$")
    image = pixels(path)
    assert min(image.shape[:2]) > 400
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


def test_the_picture_depends_on_the_numbers_alone(tmp_path: Path) -> None:
    first = accuracy_figure(decaying(3), tmp_path / "a.png").read_bytes()
    assert accuracy_figure(decaying(3), tmp_path / "b.png").read_bytes() == first
    changed = AccuracyMatrix.from_dict({**decaying(3).to_dict(), "correct": [[1], [1, 1], [1] * 3]})
    assert accuracy_figure(changed, tmp_path / "c.png").read_bytes() != first


def test_labels_of_any_length(tmp_path: Path) -> None:
    labels = ["3, 7", "a name that is much longer than what fits", "$odd_{text$"]
    assert pixels(accuracy_figure(decaying(3), tmp_path / "a.png", task_labels=labels)).size


def drawn(seeds: list[list[float]], path: Path) -> bytes:
    """A figure of one curve."""
    panel = Panel(spread_curves({"a": seeds}), "tasks", "accuracy", ends=".1f")
    return line_figure([panel], path, title="A $title_{$").read_bytes()


def test_curves_have_colours_of_their_own(tmp_path: Path) -> None:
    curves = spread_curves({"LoDA": [[1.0, 0.9], [0.98, 0.8]], "frozen": [[0.9, 0.7]]})
    image = pixels(line_figure([Panel(curves, "x", "y", "Two $methods_{$")], tmp_path / "c.png"))
    colours = {tuple(c) for c in image.reshape(-1, 3).tolist()}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_an_svg_depends_on_the_numbers_alone(tmp_path: Path) -> None:
    first = drawn([[1.0, 0.9]], tmp_path / "a.svg")
    assert drawn([[1.0, 0.9]], tmp_path / "b.svg") == first
    assert drawn([[1.0, 0.8]], tmp_path / "c.svg") != first
    assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"


def test_mean_and_band_over_seeds() -> None:
    first, single = spread_curves({"a": [[0.5, 0.7], [0.7, 0.9]], "none": [], "b": [[0.4]]})
    assert first.label == "a (n = 2)"
    np.testing.assert_allclose(first.centre, [0.6, 0.8])
    np.testing.assert_allclose(np.subtract(first.high, first.low), [2 * np.sqrt(0.02)] * 2)
    # One value, of a method that learns all at once, stands at the end; colours stay put.
    assert (list(single.x), single.low, single.style) == ([2], [], 2)


def test_curves_differ_without_colour(tmp_path: Path) -> None:
    styles = [tuple(line_style(k)[key] for key in ("marker", "ls")) for k in range(36)]
    assert len(set(styles)) == 36
    curves = [
        Curve(f"a method with a rather long name {k}", [1, 2], [1, k + 1], style=k)
        for k in range(9)
    ]
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


def test_many_ends_leave_room_for_the_curves(tmp_path: Path) -> None:
    curves = spread_curves({f"method {k}": [[0.5, 0.4]] for k in range(30)})
    # A warning of the layout would be an error.
    line_figure([Panel(curves, "x", "y", ends=".1f")], tmp_path / "a.svg")


def test_intervals_of_several_series(tmp_path: Path) -> None:
    series = {
        "glyphs": {"frozen $x$": Interval(5.0, 4.0, 6.0), "joint": Interval(-2.0)},
        "cifar_vit": {"frozen $x$": Interval(3.0, 1.0, 5.0)},
    }
    image = pixels(interval_figure(series, tmp_path / "a.png", x="lead (points)"))
    colours = {tuple(c) for c in image.reshape(-1, 3).tolist()}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_a_heat_map_of_rows(tmp_path: Path) -> None:
    assert pixels(matrix_figure([[0.5], [0.4, 0.9]], tmp_path / "a.png")).size


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="at least one task"):
        accuracy_figure(AccuracyMatrix(), path)
    with pytest.raises(ValueError, match="got 1 for 2 tasks"):
        accuracy_figure(decaying(2), path, task_labels=["one"])
    with pytest.raises(ValueError, match=r"\.pdf"):
        accuracy_figure(decaying(2), tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="panel"):
        line_figure([Panel([], "x", "y")], path)
    with pytest.raises(ValueError, match=r"got \[1, 1\]"):
        matrix_figure([[0.5], [0.5]], path)
    with pytest.raises(ValueError, match="panel"):
        line_figure([], path)
    with pytest.raises(ValueError, match=r"got \[1, 2\]"):
        spread_curves({"a": [[1.0], [1.0, 0.5]]})
    with pytest.raises(ValueError, match="difference"):
        interval_figure({"a": {}}, path, x="x")
    assert not path.exists()


def test_matplotlib_is_imported_late() -> None:
    code = "import sys, training.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
