"""Tasks of unequal sizes, one of a single class among them, from training to evaluation."""

import pytest
from small_runs import READOUTS, finished

from training.run_dir import read_json
from training.finished.evaluate import evaluate_run
from training.methods import METHODS

SIZES = [3, 1, 2]


@pytest.mark.parametrize("method", sorted({*METHODS} - {"joint"}))  # that one has a single task
def test_a_run_with_unequal_tasks(tmp_path_factory: pytest.TempPathFactory, method: str) -> None:
    run = finished(tmp_path_factory, method, data={"task_sizes": SIZES})
    classes = read_json(run / "classes.json")
    assert classes["tasks"] == [[0, 1, 2], [3], [4, 5]]
    summary = read_json(run / "summary.json")
    assert set(summary["readouts"]) == set(READOUTS)
    for kind, result in evaluate_run(run).items():
        counts = summary["counts"][kind]
        assert [len(row) for row in counts["total"]] == [3, 4, 6]
        assert result["correct"] == counts["correct"][-1]
        assert len(result["by_task"]) == 3
        assert summary["readouts"][kind]["last"] == pytest.approx(result["accuracy"])
        # Means are over images and over tasks, not over tasks of the same size.
        curve = [sum(c) / sum(t) for c, t in zip(counts["correct"], counts["total"], strict=True)]
        assert summary["readouts"][kind]["average"] == pytest.approx(sum(curve) / 3)
    assert (run / "accuracy.png").stat().st_size > 0


def test_a_stream_of_unequal_tasks_can_be_cut(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = finished(tmp_path_factory, "loda", data={"task_sizes": SIZES, "tasks": 2})
    whole = finished(tmp_path_factory, "loda", data={"task_sizes": SIZES})
    cut, full = (read_json(folder / "summary.json")["counts"] for folder in (run, whole))
    for kind in READOUTS:  # what is cut off changes nothing of what came before
        assert cut[kind]["correct"] == full[kind]["correct"][:2]
