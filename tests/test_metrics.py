"""Metrics against a brute-force walk over single predictions."""

import json
from math import isnan, nan
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from training.metrics import AccuracyMatrix, Meter, class_counts, count_correct


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], list[list[list[bool]]]]:
    """Sizes, and for every task learned and class seen whether each test image was right."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    images = [draw(st.integers(1, 5)) for _ in range(sum(sizes))]
    outcomes = []
    for task in range(len(sizes)):
        seen = sum(sizes[: task + 1])
        outcomes.append(
            [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in images[:seen]]
        )
    return sizes, outcomes


def build(sizes: list[int], outcomes: list[list[list[bool]]]) -> AccuracyMatrix:
    matrix = AccuracyMatrix()
    for size, row in zip(sizes, outcomes, strict=True):
        matrix = matrix.extended(size, [sum(c) for c in row], [len(c) for c in row])
    return matrix


def accuracy(classes: list[list[bool]], *, macro: bool) -> float:
    if macro:
        return sum(sum(c) / len(c) for c in classes) / len(classes)
    flat = [hit for c in classes for hit in c]
    return sum(flat) / len(flat)


@given(stream=streams())
def test_against_single_predictions(stream: tuple[list[int], list[list[list[bool]]]]) -> None:
    sizes, outcomes = stream
    matrix = build(sizes, outcomes)
    summary = matrix.summary()
    count = len(sizes)
    for prefix, macro in (("", False), ("macro_", True)):
        a = {}
        for i in range(count):
            begin = 0
            for j in range(i + 1):
                a[i, j] = accuracy(outcomes[i][begin : begin + sizes[j]], macro=macro)
                begin += sizes[j]
        curve = [accuracy(row, macro=macro) for row in outcomes]
        forgotten, transfer = [], 0.0
        for j in range(count - 1):
            best = max(a[i, j] for i in range(j, count))
            forgotten.append(best - a[count - 1, j])
            transfer += (a[count - 1, j] - a[j, j]) / (count - 1)
        assert summary[f"{prefix}last"] == pytest.approx(curve[-1])
        assert summary[f"{prefix}average"] == pytest.approx(sum(curve) / count)
        assert summary[f"{prefix}forgetting"] == pytest.approx(sum(forgotten) / max(count - 1, 1))
        assert summary[f"{prefix}backward_transfer"] == pytest.approx(transfer)
        if not macro:
            flat = {(i, j): v for i, row in enumerate(summary["matrix"]) for j, v in enumerate(row)}
            assert flat == pytest.approx(a)
            assert matrix.forgetting_by_task == pytest.approx(forgotten)
            old = [
                accuracy(row[:-size], macro=False)
                for size, row in zip(sizes[1:], outcomes[1:], strict=True)
            ]
            assert matrix.old_curve == pytest.approx([nan, *old], nan_ok=True)


@given(stream=streams())
def test_json_round_trip(stream: tuple[list[int], list[list[list[bool]]]]) -> None:
    matrix = build(*stream)
    assert AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict()))) == matrix
    json.dumps(matrix.summary(), allow_nan=False)


def test_unequal_tasks_count_images_not_tasks() -> None:
    matrix = AccuracyMatrix((1, 1), ((90,), (90, 0)), ((90,), (90, 10)))
    assert matrix.last == pytest.approx(0.9)
    assert matrix.macro_curve[-1] == pytest.approx(0.5)


def test_forgetting_is_never_negative_while_transfer_may_be_positive() -> None:
    matrix = AccuracyMatrix((1, 1), ((5,), (9, 10)), ((10,), (10, 10)))
    assert matrix.forgetting == 0
    assert matrix.backward_transfer == pytest.approx(0.4)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40),
    cut=st.integers(0, 40),
)
def test_counts_of_batches_add_up(pairs: list[tuple[int, int]], cut: int) -> None:
    def counts(part: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        p = torch.tensor([p for p, _ in part], dtype=torch.int64)
        return class_counts(p, torch.tensor([y for _, y in part], dtype=torch.int64), 5)

    whole, first, second = counts(pairs), counts(pairs[:cut]), counts(pairs[cut:])
    for k in range(2):
        assert whole[k] == [a + b for a, b in zip(first[k], second[k], strict=True)]
    assert whole[0] == [sum(p == y == c for p, y in pairs) for c in range(5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1,), ((1, 2),), ((1, 2),)), "1 classes"),
        (((1,), ((0,),), ((0,),)), "no image"),
        (((2,), ((0, 1),), ((-1, 1),)), "0 to -1"),
        (((1,), ((3,),), ((2,),)), "0 to 2, got 3"),
        (((1, 1), ((1,),), ((1,),)), "2 tasks"),
        (((0,), ((),), ((),)), "task 1"),
    ],
)
def test_impossible_counts(arguments: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix(*arguments)  # type: ignore[arg-type]


def test_counts_of_other_labels_or_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        class_counts(torch.tensor([0]), torch.tensor([2]), 2)
    with pytest.raises(ValueError, match="length"):
        class_counts(torch.tensor([0, 1]), torch.tensor([1]), 2)
    with pytest.raises(KeyError):
        AccuracyMatrix.from_dict({"sizes": []})


def test_a_given_task_leaves_its_own_classes_as_candidates() -> None:
    features = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    labels = torch.tensor([0, 2, 2])
    classifiers: Any = {"same": SimpleNamespace(logits=lambda x: x)}
    free = count_correct(classifiers, features, labels, 3)
    given = count_correct(classifiers, features, labels, 3, task_sizes=[1, 2])
    assert free == {"same": ([1, 0, 0], [1, 0, 2])}
    assert given == {"same": ([1, 0, 1], [1, 0, 2])}


def test_the_meter_weighs_batches_by_their_images() -> None:
    meter = Meter()
    assert meter.read() == {"loss": 0.0, "accuracy": 0.0}
    meter.add(torch.tensor(1.0), 3)
    meter.add(torch.tensor(5.0), 1)
    meter.count(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    assert meter.read() == {"loss": 2.0, "accuracy": 0.5}


@given(streams(), st.data())
def test_classes_without_images_count_in_no_mean(
    stream: tuple[list[int], list[list[list[bool]]]], data: st.DataObject
) -> None:
    sizes, outcomes = stream
    last = outcomes[-1]
    gone = data.draw(st.sets(st.integers(0, len(last) - 1), max_size=len(last) - 1))
    left = [[] if label in gone else hits for label, hits in enumerate(last)]
    matrix = build(sizes, [*outcomes[:-1], left])
    present = [hits for hits in left if hits]
    assert matrix.last == pytest.approx(accuracy(present, macro=False))
    assert matrix.macro_curve[-1] == pytest.approx(accuracy(present, macro=True))
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    parts = [left[a : a + size] for a, size in zip(starts, sizes, strict=True)]
    empty = [not any(part) for part in parts]
    assert [isnan(x) for x in matrix.matrix[-1]] == empty
    whole = build(sizes, outcomes)
    measured = [j for j in range(len(sizes) - 1) if not empty[j]]
    assert [isnan(x) for x in matrix.forgetting_by_task] == empty[:-1]
    if measured and not gone:
        assert matrix.forgetting == whole.forgetting
    summary = matrix.summary()
    assert [x is None for x in summary["matrix"][-1]] == empty
    json.dumps(summary, allow_nan=False)
    assert AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict()))) == matrix


def test_the_last_row_can_be_measured_again() -> None:
    matrix = AccuracyMatrix((1, 1), ((9,), (6, 4)), ((10,), (10, 5)))
    assert matrix.updated((7, 5), (12, 6)).to_dict() == {
        "sizes": [1, 1],
        "correct": [[9], [7, 5]],
        "total": [[10], [12, 6]],
    }
