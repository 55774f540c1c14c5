"""Records of runs: a report says the same of them as of the folders, which may be gone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_runs import fake_run
from small_runs import finished

from training import cli
from training.config import BackboneConfig, DataConfig, MethodConfig
from training.report import Report, find_runs, write_records, write_report
from training.sweeps import write_groups


def sweep(folder: Path, **settings: Any) -> Path:
    """Two variants and two seeds, in two parts of a report."""
    for seed in (1, 2):
        for number, method in enumerate(("loda", "frozen")):
            rows = ((90,), (60 + seed + 5 * number, 80))
            run = folder / method / f"seed{seed}"
            fake_run(run, rows, seed=seed, method=MethodConfig(method), **settings)
            about = {"backbone": {"weights_sha256": "ab"}, "platform": "mine"}
            (run / "environment.json").write_text(json.dumps(about))
    write_groups(folder, {"all": ["frozen", "loda"], "one": ["loda"]})
    return folder


def exported(out: Path, *sources: Path | str) -> Path:
    assert cli.main(["export", *map(str, sources), "--out", str(out)]) == 0
    return out


def test_a_report_of_records_is_that_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig("folder", root=str(tmp_path / "pictures" / "birds"), resize=8)
    here = sweep(tmp_path / "here", data=data)
    weights = BackboneConfig("vit_tiny_patch16_224", weights=str(tmp_path / "w" / "tiny.pth"))
    there = sweep(tmp_path / "there", data=data, backbone=weights)
    lone = fake_run(tmp_path / "lone", seed=3)
    fresh = Report.over([here, there, f"mine={lone}"])
    told = fresh.markdown(), fresh.latex()
    records = exported(tmp_path / "records.jsonl", here, there, f"mine={lone}")
    merged = exported(tmp_path / "m.jsonl", exported(tmp_path / "a.jsonl", here), there, records)
    for folder in (here, there, lone):
        shutil.rmtree(folder)
    monkeypatch.chdir("/")
    again = Report.over([records])
    assert (again.markdown(), again.latex()) == told
    assert "birds, 2 tasks, glyphs: all" in told[0]
    assert [s.title for s in again.sections] == [s.title for s in fresh.sections]
    assert str(tmp_path) not in records.read_text()
    assert "mine" not in json.loads(records.read_text().splitlines()[1])["environment"].values()
    # The records of a run that were given twice stand twice: its folder is not there to ask.
    assert len(find_runs([merged]).runs) == 4 + 4 + 9


def test_what_was_analysed_is_drawn_from_records(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished(tmp_path_factory), run)
    assert cli.main(["analyse", str(run), "--points", "3"]) == 0
    records = exported(tmp_path / "records.jsonl", run)
    pages = [tmp_path / "one", tmp_path / "two"]
    for source, page in zip((run, records), pages, strict=True):
        write_report(Report.over([source]), page)
    drawn = [sorted(f.relative_to(page) for f in page.rglob("*.svg")) for page in pages]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 6
    for name in drawn[0]:
        assert (pages[0] / name).read_bytes() == (pages[1] / name).read_bytes()


def test_unfinished_runs_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake_run(tmp_path / "runs" / "a") / "summary.json").unlink()
    fake_run(tmp_path / "runs" / "b", seed=2)
    exported(tmp_path / "records.jsonl", tmp_path / "runs")
    said = capsys.readouterr()
    assert f"not finished, left out: {tmp_path / 'runs' / 'a'}" in said.err
    assert "records of 1 runs" in said.out


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    runs = find_runs([fake_run(tmp_path / "a")]).runs
    out = write_records(runs, tmp_path / "deep" / "records.jsonl")
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match="add --overwrite"):
        write_records([*runs, *runs], out)
    assert out.read_bytes() == before
    write_records([*runs, *runs], out, overwrite=True)
    assert [r.path.name for r in find_runs([out]).runs] == ["a", "a-2"]
    log = tmp_path / "a" / "metrics.jsonl"
    with pytest.raises(FileExistsError, match="no file of records and stays"):
        write_records(runs, log, overwrite=True)
    with pytest.raises(FileExistsError, match="no file of records and stays"):
        write_records(runs, tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [lines[0].replace(": 1}", ": 7}"), *lines[1:]], "version 7; .* version 1"),
        (lambda lines: [*lines, lines[1]], "line 3: a once more"),
        (lambda lines: [*lines, lines[1][:-9]], "cannot read .* as records"),
        (lambda lines: [*lines, "{}"], "line 3: it lacks 'run'"),
        (lambda lines: [lines[0], lines[1].replace('"log"', '"gol"')], "line 2: log not there"),
        (lambda lines: [lines[0], lines[1].replace('"rank"', '"rnak"')], "rnak"),
        (lambda lines: [lines[0], lines[1].replace('"sizes"', '"seizes"')], "lacks 'sizes'"),
    ],
)
def test_what_export_did_not_write_is_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    out = write_records(find_runs([fake_run(tmp_path / "a")]).runs, tmp_path / "records.jsonl")
    out.write_text("\n".join(spoil(out.read_text().splitlines())))
    with pytest.raises(ValueError, match=message):
        find_runs([out])


def test_other_files_are_passed_over_beside_runs(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    found = find_runs([run, run / "metrics.jsonl", run / "config.yaml"])
    assert (len(found.runs), len(found.others)) == (1, 2)
    with pytest.raises(FileNotFoundError, match="files are those of loda export"):
        find_runs([run / "metrics.jsonl"])
