"""Reports of runs that did not measure everything, or measured what has no figure."""

import json
from pathlib import Path

from fake_runs import fake_run

from training import cli


def test_a_run_that_went_on_without_its_gpu_is_reported(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "runs" / str(seed), seed=seed) for seed in (1, 2)]
    for run, tasks in zip(runs, (2, 1), strict=True):
        log = run / "metrics.jsonl"
        events = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        for event in [e for e in events if e["event"] == "task"][:tasks]:
            event["memory"]["device"] = 5 * 2**20
        log.write_text("".join(json.dumps(event) + "\n" for event in events), "utf-8")
    named = [f"loda={run}" for run in runs]
    assert cli.main(["report", *named, "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "figures" / "costs.png").is_file()


def test_ratios_that_are_all_infinite_have_no_figure(tmp_path: Path) -> None:
    run, out = fake_run(tmp_path / "run"), tmp_path / "report"
    measures = {"new_energy": 0.1, "old_energy": 0.0, "new_magnitude": 1.0, "old_magnitude": 0.0}
    infinite = {"ratio": None, **measures}
    subspaces = [{"layers": {"qkv": {"null": infinite, "general": infinite}}}]
    (run / "analysis.json").write_text(json.dumps({"subspaces": subspaces}), "utf-8")
    assert cli.main(["report", str(run), "--out", str(out)]) == 0
    found = {path.stem for path in (out / "figures").glob("*.png")}
    assert "energy-loda" in found
    assert "ratio-loda" not in found


def test_a_figure_says_which_runs_it_leaves_out(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "runs" / str(seed), seed=seed) for seed in (1, 2, 3)]
    for run, steps in zip(runs, ([0.0, 1.0], [0.0, 1.0], [0.0, 0.5, 1.0]), strict=True):
        curves = {age: [1.0 for _ in steps] for age in ("old", "new")}
        losses = [{"task": 1, "step": steps, "own": curves, "seen": curves, "marks": {}}]
        (run / "analysis.json").write_text(json.dumps({"losses": losses}), "utf-8")
    named = [f"loda={run}" for run in runs]
    assert cli.main(["report", *named, "--out", str(tmp_path / "report")]) == 0
    assert "1 analysed at other steps" in (tmp_path / "report" / "report.html").read_text("utf-8")
