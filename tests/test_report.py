"""Tables over runs: seeds are grouped, everything that matters tells groups apart."""

from pathlib import Path

import numpy as np
import pytest
from fake_runs import fake_run
from scipy import stats

from training.config import BackboneConfig, HeadConfig, KeepConfig, MethodConfig
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
)

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
    (together,) = Report.over([tmp_path / "glyphs", tmp_path / "cifar_vit"]).overview()
    assert together.header[1:] == [titles[0], "lead of loda", titles[1], "lead of loda"]
    frozen, loda = texts(together)
    assert frozen[2] == frozen[4] == "+10.00 [+10.00, +10.00]"
    assert loda[1:3] == ["75.75 ± 0.35", "–"]


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
        (folder / "classes.json").write_text(f'{{"class_names": {order}}}'.replace("'", '"'))
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
    assert texts(table(section, "Costs")) == [
        ["loda", "2,000", "1.0", "0.5", "3.5", "2.5", "301", "–"]
    ]


def test_labels_are_checked(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    with pytest.raises(ValueError, match="--against sgd: no such method among loda"):
        Report.over([tmp_path], against="sgd")
