"""Tables over runs: seeds are grouped, everything that matters tells groups apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import fake_run
from image_folders import CLASSES, folder, grow
from scipy import stats

from training.config import (
    BackboneConfig,
    HeadConfig,
    KeepConfig,
    MethodConfig,
    TrainConfig,
)
from training.report import (
    Report,
    Section,
    Table,
    by_section,
    comparison_curves,
    find_runs,
    paired,
    report_tables,
    spread,
    write_report,
)
from training.report.side import side_drawings
from training.sweeps import write_groups

FROZEN = MethodConfig("frozen")


def sections(*sources: Path | str) -> list[Section]:
    return by_section(find_runs(sources).runs)


def table(section: Section, title: str, against: str | None = None) -> Table:
    (found,) = [t for t in report_tables(section, against) if t.title.startswith(title)]
    return found


def texts(found: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in found.rows]


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, last in ((3, (30, 70)), (1, (60, 80)), (2, (90, 90))):
        fake_run(tmp_path / str(seed), ((90,), last), seed=seed)
    (section,) = sections(tmp_path)
    assert texts(table(section, "Accuracy, read-out alignment")) == [
        # last 50, 70, 90; average 70, 80, 90; forgetting 60, 30, 0
        [
            "loda",
            "70.00 ± 20.00",
            "80.00 ± 10.00",
            "30.00 ± 30.00",
            "95.00 ± 0.00",
            "1, 2, 3",
        ]
    ]
    curves = comparison_curves([section])
    assert curves == {"loda": [[0.9, 0.7], [0.9, 0.9], [0.9, 0.5]]}  # by seed


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    (section,) = sections(fake_run(tmp_path / "a"))
    assert texts(table(section, "Accuracy"))[0][1] == "70.00"


def test_settings_that_matter_tell_groups_apart(tmp_path: Path) -> None:
    paths = [
        fake_run(tmp_path / "a"),
        fake_run(tmp_path / "b", method=MethodConfig(gao=False)),
        fake_run(tmp_path / "c", method=FROZEN),
    ]
    (section,) = sections(*paths)
    assert list(section.groups) == ["loda (method.gao None)", "loda (method.gao False)", "frozen"]


def test_what_is_kept_or_read_out_besides_does_not_split_seeds(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", seed=1, keep=KeepConfig(moments=True))
    fake_run(tmp_path / "b", seed=2, head=HeadConfig(also=["ridge"]), out="elsewhere")
    (section,) = sections(tmp_path)
    assert {k: len(runs) for k, runs in section.groups.items()} == {"loda": 2}
    assert section.readouts == ["alignment"]  # the other one is that of a single seed


def test_a_seed_counts_once(tmp_path: Path) -> None:
    first, second = fake_run(tmp_path / "a"), fake_run(tmp_path / "b")
    with pytest.raises(ValueError, match="not all seeds differ"):
        sections(first, second)
    (section,) = sections(f"one={first}", f"two={second}")
    assert list(section.groups) == ["one", "two"]
    assert len(find_runs([first, tmp_path / "a", first]).runs) == 1  # one folder, given twice


def test_runs_are_named_after_the_folder_that_holds_them(tmp_path: Path) -> None:
    for variant, gao in (("plain", False), ("aligned", True)):
        for seed in (1, 2):
            method = MethodConfig(gao=gao)
            fake_run(tmp_path / "sweep" / variant / f"seed{seed}", seed=seed, method=method)
    (section,) = sections(tmp_path / "sweep")
    assert {k: len(runs) for k, runs in section.groups.items()} == {"aligned": 2, "plain": 2}
    (section,) = sections(f"both={tmp_path / 'sweep'}")  # never averaged under one name
    assert list(section.groups) == ["both (method.gao True)", "both (method.gao False)"]


def test_a_name_that_is_also_a_method_stays_apart(tmp_path: Path) -> None:
    paths = [fake_run(tmp_path / "a"), f"loda={fake_run(tmp_path / 'b')}"]
    (section,) = sections(*paths)
    assert list(section.groups) == ["loda [1]", "loda [2]"]


def test_unfinished_runs_are_named_and_not_counted(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", seed=1)
    (fake_run(tmp_path / "b", seed=2) / "summary.json").unlink()
    report = Report.over([tmp_path])
    assert report.unfinished == [tmp_path / "b"]
    assert f"not counted: {tmp_path / 'b'}" in report.markdown()
    with pytest.raises(FileNotFoundError, match=r"no run is finished yet: .*b without summary"):
        find_runs([tmp_path / "b"])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run in .*holds config\.yaml"):
        find_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match="no folder /no/such"):
        find_runs(["/no/such"])
    run = fake_run(tmp_path / "a")
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="no summary of a run"):
        find_runs([run])


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
    assert lead.header == ["over", "glyphs", "cifar_vit"]
    assert texts(lead) == [["frozen", *["+10.00 [+10.00, +10.00] (2)"] * 2]]


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
    assert texts(lead) == [["frozen", "+5.00 (1)", "+5.00 (1)"]]
    (drawing,) = side_drawings(report.sections)
    assert drawing.alt.count("over frozen +5.00") == 2
    path = drawing.draw(tmp_path / "a.svg")
    assert path.stat().st_size > 1000


def swept(out: Path, variants: dict[str, MethodConfig], **settings: Any) -> Path:
    for variant, method in variants.items():
        for seed in (1, 2):
            folder = out / variant / f"seed{seed}"
            fake_run(folder, seed=seed, method=method, **settings)
    (out / "logs").mkdir()
    (out / "logs" / "plain-seed1.log").touch()
    return out


VARIANTS = {
    "plain": MethodConfig(gao=False),
    "aligned": MethodConfig(gao=True),
    "frozen": FROZEN,
    "loda": MethodConfig(),
}


def test_a_sweep_its_variants_and_its_runs_have_the_same_names(tmp_path: Path) -> None:
    out = swept(tmp_path / "sweep", VARIANTS)
    report = Report.over([out])
    names = sorted(VARIANTS)
    assert list(report.sections[0].groups) == names
    for pattern in ("*", "*/*"):
        other = Report.over(sorted(out.glob(pattern)))
        assert other.markdown() == report.markdown()
        assert other.notes() == []
    assert list(sections(out / "plain", out / "aligned" / "seed2")[0].groups) == [
        "plain",
        "aligned",
    ]


def test_what_holds_no_run_is_named_beside_what_does(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    (tmp_path / "notes").mkdir()
    report = Report.over([run, tmp_path / "notes"])
    assert report.notes() == [f"No run is in: {tmp_path / 'notes'}."]
    with pytest.raises(FileNotFoundError, match=r"no run in .*notes"):
        Report.over([tmp_path / "notes"])
    with pytest.raises(FileNotFoundError, match=r"no folder .*noted"):
        Report.over([run, tmp_path / "noted"])


def test_a_sweep_says_what_belongs_together(tmp_path: Path) -> None:
    out = swept(tmp_path / "sweep", VARIANTS)
    write_groups(out, {"methods": ["loda", "frozen"], "parts": ["loda", "plain"]})
    found = sections(out)
    assert [(s.part, list(s.groups), s.fresh) for s in found] == [
        ("methods", ["loda", "frozen"], ("loda", "frozen")),
        ("parts", ["loda", "plain"], ("plain",)),
        ("others", ["aligned"], ("aligned",)),
    ]
    assert found[0].title == "digits, 2 tasks, glyphs: methods"
    assert len({s.slug for s in found}) == 3
    assert {s.labels for s in found} == {found[0].labels}  # one colour a method
    report = Report.over([out])
    assert report.overview() == []  # one backbone: nothing to put side by side
    page = write_report(report, tmp_path / "report").read_text()
    assert "8 finished runs of 4 methods" in page
    assert page.count("Accuracy matrix of loda,") == 2  # folded: its title, and the figure's
    other = swept(tmp_path / "other", VARIANTS, backbone=BackboneConfig("cifar_vit"))
    write_groups(other, {"methods": ["loda", "frozen"]})
    titles = [t.title for t in Report.over([out, other]).overview()]
    assert titles == [
        "Side by side (methods): last accuracy, read-out alignment (%)",
        "Side by side (methods): lead of loda, read-out alignment (points)",
        "Side by side (others): last accuracy, read-out alignment (%)",
        "Side by side (others): lead of aligned, read-out alignment (points)",
    ]
    (out / "groups.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"it is \[1\]; expected a mapping"):
        find_runs([out])


def test_a_task_that_was_logged_twice_is_refused(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match=r"a.metrics\.jsonl logs the end of task 2 more than once"):
        Report.over([tmp_path]).markdown()


def test_heads_that_never_trained_are_no_read_out(tmp_path: Path) -> None:
    head = HeadConfig(readout="nearest_mean", also=["heads", "alignment"])
    still = TrainConfig(epochs=0)
    run = fake_run(tmp_path / "a", method=MethodConfig("ncm"), head=head, train=still)
    (section,) = sections(run)
    assert section.readouts == ["nearest_mean", "alignment"]
    assert texts(table(section, "Controls"))[0][1] == "0"  # nothing trained either
    # A run that asked for them as its own read-out shows them.
    heads = HeadConfig(readout="heads")
    run = fake_run(tmp_path / "b", head=heads, train=still)
    assert sections(run)[0].readouts == ["heads"]


def test_the_best_of_a_column_is_bold(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", ((90,), (60, 80)))
    fake_run(tmp_path / "b", ((80,), (70, 70)), method=FROZEN)  # ties in last, forgets less
    fake_run(tmp_path / "c", ((99, 99),), method=MethodConfig("joint"))
    (section,) = sections(tmp_path)
    found = table(section, "Accuracy")
    bold = {row[0].text: [cell.best for cell in row[1:5]] for row in found.rows}
    assert bold["loda"] == [True, True, False, True]
    assert bold["frozen"] == [True, False, True, True]
    assert bold["joint"] == [False] * 4
    joint = next(row for row in texts(found) if row[0] == "joint")
    assert joint[1:5] == ["99.00", "–", "–", "–"]


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


def test_costs(tmp_path: Path) -> None:
    (section,) = sections(fake_run(tmp_path / "a"))
    assert texts(table(section, "Costs")) == [["loda", "3.5", "2.5", "301", "–"]]


@pytest.mark.parametrize(
    ("method", "each"),
    [
        (MethodConfig("loda"), 2),
        (MethodConfig("loda", gao=False), 1),
        (MethodConfig("loda", radius=0.0), 2),
        (MethodConfig("seq_lora"), 1),
        (MethodConfig("seq_lora", gao=True), 2),
        (MethodConfig("null_lora"), 1),
        (FROZEN, 1),
    ],
)
def test_controls(tmp_path: Path, method: MethodConfig, each: int) -> None:
    train = TrainConfig(epochs=3, batch_size=10)
    run = fake_run(tmp_path / "a", method=method, train=train)
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[1:] == ["2,000", "1,048,576", "524,288", "5.0", "–", "–"]  # it counted no images
    classes = {"class_names": ["a", "b"], "order": [0, 1], "tasks": [[0], [1]]}
    (run / "classes.json").write_text(json.dumps({**classes, "images": [25, 500]}))
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[5:] == [str(each * 3 * (3 + 50)), f"{each * 3 * 525:,}"]


def test_images_of_older_runs_are_counted_where_they_are(tmp_path: Path) -> None:
    data = folder(grow(tmp_path / "images", {"train": 7, "test": 1}), image_size=8)
    train = TrainConfig(epochs=2, batch_size=5)
    rows = ((90, 90, 90), (60, 80, 80, 70, 70))  # three classes, then two
    run = fake_run(tmp_path / "a", rows, method=FROZEN, train=train, data=data)
    classes = {"class_names": list(CLASSES), "order": [0] * 5, "tasks": [[0, 1, 2], [3, 4]]}
    (run / "classes.json").write_text(json.dumps(classes))
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[5:] == [str(2 * (5 + 3)), str(2 * 35)]
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "gone")
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[5:] == ["–", "–"]


def test_labels_are_checked(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    with pytest.raises(ValueError, match="--against sgd: no such method among loda"):
        Report.over([tmp_path], against="sgd")
