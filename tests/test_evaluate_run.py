"""Finished runs evaluated again, from the weights alone: the counts that were recorded."""

import shutil
from pathlib import Path

import pytest
import torch
from run_contents import set_in_config
from small_runs import finished, tree

import training
from training.data import build_stream
from training.data import test_transform as evaluation_transform
from training.run_dir import read_json
from training.finished.evaluate import evaluate_run

METHODS = ("loda", "seq_lora", "frozen")


def recorded(run: Path) -> dict[str, tuple[list[int], list[int]]]:
    counts = read_json(run / "summary.json")["counts"]
    return {kind: (c["correct"][-1], c["total"][-1]) for kind, c in counts.items()}


def evaluated(run: Path) -> dict[str, tuple[list[int], list[int]]]:
    return {kind: (r["correct"], r["total"]) for kind, r in evaluate_run(run).items()}


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_reproduces_the_recorded_counts(
    method: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = finished(tmp_path_factory, method)
    expected = recorded(run)
    copy = shutil.copytree(run, tmp_path / "copy")
    for name in ("metrics.jsonl", "summary.json", "accuracy.png", "environment.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "tasks")
    assert evaluated(copy) == expected
    results = evaluate_run(copy)
    assert next(iter(results)) == "nearest_mean"  # the primary read-out first
    for kind, result in results.items():
        correct, total = expected[kind]
        assert result["accuracy"] == sum(correct) / sum(total)
        assert result["by_task"] == [sum(correct[k : k + 2]) / 6 for k in (0, 2, 4)]


def test_evaluation_changes_nothing_in_the_run(run: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")}
    evaluate_run(run)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*")} == before


@pytest.mark.parametrize("size", [1, 5, 18, 1000])
def test_evaluation_does_not_depend_on_the_batch_size(run: Path, copy: Path, size: int) -> None:
    set_in_config(copy, "train", eval_batch_size=size)
    assert evaluated(copy) == recorded(run)


def test_evaluation_does_not_depend_on_the_order_of_the_images(run: Path) -> None:
    classifier = training.load(run)
    test = build_stream(classifier.experiment.data, classifier.experiment.seed).test
    images = test.with_transform(evaluation_transform(classifier.experiment.data))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(3)).tolist()
    for kind, (correct, total) in recorded(run).items():
        hits, seen = [0] * 6, [0] * 6
        for first in range(0, len(order), 4):
            items = [images[k] for k in order[first : first + 4]]
            scores = classifier.logits(torch.stack([pixels for pixels, _ in items]), kind)
            for best, (_, label) in zip(scores.argmax(1).tolist(), items, strict=True):
                hits[label] += int(best == label)
                seen[label] += 1
        assert (hits, seen) == (correct, total)


def test_a_run_on_held_out_images_is_evaluated_without_the_test_split(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = shutil.copytree(tree(tmp_path_factory), tmp_path / "data")
    run = finished(
        tmp_path_factory, "frozen", data={"root": str(data), "validation": 0.34}, keep={}
    )
    shutil.rmtree(data / "test")
    assert evaluated(run) == recorded(run)
