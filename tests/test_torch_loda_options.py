"""LoDA over whole models: other directions, other coefficients and other weights of the history."""

from typing import Any

import pytest
import torch
from tiny_models import MLP, WIDTHS, batches, fit, learn, means, mlp, same, snapshot, totals
from torch import Tensor

from backends.torch import LoDA, LoDASettings
from loda_math import isolated_subspace, recalibration, trace_ratio_subspace


def loda(**settings: Any) -> LoDA:
    return LoDA(mlp(), LoDASettings(**{**MLP, **settings}))


# Directions


def ratio(down: Tensor, new: Tensor, old: Tensor) -> float:
    """Objective of the trace ratio, written out."""
    size = len(new)
    regular = old / old.trace() + 1e-2 / size * torch.eye(size, dtype=old.dtype)
    energy = torch.trace(down @ new @ down.mT) / new.trace()
    return float(energy / torch.trace(down @ regular @ down.mT))


def test_trace_ratio_takes_the_directions_of_the_largest_ratio() -> None:
    ratios: dict[str, dict[str, float]] = {}
    for rule in ("pencil", "trace_ratio", "null"):
        method = loda(isolated=rule)
        learn(method, 0)
        new = means(method.model, 1, MLP["target"])
        method.begin_task(batches(1, method.model))
        for name, layer in method.layers.items():
            down = layer.branch("isolated").down.detach() * 3**0.5
            ratios.setdefault(name, {})[rule] = ratio(down, new[name], method.history[name].total)
            if rule == "trace_ratio":
                basis = trace_ratio_subspace(new[name], method.history[name].total, 3)
                torch.testing.assert_close(down, basis.mT)
    for by_rule in ratios.values():
        assert by_rule["trace_ratio"] > 1.001 * max(by_rule["pencil"], by_rule["null"])


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_energy_floor_keeps_its_share_of_what_the_task_offers(floor: float) -> None:
    method = loda(isolated="trace_ratio", energy_floor=floor)
    learn(method, 0)
    new = means(method.model, 1, MLP["target"])
    method.begin_task(batches(1, method.model))
    for name, layer in method.layers.items():
        down = layer.branch("isolated").down.detach() * 3**0.5
        most = torch.linalg.eigvalsh(new[name])[-3:].sum()
        carried = float(torch.trace(down @ new[name] @ down.mT) / most)
        assert carried >= floor - 1e-9
        if floor == 1.0:
            assert carried == pytest.approx(1.0)
        basis = isolated_subspace(new[name], method.history[name].total, 3, energy_floor=floor)
        torch.testing.assert_close(down, basis.mT)


# Coefficients


def by_hand(record: Any, name: str, new: Tensor, old: Tensor, gamma: float) -> tuple[Tensor, ...]:
    """B, A and the minimiser over the stacked branches, from Theorem 2.3."""
    weights = {b: w for b, w in record.weights.items() if b in record.ups[name]}
    up = torch.cat([w * record.ups[name][b] for b, w in weights.items()], dim=1)
    down = torch.cat([record.downs[name][b] for b in weights])
    p, q = (down @ moment @ down.mT for moment in (old, new))
    middle: Tensor = gamma * torch.linalg.solve(p + gamma * q, q, left=False)
    return up, down, middle


@pytest.mark.parametrize("branches", ["both", "isolated"])
def test_joint_recalibration_reaches_all_branches(branches: str) -> None:
    method = loda(joint=True, branches=branches, gamma=0.7)
    learn(method, 0)
    for task in (1, 2):
        before, old = snapshot(method.model), totals(method)
        method.begin_task(batches(task, method.model))
        fit(method, task)
        trained = means(method.model, task, MLP["target"])
        record = method.end_task(batches(task, method.model))
        for name in WIDTHS:
            up, down, middle = by_hand(record, name, trained[name], old[name], 0.7)
            assert len(middle) == (6 if branches == "both" else 3)
            torch.testing.assert_close(record.coefficients[name], middle, rtol=1e-5, atol=1e-7)
            assert float((middle - torch.eye(len(middle))).abs().max()) > 0.05
            expected = before[f"{name}.weight"] + up @ middle @ down
            torch.testing.assert_close(method.model.get_submodule(name).weight.detach(), expected)


def test_joint_makes_no_difference_to_a_general_branch_alone() -> None:
    plain, joint = loda(branches="general"), loda(branches="general", joint=True)
    for task in range(2):
        learn(plain, task)
        learn(joint, task)
    for name in WIDTHS:
        torch.testing.assert_close(
            joint.model.get_submodule(name).weight, plain.model.get_submodule(name).weight
        )


@pytest.mark.parametrize("joint", [False, True])
def test_box_keeps_every_direction_between_dropped_and_whole(joint: bool) -> None:
    method = loda(recalibration="box", joint=joint)
    learn(method, 0)
    record = learn(method, 1)
    for middle in record.coefficients.values():
        diagonal = middle.diagonal()
        assert torch.equal(middle, torch.diag(diagonal))
        assert float(diagonal.min()) >= 0
        assert float(diagonal.max()) <= 1
        assert len(diagonal) == (6 if joint else 3)


# Weights of the history


@pytest.mark.parametrize("history", ["merged", "both"])
@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
def test_old_tasks_fade_from_the_history(history: str, decay: float) -> None:
    method = loda(history=history, history_decay=decay)
    expected = {n: torch.zeros(w, w, dtype=torch.float64) for n, w in WIDTHS.items()}
    mass = 0.0
    for task in range(3):
        assert all(h.weight == pytest.approx(mass) for h in method.history.values())
        record = learn(method, task)
        passes = [record.merged] + ([record.trained] if history == "both" else [])
        mass = decay * mass + len(passes)
        for name in WIDTHS:
            expected[name] = decay * expected[name] + sum(found[name] for found in passes)
            torch.testing.assert_close(method.history[name].total, expected[name])


def test_a_history_that_fades_changes_the_directions() -> None:
    fading, whole = loda(history_decay=0.3), loda()
    for task in range(2):
        learn(fading, task)
        learn(whole, task)
    assert not torch.allclose(fading.history["0"].total, whole.history["0"].total)
    for method in (fading, whole):
        method.begin_task(batches(2, method.model))
    first, second = (m.layers["0"].branch("isolated").down for m in (fading, whole))
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize(("history_weight", "decay"), [(0.0, 1.0), (2.5, 1.0), ("mean", 0.5)])
@pytest.mark.parametrize("history", ["merged", "both"])
def test_weight_of_the_history_in_the_recalibration(
    history_weight: Any, decay: float, history: str
) -> None:
    method = loda(history_weight=history_weight, history_decay=decay, history=history)
    learn(method, 0)
    for task in (1, 2):
        old, mass = totals(method), 1.0 if task == 1 else 1.5
        weight = 1 / (mass * (2 if history == "both" else 1))
        if history_weight != "mean":
            weight = history_weight
        method.begin_task(batches(task, method.model))
        fit(method, task)
        trained = means(method.model, task, MLP["target"])
        record = method.end_task(batches(task, method.model))
        for name in WIDTHS:
            up, down = record.ups[name]["general"], record.downs[name]["general"]
            middle = recalibration(up, down, trained[name], weight * old[name], 1.5)
            torch.testing.assert_close(record.coefficients[name], middle, rtol=1e-5, atol=1e-6)
            if history_weight == 0.0:
                whole = torch.eye(3, dtype=torch.float64)
                torch.testing.assert_close(middle, whole, rtol=1e-5, atol=1e-6)


# Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"energy_floor": 1.5, "isolated": "trace_ratio"}, "energy_floor must be a share"),
        ({"energy_floor": 0.5}, "energy_floor"),
        ({"energy_floor": 0.5, "isolated": "null"}, "energy_floor"),
        ({"joint": True, "recalibration": "none"}, "joint"),
        ({"history_decay": -0.1}, "history_decay must be a share"),
        ({"history_decay": float("nan")}, "history_decay must be a share"),
        ({"history_weight": -1.0}, "history_weight must be 'mean' or at least 0"),
        ({"history_weight": "sum"}, "history_weight must be 'mean' or at least 0, got 'sum'"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LoDASettings(**wrong)


def test_every_option_survives_the_middle_of_a_task() -> None:
    options: dict[str, Any] = {
        "isolated": "trace_ratio", "energy_floor": 0.7, "recalibration": "box", "joint": True,
        "history_weight": "mean", "history_decay": 0.5, "heldout": True,
    }  # fmt: skip
    source, twin = loda(**options), loda(**options)
    learn(source, 0)
    source.begin_task(batches(1, source.model))
    fit(source, 1)
    twin.load_state_dict({k: v.clone() for k, v in source.state_dict().items()})
    twin.model.load_state_dict(source.model.state_dict())
    records = [x.end_task(batches(1, x.model)) for x in (source, twin)]
    assert records[0].diagnostics() == records[1].diagnostics()
    assert same(snapshot(source.model), snapshot(twin.model))
    assert same(source.state_dict(), twin.state_dict())
