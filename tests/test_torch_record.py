"""What the record of a task says of its directions and its merge, against inputs seen here."""

import json
import math
from typing import Any

import pytest
import torch
from tiny_models import (
    MLP,
    WIDTHS,
    batches,
    begin,
    end,
    fit,
    inputs,
    learn,
    mlp,
    same,
    small,
    snapshot,
    totals,
    vit,
)
from torch import Tensor, nn

from backends.torch import LoDA, LoDASettings
from backends.torch.moments import collect_halves
from loda_math import general_subspace, isolated_subspace


def layer_inputs(model: nn.Module, task: int) -> dict[str, Tensor]:
    """What goes into every target layer, over all images of a task."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        return lambda _, x: seen.update({name: x[0].detach()})

    handles = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in WIDTHS]
    with torch.no_grad():
        model(inputs(task, model)[0])
    for handle in handles:
        handle.remove()
    return seen


def mean_square(x: Tensor) -> float:
    return float((x**2).sum(dim=-1).mean())


# The effect of the merge


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"joint": True, "recalibration": "scalar"},
        {"branches": "general", "recalibration": "direction"},
        {"branches": "isolated"},
        {"recalibration": "none"},
        {"history": "trained"},
        {"history": "both"},
        {"history_decay": 0.4},
    ],
    ids=str,
)
def test_predicted_effect_is_the_change_of_the_outputs(options: dict[str, Any]) -> None:
    """Old and new inputs are recorded, and sent through the weights around the merge."""
    method = small(**options)
    passes, decay = method.settings.passes(), method.settings.history_decay
    remembered: list[list[dict[str, Tensor]]] = []
    for task in range(3):
        previous = layer_inputs(method.model, task)
        before = snapshot(method.model)
        begin(method, task)
        fit(method, task)
        trained = layer_inputs(method.model, task)
        record = end(method, task)
        seen = {"trained": trained, "merged": layer_inputs(method.model, task)}
        assert set(record.effects) == (set(WIDTHS) if task else set())
        ages = [decay ** (task - 1 - past) for past in range(task)]
        for name, effect in record.effects.items():
            merged = method.model.get_submodule(name).weight.detach() - before[f"{name}.weight"]
            whole = sum(
                w * record.ups[name][b] @ record.downs[name][b]
                for b, w in record.weights[name].items()
            )
            new = (trained if record.trained else previous)[name]
            old = [[x[name] for x in seen_then] for seen_then in remembered]
            change, unweighted = (
                sum(
                    age * sum(mean_square(x @ update.mT) for x in tokens) / len(tokens)
                    for age, tokens in zip(ages, old, strict=True)
                )
                / sum(ages)
                for update in (merged, whole)
            )
            assert float(effect.old_change) == pytest.approx(change)
            assert float(effect.old_change_before) == pytest.approx(unweighted)
            assert float(effect.new_change) == pytest.approx(mean_square(new @ whole.mT))
            lost = mean_square(new @ (whole - merged).mT)
            assert float(effect.new_loss) == pytest.approx(lost, rel=1e-9, abs=1e-20)
            if record.coefficients:
                assert change < 0.99 * unweighted
        remembered.append([seen[kind] for kind in passes])


# Held-out ratios


def test_heldout_ratios_are_those_of_the_rule_across_two_halves() -> None:
    method = small(heldout=True)
    assert learn(method, 0).heldout == {}
    old = totals(method)
    _, halves = collect_halves(method.model, batches(1, method.model), MLP["target"])
    record = learn(method, 1)
    for name, (first, second) in halves.items():
        rules = {
            "general": lambda new, name=name: general_subspace(new, old[name], 3),
            "isolated": lambda new, name=name: isolated_subspace(new, old[name], 3),
        }
        assert list(record.heldout[name]) == list(rules)
        for branch, choose in rules.items():
            ratio = record.heldout[name][branch]
            chosen, heldout, energy = 0.0, 0.0, 0.0
            for here, there in ((first, second), (second, first)):
                basis = choose(here)
                share = [
                    float(torch.trace(basis.mT @ m @ basis) / m.trace())
                    for m in (here, there, old[name])
                ]
                chosen += share[0] / share[2] / 2
                heldout += share[1] / share[2] / 2
                energy += share[1] / 2
            assert float(ratio.chosen) == pytest.approx(chosen)
            assert float(ratio.heldout) == pytest.approx(heldout)
            assert float(ratio.energy) == pytest.approx(energy)


def test_directions_of_single_images_do_not_hold_out() -> None:
    """Twenty images at random in forty dimensions: what one half has, the other lacks."""
    torch.manual_seed(0)
    method = LoDA(nn.Sequential(nn.Linear(40, 2)), LoDASettings(target="0", rank=5, heldout=True))
    for task in range(2):
        x = torch.randn(20 if task else 400, 40)
        method.begin_task([x])
        record = method.end_task([x])
    for ratio in record.heldout["0"].values():
        assert float(ratio.heldout) < 0.6 * float(ratio.chosen)


@pytest.mark.parametrize("build", [mlp, vit])
def test_measuring_does_not_change_the_run(build: Any) -> None:
    finals = []
    for heldout in (False, True):
        method = small(build, heldout=heldout)
        for task in range(2):
            record = learn(method, task)
        assert bool(record.heldout) is heldout
        state = {key: x for key, x in method.state_dict().items() if key != "settings"}
        finals.append((snapshot(method.model), state, record.moment_tensors()))
    assert all(same(a, b) for a, b in zip(*finals, strict=True))


def test_nothing_is_measured_for_bases_of_the_callers_own() -> None:
    method = small(heldout=True)
    learn(method, 0)
    bases = {
        name: {b: torch.eye(width, 3, dtype=torch.float64) for b in ("isolated", "general")}
        for name, width in WIDTHS.items()
    }
    method.begin_task(batches(1, method.model), bases=bases)
    assert all(list(x.branches) == ["general", "isolated"] for x in method.layers.values())
    assert end(method, 1).heldout == {}


def test_a_task_of_one_image_has_no_held_out_ratio() -> None:
    method = small(heldout=True)
    learn(method, 0)
    one = [inputs(1, method.model)[0][:1]]
    with pytest.warns(UserWarning, match="tokens"):
        method.begin_task(one)
    assert method.end_task(one).heldout == {}


def test_state_with_ratios_of_the_wrong_shape_is_refused() -> None:
    method, twin = small(heldout=True), small(heldout=True)
    learn(method, 0)
    begin(method, 1)
    state = method.state_dict() | {"heldout/isolated/2": torch.zeros(2)}
    with pytest.raises(ValueError, match="state"):
        twin.load_state_dict(state)


# Numbers for a log, tensors for files


def test_record_gives_flat_tensors_for_files() -> None:
    method = small(history="both")
    learn(method, 0)
    record = learn(method, 1)
    kinds = {"coefficients", *(f"{k}/{b}" for k in ("down", "up") for b in ("general", "isolated"))}
    assert set(record.branch_tensors()) == {f"{k}/{n}" for k in kinds for n in WIDTHS}
    passes = ("new", "trained", "merged")
    assert set(record.moment_tensors()) == {f"{p}/{n}" for p in passes for n in WIDTHS}
    assert all(not t.requires_grad for t in record.branch_tensors().values())


def test_diagnostics_are_plain_numbers_for_json() -> None:
    method = small(heldout=True, isolated="null", rank=2, target=("0",))
    # Old inputs in three of six dimensions: null directions have a ratio of infinity.
    x = inputs(0, method.model)[0] * torch.tensor([1, 1, 1, 0, 0, 0])
    method.begin_task([x])
    assert method.end_task([x]).diagnostics() == {}
    record = learn(method, 1)
    assert math.isinf(record.heldout["0"]["isolated"].heldout)
    logged = json.loads(json.dumps(record.diagnostics(), allow_nan=False))
    assert list(logged) == ["0"]
    assert set(logged["0"]["heldout"]) == {"general", "isolated"}
    assert logged["0"]["heldout"]["isolated"]["heldout"] is None
    general = record.heldout["0"]["general"]
    assert logged["0"]["heldout"]["general"] == {k: float(v) for k, v in general._asdict().items()}
    effect = record.effects["0"]
    assert logged["0"]["effect"] == {k: float(v) for k, v in effect._asdict().items()}
