"""The figures of a report: the numbers that they draw, as they also say them in words."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import AGES, analysis, changed_json, fake_run, measures, moves, sections

from training import cli
from training.config import BackboneConfig, MethodConfig, TrainConfig
from training.report.figures import Drawing, drawings, side_drawings


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
        "At the end: on old tasks loda +1.00; on the new task loda −9.00; "
        "on all classes seen loda −2.33."
    )
    old, new, whole = panels(figure)
    assert (list(old.curves[0].x), list(new.curves[0].x)) == ([2, 3], [1, 2, 3])
    assert [round(x, 6) for x in whole.curves[0].centre[:2]] == [0, 0]
    assert "on old tasks seq_lora −1.00" in drawn(two, baseline="loda")["relative"].alt


def test_forgetting_is_the_best_accuracy_less_the_last(two: Path) -> None:
    figure = drawn(two)["forgetting"]
    # LoDA 90 - 71 and 60 - 41, the baseline 90 - 50 and 60 - 60.
    assert figure.alt.endswith("loda 19.0, seq_lora 20.0.")
    (panel,) = panels(figure)
    assert [round(x, 6) for x in panel.curves[1].centre] == [40, 0]


def test_matrices_and_costs_are_means_over_seeds(two: Path) -> None:
    figures = drawn(two)
    assert figures["matrix-loda"].alt.endswith("Last row, by task: 71, 41, 81 per cent.")
    time, memory = panels(figures["costs"])
    assert (time.y, memory.y) == ("time (s)", "peak memory (MiB)")
    assert list(time.curves[0].centre) == [3, 4, 5]
    assert list(memory.curves[0].centre) == [300, 301, 302]


def test_leads_are_drawn_with_their_intervals(two: Path) -> None:
    figure = drawn(two)["lead"]
    # (70 + 40 + 80) / 3 or 2 more, less (50 + 60 + 90) / 3.
    assert figure.alt == "Points with intervals. loda over seq_lora −2.33 [−15.04, +10.37]."
    point = figure.draw.args[0]["loda"].loc["seq_lora"]  # type: ignore[attr-defined]
    assert tuple(point) == pytest.approx((-2.3333, -15.0395, 10.3729, 2), abs=1e-3)


def test_accuracy_by_rate_and_by_the_update_that_it_makes(tmp_path: Path) -> None:
    for rate, last in ((0.01, (60, 79)), (0.1, (60, 80)), (1.0, (60, 78)), (9.0, (2, 4))):
        run = fake_run(tmp_path / str(rate), ((90,), last), train=TrainConfig(lr=rate))
        moves(run, rate / 2)
    fake_run(tmp_path / "frozen", method=MethodConfig("frozen"))
    figures = drawn(tmp_path)
    by_rate, by_update = panels(figures["rates"])
    (line,), (moved,) = by_rate.curves, by_update.curves
    assert (line.x, line.centre) == ([0.01, 0.1, 1.0, 9.0], pytest.approx([69.5, 70, 69, 3]))
    assert (moved.x, moved.centre) == (pytest.approx([0.5, 5, 50, 450]), line.centre)
    assert by_rate.reference == pytest.approx(70)
    plane, frozen = panels(figures["plane"])[0].curves
    # Without the rate that lost nearly everything; a ring at the best one.
    assert plane.x == pytest.approx([84.5, 85, 84])
    assert plane.centre == pytest.approx([30, 30, 30])
    assert plane.ringed == 1
    assert frozen.label == "frozen"
    assert len(frozen.x) == 1
    assert "rates" not in drawn(tmp_path / "0.1", tmp_path / "1.0")


def test_leads_of_several_backbones_are_drawn_together(tmp_path: Path) -> None:
    for backbone in ("glyphs", "cifar_vit"):
        for name, last in (("loda", 75), ("frozen", 70)):
            settings = {"backbone": BackboneConfig(backbone), "method": MethodConfig(name)}
            fake_run(tmp_path / backbone / name, ((90,), (last, last)), **settings)
    (figure,) = side_drawings(sections(tmp_path / "glyphs", tmp_path / "cifar_vit"))
    assert figure.alt.count("over frozen +5.00") == 2
    assert list(figure.draw.args[0]) == ["glyphs (loda)", "cifar_vit (loda)"]  # type: ignore[attr-defined]


def test_a_run_that_measured_only_some_tasks_is_left_out_of_its_curve(tmp_path: Path) -> None:
    # One run went on without its GPU after the first task.
    for seed, tasks in ((1, 2), (2, 1)):
        log = fake_run(tmp_path / str(seed), seed=seed) / "metrics.jsonl"
        events = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        for event in [e for e in events if e["event"] == "task"][:tasks]:
            event["memory"]["device"] = 5 * 2**20
        log.write_text("".join(json.dumps(event) + "\n" for event in events), "utf-8")
    *_, device = panels(drawn(tmp_path)["costs"])
    assert device.y == "peak GPU memory (MiB)"
    assert [(curve.label, list(curve.centre)) for curve in device.curves] == [("loda", [5, 5])]


@pytest.fixture
def analysed(tmp_path: Path) -> Path:
    """A run with two tasks analysed, in which every number is another one."""
    run = fake_run(tmp_path / "run", ((90,), (60, 80), (60, 80, 70)))
    changed_json(run / "analysis.json", **analysis())
    return run


def test_energies_are_drawn_by_layer_and_branch(analysed: Path) -> None:
    figures = drawn(analysed)
    null, isolated = panels(figures["ratio-loda"])[0].curves
    assert null.label == "null space of the old tasks"
    assert isolated.label == "isolated subspace of LoDA"
    assert (null.centre, null.low, null.high) == ([7, 8], [5, 6], [9, 10])  # medians of two tasks
    assert isolated.centre == [700, 800]
    magnitude, energy = panels(figures["energy-loda"])
    assert {c.label: c.centre[0] for c in energy.curves} == {
        f"{branch}, {age} task inputs": factor * scale
        for branch, scale in (("general", 70), ("isolated", 700))
        for age, factor in (("new", 1), ("old", 3))
    }
    assert [c.centre[0] for c in magnitude.curves] == [2 * 70, 4 * 70, 2 * 700, 4 * 700]


def test_losses_are_drawn_along_the_step_with_their_marks(analysed: Path) -> None:
    own, seen = panels(drawn(analysed)["loss-loda-task2"])
    for place, panel in enumerate((own, seen)):
        lines = {c.label: c for c in panel.curves if c.joined}
        assert lines["old tasks"].centre == [10 * place, 20 * place]
        assert lines["new task"].centre == [10 * place + 1, 20 * place + 1]
        assert list(lines["new task"].x) == [0.0, 1.5]
        marks = [(c.label, c.x, c.centre) for c in panel.curves if not c.joined]
        assert marks == [
            (label, [step], [step + 2 * place + age])
            for label, step in (("recalibrated", 0.5), ("merged, both branches", 0.25))
            for age in (0, 1)
        ]


def test_layers_without_a_ratio_are_left_out_and_it_is_said(analysed: Path) -> None:
    content = json.loads((analysed / "analysis.json").read_text("utf-8"))
    assert "Left out" not in drawn(analysed)["ratio-loda"].caption
    for task in content["subspaces"]:
        task["layers"]["blocks.0"]["null"]["ratio"] = None
    changed_json(analysed / "analysis.json", **content)
    figure = drawn(analysed)["ratio-loda"]
    assert "Left out" in figure.caption
    null, isolated = panels(figure)[0].curves
    assert (null.x, isolated.x) == ([2], [1, 2])
    infinite = measures(1.0) | {"ratio": None}  # all of them: no figure
    layers = {"qkv": {"null": infinite, "general": infinite}}
    changed_json(analysed / "analysis.json", subspaces=[{"layers": layers}])
    assert {"ratio-loda", "energy-loda"} & {*drawn(analysed)} == {"energy-loda"}


def test_a_figure_says_which_runs_it_leaves_out(tmp_path: Path) -> None:
    for seed, steps in ((1, [0.0, 1.0]), (2, [0.0, 1.0]), (3, [0.0, 0.5, 1.0])):
        curves = {age: [1.0 for _ in steps] for age in AGES}
        losses = [{"task": 2, "step": steps, "own": curves, "seen": curves, "marks": {}}]
        run = fake_run(tmp_path / str(seed), seed=seed)
        changed_json(run / "analysis.json", losses=losses)
    figure = drawn(tmp_path)["loss-loda-task2"]
    assert "1 analysed at other steps" in figure.caption


def test_a_figure_on_its_own(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = two / "figure.svg"
    assert cli.main(["report", str(two), "--figure", str(out)]) == 0
    assert "Accuracy" in capsys.readouterr().out  # the tables are printed all the same
    assert "Accuracy over all classes seen" in out.read_text("utf-8")
