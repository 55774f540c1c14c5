"""Finished runs evaluated again from the weights alone: counts, confusions, what differs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import repaint
from run_contents import contents, resealed, set_in_config
from small_runs import finished, tree

from training.analysis.evaluate import Evaluation, evaluate_run, evaluation_text
from training.analysis.predict import load
from training.config import read_experiment
from training.data import build_stream
from training.data import test_transform as evaluation_transform
from training.run_dir import read_json

MODEL, READOUT_FILE = "model.safetensors", "readouts.safetensors"
Counts = dict[str, tuple[list[int], list[int]]]


def recorded(run: Path) -> Counts:
    counts = read_json(run / "summary.json")["counts"]
    return {name: (c["correct"][-1], c["total"][-1]) for name, c in counts.items()}


def evaluated(run: Path) -> Counts:
    return {name: (r.correct, r.total) for name, r in evaluate_run(run).items()}


@pytest.mark.parametrize("method", ["loda", "seq_lora", "joint", "frozen"])
def test_evaluation_reproduces_the_recorded_counts(
    method: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = finished(tmp_path_factory, method)
    expected = recorded(run)
    needed = ("config.yaml", "classes.json", "manifest.json", MODEL, READOUT_FILE)
    for name in needed:
        shutil.copy(run / name, tmp_path)
    before = contents(tmp_path)
    results = evaluate_run(tmp_path)
    assert next(iter(results)) == "nearest_mean"  # the primary read-out first
    assert results.keys() == expected.keys()
    for name, result in results.items():
        correct, total = expected[name]
        assert (result.correct, result.total) == (correct, total)
        assert result.accuracy == sum(correct) / sum(total)
        assert result.recorded is None  # the summary is not here
        size = 6 if method == "joint" else 2
        parts = [correct[k : k + size] for k in range(0, 6, size)]
        assert result.by_task == [sum(part) / (3 * size) for part in parts]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_evaluation_does_not_depend_on_the_batch_size(run: Path, copy: Path, size: int) -> None:
    set_in_config(copy, "train", eval_batch_size=size)
    assert evaluated(copy) == recorded(run)


def test_evaluation_does_not_depend_on_the_order_of_the_images(run: Path) -> None:
    classifier = load(run)
    test = build_stream(classifier.experiment.data, classifier.experiment.seed).test
    images = test.with_transform(evaluation_transform(classifier.experiment.data))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(3)).tolist()
    for name, (correct, total) in recorded(run).items():
        hits, seen = [0] * 6, [0] * 6
        for first in range(0, len(order), 4):
            items = [images[k] for k in order[first : first + 4]]
            scores = classifier.logits(torch.stack([pixels for pixels, _ in items]), name)
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
    for image in (data / "test").rglob("*.png"):  # that there is a test split is all it knows
        image.write_text("no image")
    assert evaluated(run) == recorded(run)


def test_data_of_other_classes_are_refused(
    copy: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = shutil.copytree(tree(tmp_path_factory), tmp_path / "data")
    for split in ("train", "test"):
        (data / split / "red").rename(data / split / "zinnober")
    with pytest.raises(ValueError, match="classes"):
        evaluate_run(copy, root=str(data))
    shutil.rmtree(data)
    with pytest.raises(FileNotFoundError, match="root"):
        evaluate_run(copy, root=str(data))
    assert load(copy).classes  # prediction needs no data


def test_test_images_that_changed_are_told(copy: Path, tmp_path: Path) -> None:
    root = tmp_path / "squares"
    shutil.copytree(read_experiment(copy / "config.yaml").data.options["root"], root)
    evaluate_run(copy, root=str(root))  # no warning: only the place is another one
    image = root / "test" / "red" / "0.png"
    repaint(image, 1)
    with pytest.warns(RuntimeWarning, match=r"recorded 18 \(.*found 18 \("):
        evaluate_run(copy, root=str(root))
    image.unlink()
    with pytest.warns(RuntimeWarning, match="found 17"):
        evaluate_run(copy, root=str(root))


def test_what_is_measured_is_compared_with_the_record(run: Path, copy: Path) -> None:
    for name, result in evaluate_run(run).items():
        assert result.is_as_recorded
        assert "as recorded" in evaluation_text(name, result)
    summary = read_json(copy / "summary.json")
    counts = summary["counts"]["heads"]["correct"][-1]
    counts[2] -= 1 if counts[2] else -1
    (copy / "summary.json").write_text(json.dumps(summary), "utf-8")
    results = evaluate_run(resealed(copy))
    assert not results["heads"].is_as_recorded
    assert "1 class differs" in evaluation_text("heads", results["heads"])
    assert results["ridge"].is_as_recorded


def test_the_calibration_is_that_of_the_record(run: Path) -> None:
    recorded_here = read_json(run / "summary.json")["calibration"]
    for name, result in evaluate_run(run).items():
        if name in recorded_here:
            assert result.calibration == pytest.approx(
                {key: recorded_here[name][key] for key in ("error", "confidence")}
            )
        else:
            assert result.calibration is None


def test_the_first_five_hold_the_class_at_least_as_often_as_the_first(run: Path) -> None:
    for result in evaluate_run(run).values():
        assert result.accuracy <= result.top <= 1


def confused(confusion: list[list[int]]) -> Evaluation:
    size = len(confusion)
    names = [f"class {k}" for k in range(size)]
    tasks = [(k,) for k in range(size)]
    return Evaluation(names, tasks, np.array(confusion), 1.0, None, None)


def test_classes_that_are_confused_are_named_with_how_often() -> None:
    result = confused([[8, 2, 0], [0, 10, 0], [3, 0, 7]])
    table = result.by_class()
    assert list(table["correct"]) == [8, 10, 7]
    assert list(table["taken_for"].fillna("-")) == ["class 1", "-", "class 0"]
    assert list(table["times"]) == [2, 0, 3]
    text = evaluation_text("heads", result)
    assert text.index("class 2 taken for class 0: 3 of 10") < text.index(
        "class 0 taken for class 1"
    )
    assert "taken for" not in evaluation_text("heads", result, details=False)


def test_of_many_classes_the_worst_are_listed() -> None:
    grid = np.eye(40, dtype=int) * 9
    grid[7, 3] = 1
    text = evaluation_text("heads", confused(grid.tolist()))
    assert "class 7 " in text
    assert text.count("of 9,") == 9  # ten in all
    assert "of 10, task 8" in text


def test_evaluation_on_a_device_that_is_not_there(run: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ValueError, match="cuda"):
        evaluate_run(run, device="cuda")
