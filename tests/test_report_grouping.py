"""Which runs are compared: seeds are grouped, everything that matters tells groups apart."""

from pathlib import Path
from typing import Any

import pytest
from fake_runs import fake_run
from read_reports import FROZEN, sections, texts

from training.config import BackboneConfig, DataConfig, HeadConfig, KeepConfig, MethodConfig
from training.report import Report, find_runs, write_report
from training.report.side import side_drawings
from training.sweeps import write_groups


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


def test_a_folder_of_hugging_face_is_known_by_its_name(tmp_path: Path) -> None:
    places = ("hfds//here/Images", "hfds//there/Images", "hfds/some/Images")
    for seed, place in enumerate(places):
        data = DataConfig(name="timm", dataset=place, resize=8)
        fake_run(tmp_path / str(seed), seed=seed, data=data)
    folders, hub = sections(tmp_path)
    assert [run.experiment.seed for run in folders.groups["loda"]] == [0, 1]
    assert [s.title.partition(",")[0] for s in (folders, hub)] == ["Images", "hfds/some/Images"]


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
    with pytest.raises(FileNotFoundError, match="no folder or file /no/such"):
        find_runs(["/no/such"])
    run = fake_run(tmp_path / "a")
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="no summary of a run"):
        find_runs([run])


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
    with pytest.raises(FileNotFoundError, match=r"no folder or file .*noted"):
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
        "Side by side (others): last accuracy, read-out alignment (%)",  # "aligned" alone
    ]
    (other / "groups.json").unlink()
    accuracy, lead = Report.over([out, other]).overview()  # only one has parts: all with all
    assert accuracy.title == "Side by side: last accuracy, read-out alignment (%)"
    assert [row[0] for row in texts(accuracy)] == ["loda", "frozen", "plain", "aligned"]
    assert [row[0] for row in texts(lead)] == ["frozen", "plain", "aligned"]
    (out / "groups.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"it is \[1\]; expected a mapping"):
        find_runs([out])


def test_some_variants_of_a_sweep_are_not_shown_again_in_a_part_that_is_cut(tmp_path: Path) -> None:
    out = swept(tmp_path / "sweep", VARIANTS)
    other = swept(tmp_path / "other", VARIANTS, backbone=BackboneConfig("cifar_vit"))
    groups = {"methods": ["loda", "frozen"], "parts": ["loda", "plain"], "one": ["loda"]}
    write_groups(out, groups)
    report = Report.over([out / "loda", out / "frozen", other])
    assert [section.part for section in report.sections] == ["methods", "one", ""]
    accuracy, _ = report.overview()
    assert [row[0] for row in texts(accuracy)] == ["loda", "frozen"]  # what both have
    (drawing,) = side_drawings(report.sections)
    assert "plain" not in drawing.alt


def test_a_part_is_whole_by_the_groups_of_its_own_sweep(tmp_path: Path) -> None:
    small = {name: VARIANTS[name] for name in ("loda", "frozen")}
    one = swept(tmp_path / "one", small)
    two = swept(tmp_path / "two", VARIANTS, backbone=BackboneConfig("cifar_vit"))
    first = {"methods": ["loda", "frozen"]}
    write_groups(one, first | {"again": ["loda", "frozen"]})
    write_groups(two, first | {"again": ["loda", "frozen", "gone"]})
    for paths in ((one, two), (two, one)):
        found = {(s.base.split(", ")[-1], s.part) for s in sections(*paths)}
        assert ("glyphs", "again") in found
        assert ("cifar_vit", "again") not in found  # cut, and shown already


def test_labels_are_checked(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    with pytest.raises(ValueError, match="--against sgd: no such method among loda"):
        Report.over([tmp_path], against="sgd")


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_compared(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", seed=1)
    strange = fake_run(tmp_path / "b", seed=2) / "config.yaml"
    strange.write_text(strange.read_text().replace("name: loda", "name: not_installed"))
    report = Report.over([tmp_path])
    assert list(report.unreadable) == [tmp_path / "b"]
    assert "not counted" in report.notes()[0]
    assert "not_installed" in report.notes()[0]
    assert [run.experiment.seed for run in report.sections[0].groups["loda"]] == [1]
    with pytest.raises(ValueError, match="not_installed"):
        find_runs([tmp_path / "b"])
