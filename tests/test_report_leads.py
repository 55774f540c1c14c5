"""Methods side by side, and the lead of one over another, paired by seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake_runs import fake_run
from read_reports import sections, table, texts
from scipy import stats

from training.config import BackboneConfig, MethodConfig
from training.report import Report, paired, report_tables, spread
from training.report.side import side_drawings


def test_other_data_and_backbones_are_other_sections(tmp_path: Path) -> None:
    for backbone in ("glyphs", "cifar_vit"):
        for name, gain in (("loda", 10), ("frozen", 0)):
            for seed in (1, 2):
                rows = ((90,), (60 + gain + seed, 70 + gain))
                settings = {"seed": seed, "method": MethodConfig(name)}
                folder = tmp_path / backbone / f"{name}{seed}"
                fake_run(folder, rows, backbone=BackboneConfig(backbone), **settings)
    found = sections(tmp_path / "glyphs", tmp_path / "cifar_vit")
    titles = ["digits, 2 tasks, glyphs", "digits, 2 tasks, cifar_vit"]
    assert [section.title for section in found] == titles
    assert [list(section.groups) for section in found] == [["frozen", "loda"]] * 2
    accuracy, lead = Report.over([tmp_path / "glyphs", tmp_path / "cifar_vit"]).overview()
    assert accuracy.title == "Side by side: last accuracy, read-out alignment (%)"
    assert accuracy.header == ["method", "glyphs", "cifar_vit"]
    assert texts(accuracy)[1] == ["loda", "75.75 ± 0.35", "75.75 ± 0.35"]
    assert lead.header == ["over", "glyphs", "cifar_vit", "change"]
    same = "+10.00 [+10.00, +10.00] (2)"
    assert texts(lead) == [["frozen", same, same, "+0.00 [+0.00, +0.00] (2)"]]


def test_differences_are_paired_within_one_backbone(tmp_path: Path) -> None:
    # LoDA's seeds with one backbone, the frozen runs' with the other: no pair but seed 3's.
    for backbone, name, seeds in (
        ("glyphs", "loda", (1, 3)),
        ("glyphs", "frozen", (2, 3)),
        ("cifar_vit", "loda", (2,)),
        ("cifar_vit", "frozen", (1, 2)),
    ):
        for seed in seeds:
            gain = 5 * (name == "loda") + (backbone == "glyphs")
            rows = ((90,), (50 + 10 * seed + gain, 50 + 10 * seed + gain))
            settings = {"seed": seed, "method": MethodConfig(name)}
            folder = tmp_path / backbone / f"{name}{seed}"
            fake_run(folder, rows, backbone=BackboneConfig(backbone), **settings)
    report = Report.over([tmp_path / "glyphs", tmp_path / "cifar_vit"])
    _, lead = report.overview()
    assert texts(lead) == [["frozen", "+5.00 (1)", "+5.00 (1)"]]  # no seed has all four: no change
    (drawing,) = side_drawings(report.sections)
    assert drawing.alt.count("over frozen +5.00") == 2
    path = drawing.draw(tmp_path / "a.svg")
    assert path.stat().st_size > 1000


def test_how_a_lead_moves_is_paired_by_seed(tmp_path: Path) -> None:
    lasts = {
        ("glyphs", "loda"): (70, 72, 75),
        ("glyphs", "frozen"): (60, 65, 63),
        ("cifar_vit", "loda"): (90, 88, 91),
        ("cifar_vit", "frozen"): (70, 73, 70),
    }
    for (backbone, name), values in lasts.items():
        for seed, last in enumerate(values):
            settings = {"backbone": BackboneConfig(backbone), "method": MethodConfig(name)}
            folder = tmp_path / backbone / f"{name}{seed}"
            fake_run(folder, ((90,), (last, last)), seed=seed, **settings)
    _, lead = Report.over([tmp_path / "glyphs", tmp_path / "cifar_vit"]).overview()
    glyphs, cifar = (
        np.subtract(lasts[backbone, "loda"], lasts[backbone, "frozen"])
        for backbone in ("glyphs", "cifar_vit")
    )
    low, high = stats.ttest_rel(cifar, glyphs).confidence_interval(0.95)
    expected = f"{(cifar - glyphs).mean():+.2f} [{low:+.2f}, {high:+.2f}] (3)".replace("-", "−")
    assert texts(lead)[0][-1] == expected
    assert lead.note.endswith(
        "Change: the lead with cifar_vit less that with glyphs, seed by seed."
    )


def test_leads_are_paired_by_seed(tmp_path: Path) -> None:
    lasts = {"loda": {1: 70, 2: 80, 3: 90, 4: 10}, "frozen": {1: 60, 2: 76, 3: 70, 5: 99}}
    for name, by_seed in lasts.items():
        for seed, last in by_seed.items():
            rows = ((90,), (last, last))
            fake_run(tmp_path / f"{name}{seed}", rows, seed=seed, method=MethodConfig(name))
    (section,) = sections(tmp_path)
    ((over, last, *_, pairs),) = texts(table(section, "Lead of loda"))
    low, high = stats.ttest_rel([70, 80, 90], [60, 76, 70]).confidence_interval(0.95)
    assert over == "frozen"
    assert last == f"+11.33 [{low:+.2f}, {high:+.2f}]".replace("-", "−")
    assert pairs == "3"
    ((over, last, *_),) = texts(table(section, "Lead of frozen", "frozen"))
    assert (over, last[:6]) == ("loda", "−11.33")


def test_other_class_orders_make_no_pair(tmp_path: Path) -> None:
    for name, order in (("loda", ["a", "b"]), ("frozen", ["b", "a"])):
        folder = fake_run(tmp_path / name, method=MethodConfig(name))
        classes = {"class_names": order, "order": [0, 1], "tasks": [[0], [1]]}
        (folder / "classes.json").write_text(json.dumps(classes))
    (section,) = sections(tmp_path)
    assert not [t for t in report_tables(section) if t.title.startswith("Lead")]


@pytest.mark.parametrize("count", [2, 5])
def test_the_interval_is_that_of_scipy(count: int) -> None:
    rng = np.random.default_rng(count)
    ours, theirs = rng.normal(size=(2, count))
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert found is not None
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), expected)
    np.testing.assert_allclose(spread(list(ours)).deviation, ours.std(ddof=1))
    assert paired({1: 1.0}, {2: 1.0}) is None
    assert paired({1: 3.0}, {1: 1.0}) == (2.0, None, None, 1)
