"""Runs as a report reads them: found, grouped, bundled, and as a DataFrame."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_runs import FROZEN, analysis, changed_json, fake_run, moves, sections

from training import cli
from training.config import (
    BackboneConfig,
    DataConfig,
    HeadConfig,
    KeepConfig,
    MethodConfig,
    TrainConfig,
)
from training.report import Report, find_runs, load, load_tasks, write_bundle
from training.report.figures import drawings
from training.report.runs import slug
from training.sweep import write_groups

PLAIN, ALIGNED = MethodConfig("loda", {"gao": False}), MethodConfig("loda", {"gao": True})
VARIANTS = {"plain": PLAIN, "aligned": ALIGNED, "frozen": FROZEN, "loda": MethodConfig()}


def swept(out: Path, variants: dict[str, MethodConfig] = VARIANTS, **settings: Any) -> Path:
    """The folder of a sweep with two seeds."""
    for variant, method in variants.items():
        for seed in (1, 2):
            folder = out / variant / f"seed{seed}"
            fake_run(folder, seed=seed, method=method, **settings)
    (out / "logs").mkdir()
    (out / "logs" / "plain-seed1.log").touch()
    return out


def sizes(*sources: Path | str) -> dict[str, int]:
    """Runs of each group of the only section."""
    (section,) = sections(*sources)
    return {label: len(runs) for label, runs in section.groups.items()}


def test_settings_that_matter_tell_groups_apart(tmp_path: Path) -> None:
    methods = {"a": ALIGNED, "b": PLAIN, "c": FROZEN}
    paths = [fake_run(tmp_path / name, method=method) for name, method in methods.items()]
    assert list(sizes(*paths)) == ["loda (method.gao True)", "loda (method.gao False)", "frozen"]


def test_what_is_kept_or_read_out_besides_does_not_split_seeds(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", seed=1, keep=KeepConfig(moments=True))
    fake_run(tmp_path / "b", seed=2, head=HeadConfig(also=["ridge"]), out="elsewhere")
    assert sizes(tmp_path) == {"loda": 2}
    (section,) = sections(tmp_path)
    assert section.readouts == [HeadConfig.readout]  # the other one is that of a single seed
    other = HeadConfig(also=["ridge"], options={"ridge": {"features": 10}})
    fake_run(tmp_path / "c", seed=3, head=other)
    assert len(sizes(tmp_path)) == 2  # their ridge read-outs are not the same


def test_a_folder_of_hugging_face_is_known_by_its_name(tmp_path: Path) -> None:
    places = ("hfds//here/Images", "hfds//there/Images", "hfds/some/Images")
    for seed, place in enumerate(places):
        data = DataConfig("timm", {"dataset": place}, resize=8)
        fake_run(tmp_path / str(seed), seed=seed, data=data)
    folders, hub = sections(tmp_path)
    assert [run.seed for run in folders.groups["loda"]] == [0, 1]
    assert [s.title.partition(",")[0] for s in (folders, hub)] == ["Images", "hfds/some/Images"]


def test_a_seed_counts_once(tmp_path: Path) -> None:
    first, second = fake_run(tmp_path / "a"), fake_run(tmp_path / "b")
    with pytest.raises(ValueError, match="twice"):
        sections(first, second)
    assert list(sizes(f"one={first}", f"two={second}")) == ["one", "two"]
    assert len(find_runs([first, tmp_path / "a", first]).runs) == 1  # one folder, given twice


def test_runs_are_named_after_the_folder_that_holds_them(tmp_path: Path) -> None:
    out = swept(tmp_path / "sweep", {"plain": PLAIN, "aligned": ALIGNED})
    assert sizes(out) == {"aligned": 2, "plain": 2}
    # Never averaged under one name.
    assert list(sizes(f"both={out}")) == ["both (method.gao True)", "both (method.gao False)"]


def test_a_name_that_is_also_a_method_stays_apart(tmp_path: Path) -> None:
    paths = [fake_run(tmp_path / "a"), f"loda={fake_run(tmp_path / 'b')}"]
    assert list(sizes(*paths)) == ["loda [1]", "loda [2]"]


def test_unfinished_runs_are_named_and_not_counted(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", seed=1)
    (fake_run(tmp_path / "b", seed=2) / "summary.json").unlink()
    report = Report.over([tmp_path])
    assert report.inventory.unfinished == [tmp_path / "b"]
    assert f"not counted: {tmp_path / 'b'}" in report.markdown()
    with pytest.raises(FileNotFoundError, match=f"finished run in {tmp_path / 'b'}"):
        find_runs([tmp_path / "b"])


def test_a_sweep_its_variants_and_its_runs_have_the_same_names(tmp_path: Path) -> None:
    out = swept(tmp_path / "sweep")
    report = Report.over([out])
    assert sorted(report.sections[0].groups) == sorted(VARIANTS)
    for pattern in ("*", "*/*"):
        other = Report.over(sorted(out.glob(pattern)))
        assert other.markdown() == report.markdown()
        assert other.notes() == []
    assert list(sizes(out / "plain", out / "aligned" / "seed2")) == ["plain", "aligned"]


def test_what_holds_no_run_is_named_beside_what_does(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    (tmp_path / "notes").mkdir()
    report = Report.over([run, tmp_path / "notes", run / "metrics.jsonl", run / "config.yaml"])
    assert len(report.inventory.runs) == 1
    (note,) = report.notes()
    assert all(str(path) in note for path in (tmp_path / "notes", run / "metrics.jsonl"))
    words = {"notes": "notes", "a/metrics.jsonl": "loda bundle", "nothing": "nothing"}
    for place, word in words.items():
        with pytest.raises(FileNotFoundError, match=word):
            find_runs([tmp_path / place])


def test_runs_that_learned_at_a_rate_far_too_high_are_named(tmp_path: Path) -> None:
    for seed, relative in ((1, 0.9), (2, 1.5), (3, 4.0), (4, 80.0)):
        moves(fake_run(tmp_path / str(seed), seed=seed), relative)
    fake_run(tmp_path / "frozen", method=MethodConfig("frozen"))
    (note,) = Report.over([tmp_path]).notes()
    assert note.endswith("loda (2 to 4).")


def test_a_sweep_says_what_belongs_together(tmp_path: Path) -> None:
    out = swept(tmp_path / "sweep")
    write_groups(out, {"methods": ["loda", "frozen"], "parts": ["loda", "plain"]})
    parts = sections(out)
    assert [(s.part, list(s.groups), s.new_labels) for s in parts] == [
        ("methods", ["loda", "frozen"], ("loda", "frozen")),
        ("parts", ["loda", "plain"], ("plain",)),
        ("others", ["aligned"], ("aligned",)),
    ]
    assert parts[0].title == "digits, 2 tasks, glyphs: methods"
    assert len({s.slug for s in parts}) == 3
    assert all(s.styles == parts[0].styles for s in parts)  # one colour a method
    names = [drawing.name for section in parts for drawing in drawings(section)]
    assert names.count("matrix-loda") == 1  # where it is fresh
    report = Report.over([out])
    assert report.overview() == []  # one backbone: nothing to put side by side
    other = swept(tmp_path / "other", backbone=BackboneConfig("cifar_vit"))
    write_groups(other, {"methods": ["loda", "frozen"]})
    readout = f"read-out {HeadConfig.readout}"
    assert [t.title for t in Report.over([out, other]).overview()] == [
        f"Side by side (methods): last accuracy, {readout} (%)",
        f"Side by side (methods): lead of loda, {readout} (points)",
        f"Side by side (others): last accuracy, {readout} (%)",  # "aligned" alone
    ]
    (other / "groups.json").unlink()
    accuracy, lead = Report.over([out, other]).overview()  # only one has parts: all with all
    assert accuracy.title == f"Side by side: last accuracy, read-out {HeadConfig.readout} (%)"
    assert list(accuracy.cells.index) == ["loda", "frozen", "plain", "aligned"]
    assert list(lead.cells.index) == ["frozen", "plain", "aligned"]


def test_some_variants_of_a_sweep_are_not_shown_again_in_a_part_that_is_cut(tmp_path: Path) -> None:
    out = swept(tmp_path / "sweep")
    other = swept(tmp_path / "other", backbone=BackboneConfig("cifar_vit"))
    write_groups(out, {"methods": ["loda", "frozen"], "parts": ["loda", "plain"], "one": ["loda"]})
    report = Report.over([out / "loda", out / "frozen", other])
    assert [section.part for section in report.sections] == ["methods", "one", ""]
    accuracy, _ = report.overview()
    assert list(accuracy.cells.index) == ["loda", "frozen"]  # what both have


def test_a_part_is_whole_by_the_groups_of_its_own_sweep(tmp_path: Path) -> None:
    both = ["loda", "frozen"]
    one = swept(tmp_path / "one", {name: VARIANTS[name] for name in both})
    two = swept(tmp_path / "two", backbone=BackboneConfig("cifar_vit"))
    write_groups(one, {"methods": both, "again": both})
    write_groups(two, {"methods": both, "again": [*both, "gone"]})
    for paths in ((one, two), (two, one)):
        again = [s.base for s in sections(*paths) if s.part == "again"]
        assert again == ["digits, 2 tasks, glyphs"]  # the other is cut, and shown already


def test_heads_that_never_trained_are_no_read_out(tmp_path: Path) -> None:
    head = HeadConfig(readout="nearest_mean", also=["heads", "alignment"])
    run = fake_run(tmp_path / "a", head=head, train=TrainConfig(epochs=0))
    (section,) = sections(run)
    assert section.readouts == ["nearest_mean", "alignment"]
    assert set(section.measures["trained_parameters"]) == {0}  # nothing trained either
    # A run that asked for them as its own read-out shows them.
    run = fake_run(tmp_path / "b", head=HeadConfig(readout="heads"), train=TrainConfig(epochs=0))
    assert sections(run)[0].readouts == ["heads"]


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_compared(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", seed=1)
    (fake_run(tmp_path / "b", seed=2) / "config.yaml").write_text("method: {")
    report = Report.over([tmp_path])
    assert list(report.inventory.unreadable) == [tmp_path / "b"]
    assert str(tmp_path / "b" / "config.yaml") in report.notes()[0]
    assert [run.seed for run in report.inventory.runs] == [1]
    with pytest.raises(ValueError, match="YAML"):
        find_runs([tmp_path / "b"])


def test_a_method_that_is_not_installed_is_compared(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", seed=1)
    config = fake_run(tmp_path / "b", seed=1) / "config.yaml"
    config.write_text(config.read_text().replace("name: loda", "name: elsewhere.Theirs"))
    changed_json(tmp_path / "b" / "classes.json", images=[9, 9])
    frame = load(tmp_path / "a", tmp_path / "b").set_index("group")
    assert list(frame.index) == ["loda", "elsewhere.Theirs"]
    assert frame["steps"].isna().all()  # nobody knows its steps


COUNTS = {"sizes": [1], "correct": [[1]], "total": [[2]]}
TWO = {"sizes": [1, 1], "correct": [[1], [1, 1]], "total": [[2], [2, 2]]}
LINE = {"event": "task", "task": 1, "seconds": {"train": 1.0}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", [1]),
        ("summary.json", {}),
        ("summary.json", {"counts": {}}),
        ("summary.json", {"counts": {HeadConfig.readout: {"sizes": [1]}}}),
        ("summary.json", {"counts": {HeadConfig.readout: COUNTS | {"correct": [["x"]]}}}),
        (
            "summary.json",
            {"counts": {HeadConfig.readout: COUNTS}, "stored_bytes": {"method": "much"}},
        ),
        (
            "summary.json",
            {"counts": {HeadConfig.readout: COUNTS}, "trainable_parameters": {"a": {}}},
        ),
        ("summary.json", {"counts": {HeadConfig.readout: TWO}, "task_given": [0.5]}),
        ("classes.json", {"class_names": [1, 2]}),
        ("classes.json", {"images": ["many"]}),
        ("environment.json", {"backbone": 7}),
        ("metrics.jsonl", LINE | {"task": 0}),
        ("metrics.jsonl", LINE | {"seconds": {"train": "long"}}),
        ("metrics.jsonl", LINE | {"seconds": {"train": float("inf")}}),
        ("metrics.jsonl", LINE | {"memory": 7}),
        ("analysis.json", {"subspaces": [{"layers": {"qkv": {"null": {"ratio": 1.0}}}}]}),
        ("analysis.json", {"losses": [{"task": 2, "step": []}]}),
        ("groups.json", [1]),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, content: Any) -> None:
    folder = fake_run(tmp_path / "a" / "seed1")
    path = (tmp_path if name == "groups.json" else folder) / name
    path.write_text(json.dumps(content) + "\n", "utf-8")
    with pytest.raises(ValueError, match=str(path)) as caught:
        find_runs([folder])
    assert "\n" not in str(caught.value)


def test_a_task_that_was_logged_twice_is_refused(tmp_path: Path) -> None:
    log = fake_run(tmp_path / "a") / "metrics.jsonl"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match="task 2 is logged more than once"):
        find_runs([tmp_path])


def test_load_gives_a_row_a_run_and_read_out(tmp_path: Path) -> None:
    both = HeadConfig(also=["ridge"])
    for seed, last in ((3, (30, 70)), (1, (60, 80))):
        fake_run(tmp_path / f"{seed}", ((90,), last), seed=seed, head=both)
    joint = fake_run(tmp_path / "joint", ((99, 97),), seed=1, method=MethodConfig("joint"))
    frame = load(tmp_path)
    assert len(frame) == 5
    row = frame[(frame["seed"] == 3) & frame["primary"]].iloc[0]
    assert (row["section"], row["group"]) == ("digits, 2 tasks, glyphs", "loda")
    assert (row["readout"], row["tasks"], row["run"]) == (
        HeadConfig.readout,
        2,
        str(tmp_path / "3"),
    )
    assert (row["last"], row["average"], row["forgetting"]) == pytest.approx((50, 70, 60))
    assert (row["task_given"], row["method_bytes"], row["readout_bytes"]) == (95, 2**20, 2**19)
    assert (row["seconds"], row["training_seconds"], row["memory_mib"]) == (7, 5, 301)
    assert (row["method.name"], row["train.lr"]) == ("loda", 0.02)
    upper = frame[frame["run"] == str(joint)].iloc[0]
    assert upper["last"] == pytest.approx(98)
    assert upper[["average", "forgetting", "task_given", "gpu_memory_mib"]].isna().all()


def test_load_tasks_gives_a_row_a_task(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", ((90,), (60, 80), (70, 50, 60)))
    frame = load_tasks(tmp_path)
    expected = pd.DataFrame(
        {
            "task": [1, 2, 3],
            "accuracy": [90.0, 70.0, 60.0],
            "new": [90.0, 80.0, 60.0],
            "old": [np.nan, 60.0, 60.0],
            "forgetting": [20.0, 30.0, np.nan],
            "seconds": [3.0, 4.0, 5.0],
        }
    )
    pd.testing.assert_frame_equal(frame[[*expected]], expected)


def test_a_run_whose_log_lacks_a_task_has_no_seconds(tmp_path: Path) -> None:
    log = fake_run(tmp_path / "a") / "metrics.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]))
    assert load(tmp_path)["seconds"].isna().all()


def test_slugs_are_plain_names_of_files() -> None:
    assert (slug("../../etc/x"), slug("γ ∞")) == ("etc-x", "runs")
    assert len(slug("long " * 999)) <= 100


def bundled(out: Path, *sources: Path | str) -> Path:
    assert cli.main(["bundle", *map(str, sources), "--out", str(out)]) == 0
    return out


def test_a_report_of_a_bundle_is_that_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    birds = DataConfig("folder", {"root": str(tmp_path / "pictures" / "birds")}, resize=8)
    weights = {"weights": str(tmp_path / "w" / "tiny.pth")}
    tiny = BackboneConfig("vit_tiny_patch16_224", weights)
    two = {"loda": MethodConfig(), "frozen": FROZEN}
    here = swept(tmp_path / "here", two, data=birds)
    there = swept(tmp_path / "there", two, data=birds, backbone=tiny)
    for environment in (path / "environment.json" for path in here.glob("*/seed*")):
        changed_json(environment, backbone={"weights_sha256": "ab"}, platform="mine")
    write_groups(here, {"all": ["frozen", "loda"], "one": ["loda"]})
    lone = fake_run(tmp_path / "lone", seed=3)
    fresh = Report.over([here, there, f"mine={lone}"])
    texts = fresh.markdown(), fresh.latex()
    bundle = bundled(tmp_path / "bundle.jsonl", here, there, f"mine={lone}")
    merged = bundled(tmp_path / "m.jsonl", bundled(tmp_path / "a.jsonl", here), there, bundle)
    for folder in (here, there, lone):
        shutil.rmtree(folder)
    monkeypatch.chdir("/")
    again = Report.over([bundle])
    assert (again.markdown(), again.latex()) == texts
    assert "birds, 2 tasks, glyphs: all" in texts[0]
    assert [s.title for s in again.sections] == [s.title for s in fresh.sections]
    assert str(tmp_path) not in bundle.read_text()
    assert "mine" not in json.loads(bundle.read_text().splitlines()[1])["environment"].values()
    # The records of a run that were given twice stand twice: its folder is not there to ask.
    assert len(find_runs([merged]).runs) == 4 + 4 + 9


def test_unfinished_runs_are_left_out_of_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake_run(tmp_path / "runs" / "a") / "summary.json").unlink()
    fake_run(tmp_path / "runs" / "b", seed=2)
    bundle = bundled(tmp_path / "bundle.jsonl", tmp_path / "runs")
    assert str(tmp_path / "runs" / "a") in capsys.readouterr().err
    assert len(find_runs([bundle]).runs) == 1


def test_no_file_is_overwritten_unasked(tmp_path: Path) -> None:
    runs = find_runs([fake_run(tmp_path / "a")]).runs
    out = write_bundle(runs, tmp_path / "deep" / "bundle.jsonl")
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_bundle([*runs, *runs], out)
    assert out.read_bytes() == before
    write_bundle([*runs, *runs], out, overwrite=True)
    assert [r.path.name for r in find_runs([out]).runs] == ["a", "a-2"]
    for path in (tmp_path / "a" / "metrics.jsonl", tmp_path):
        with pytest.raises(FileExistsError, match="not a bundle"):
            write_bundle(runs, path, overwrite=True)


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (lambda lines: [lines[0].replace(": 2}", ": 7}"), *lines[1:]], "version 7"),
        (lambda lines: [*lines, lines[1]], "line 3"),
        (lambda lines: [*lines, lines[1][:-9]], "line 3"),
        (lambda lines: [*lines, "{}"], "line 3"),
        (lambda lines: [*lines, "[1]"], "line 3"),
        (lambda lines: [lines[0], lines[1].replace('"log"', '"gol"')], "line 2"),
        (lambda lines: [lines[0], lines[1].replace('"rank"', '"rnak"')], "rnak"),
        (lambda lines: [lines[0], lines[1].replace('"sizes"', '"seizes"')], "a/summary.json"),
    ],
)
def test_a_damaged_bundle_is_refused_with_the_place(
    tmp_path: Path, spoil: Callable[[list[str]], list[str]], place: str
) -> None:
    out = write_bundle(find_runs([fake_run(tmp_path / "a")]).runs, tmp_path / "bundle.jsonl")
    out.write_text("\n".join(spoil(out.read_text().splitlines())))
    with pytest.raises(ValueError, match=place) as caught:
        find_runs([out])
    assert str(out) in str(caught.value)


def test_analyses_are_bundled(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", ((90,), (60, 80), (60, 80, 70)))
    changed_json(run / "analysis.json", **analysis(), notes="of this machine")
    bundle = bundled(tmp_path / "bundle.jsonl", run)
    assert "of this machine" not in bundle.read_text()
    before, after = (
        [
            (drawing.name, drawing.alt, repr(drawing.draw.args))  # type: ignore[attr-defined]
            for drawing in drawings(*sections(source))
        ]
        for source in (run, bundle)
    )
    assert {"ratio-loda", "energy-loda", "loss-loda-task2"} <= {name for name, *_ in before}
    assert after == before
