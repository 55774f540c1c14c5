"""The figures of a report: the numbers that they draw, as they also say them in words."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import fake_run
from read_reports import sections

from training.config import MethodConfig
from training.report.drawings import Drawing, drawings

AGES, AMONG = ("old", "new"), ("own", "seen")


def drawn(*sources: Path | str, **options: str) -> dict[str, Drawing]:
    (section,) = sections(*sources)
    return {drawing.name: drawing for drawing in drawings(section, **options)}


def panels(drawing: Drawing) -> list[Any]:
    """What a figure of panels hands to the drawing of curves."""
    found: list[Any] = drawing.draw.args[0]  # type: ignore[attr-defined]
    return found


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Three tasks of one class, two seeds each of LoDA and a baseline."""
    lasts = {"loda": (70, 40, 80), "seq_lora": (50, 60, 90)}
    for name, last in lasts.items():
        for seed in (0, 2):
            rows = ((90,), (80, 60), tuple(x + seed * (name == "loda") for x in last))
            fake_run(tmp_path / f"{name}{seed}", rows, seed=seed, method=MethodConfig(name))
    return tmp_path


def test_accuracy_relative_to_a_baseline_by_the_age_of_the_tasks(two: Path) -> None:
    figure = drawn(two)["relative"]
    # LoDA less the baseline, means of two seeds: (110 + 2 and 110) / 2, 80 and 90, all thirds.
    assert figure.alt.endswith(
        "At the end: on old tasks loda (n = 2) +1.00; on the new task loda (n = 2) −9.00; "
        "on all classes seen loda (n = 2) −2.33."
    )
    old, new, whole = panels(figure)
    assert (list(old.curves[0].x), list(new.curves[0].x)) == ([2, 3], [1, 2, 3])
    assert [round(x, 6) for x in whole.curves[0].centre[:2]] == [0, 0]
    assert "on old tasks seq_lora (n = 2) −1.00" in drawn(two, baseline="loda")["relative"].alt


def test_forgetting_is_the_best_accuracy_less_the_last(two: Path) -> None:
    figure = drawn(two)["forgetting"]
    # LoDA 90 - 71 and 60 - 41, the baseline 90 - 50 and 60 - 60.
    assert figure.alt.endswith("loda (n = 2) 19.0, seq_lora (n = 2) 20.0.")
    (panel,) = panels(figure)
    assert [round(x, 6) for x in panel.curves[1].centre] == [40, 0]


def test_matrices_and_costs_are_means_over_seeds(two: Path) -> None:
    figures = drawn(two)
    assert figures["matrix-loda"].alt.endswith("Last row, by task: 71, 41, 81 per cent.")
    time, memory = panels(figures["costs"])
    assert (time.y, memory.y) == ("time (s)", "peak memory (MiB)")
    assert list(time.curves[0].centre) == [3, 4, 5]
    assert list(memory.curves[0].centre) == [300, 301, 302]


def measures(scale: float) -> dict[str, float]:
    names = (f"{age}_{what}" for age in ("new", "old") for what in ("energy", "magnitude"))
    return {"ratio": scale} | {name: scale * k for k, name in enumerate(names, 1)}


@pytest.fixture
def analysed(tmp_path: Path) -> Path:
    """A run with two tasks analysed, in which every number is another one."""
    scales = {"null": 1.0, "general": 10.0, "isolated": 100.0}
    subspaces = [
        {
            "task": task,
            "layers": {
                f"blocks.{k}": {n: measures(s * (1 + k + 4 * task)) for n, s in scales.items()}
                for k in range(2)
            },
        }
        for task in (1, 2)
    ]
    curves = {
        a: {g: [10.0 * i + j, 20.0 * i + j] for j, g in enumerate(AGES)}
        for i, a in enumerate(AMONG)
    }
    marks = {
        mark: {
            "step": step,
            **{a: {g: step + 2 * i + j for j, g in enumerate(AGES)} for i, a in enumerate(AMONG)},
        }
        for mark, step in (("recalibrated", 0.5), ("merged", 0.25))
    }
    losses = [{"task": 1, "step": [0.0, 1.5], **curves, "marks": marks}]
    run = fake_run(tmp_path / "run", ((90,), (60, 80), (60, 80, 70)))
    content = {"subspaces": subspaces, "losses": losses}
    (run / "analysis.json").write_text(json.dumps(content), "utf-8")
    return run


def test_energies_are_drawn_by_layer_and_branch(analysed: Path) -> None:
    figures = drawn(analysed)
    null, isolated = panels(figures["ratio-loda"])[0].curves
    assert (null.label, isolated.label) == (
        "null space of the old tasks",
        "isolated subspace of LoDA",
    )
    assert (null.centre, null.low, null.high) == ([7, 8], [5, 6], [9, 10])  # medians of two tasks
    assert isolated.centre == [700, 800]
    magnitude, energy = panels(figures["energy-loda"])
    first = {c.label: c.centre[0] for c in energy.curves}
    assert first == {
        "general, new task inputs": 70,
        "general, old task inputs": 3 * 70,
        "isolated, new task inputs": 700,
        "isolated, old task inputs": 3 * 700,
    }
    assert [c.centre[0] for c in magnitude.curves] == [2 * 70, 4 * 70, 2 * 700, 4 * 700]


def test_losses_are_drawn_along_the_step_with_their_marks(analysed: Path) -> None:
    own, seen = panels(drawn(analysed)["loss-loda-task2"])
    for place, panel in enumerate((own, seen)):
        lines = {c.label: c for c in panel.curves if c.line}
        assert lines["old tasks"].centre == [10 * place, 20 * place]
        assert lines["new task"].centre == [10 * place + 1, 20 * place + 1]
        assert list(lines["new task"].x) == [0.0, 1.5]
        marks = [(c.label, c.x, c.centre) for c in panel.curves if not c.line]
        assert marks == [
            ("recalibrated", [0.5], [0.5 + 2 * place]),
            ("recalibrated", [0.5], [0.5 + 2 * place + 1]),
            ("merged, both branches", [0.25], [0.25 + 2 * place]),
            ("merged, both branches", [0.25], [0.25 + 2 * place + 1]),
        ]
