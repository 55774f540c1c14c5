"""LoDA over whole models: what the start of a task puts in place, and what it refuses."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import MLP, WIDTHS, batches, breaking, fit, learn, means, mlp, same, snapshot, totals
from torch import Tensor, nn

from backends.torch import LoDA, LoDASettings, adapt
from loda_math import general_subspace, isolated_subspace, null_subspace

# Directions and what is trained on them


def test_first_task_trains_the_general_branch_and_its_down_projection() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    loda.begin_task(batches(0, model))
    expected = {n: general_subspace(m, None, 3) for n, m in means(mlp(), 0, MLP["target"]).items()}
    for name, layer in loda.layers.items():
        assert list(layer.branches) == ["general"]
        branch = layer.branch("general")
        assert branch.scale == 0.25
        assert branch.down.requires_grad
        torch.testing.assert_close(branch.down.detach() * 3**0.5, expected[name].mT)
        assert torch.count_nonzero(branch.up) == 0
    before = {n: layer.branch("general").down.clone() for n, layer in loda.layers.items()}
    fit(loda, 0)
    record = loda.end_task(batches(0, model))
    assert all(not torch.equal(record.downs[n]["general"], before[n]) for n in before)
    assert record.weights == {"general": 0.25}
    assert record.coefficients == {}


def test_later_tasks_train_two_up_projections_on_frozen_directions() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    learn(loda, 0)
    old, new = totals(loda), means(model, 1, MLP["target"])
    loda.begin_task(batches(1, model))
    for name, layer in loda.layers.items():
        wanted = {
            "general": general_subspace(new[name], old[name], 3),
            "isolated": isolated_subspace(new[name], old[name], 3, ridge=1e-2),
        }
        assert list(layer.branches) == list(wanted)
        for branch, basis in wanted.items():
            found = layer.branch(branch)
            torch.testing.assert_close(found.down.detach() * 3**0.5, basis.mT)
            assert not found.down.requires_grad
            assert found.scale == {"general": 0.25, "isolated": 0.5}[branch]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{layer}.branches.{b}.up" for layer in WIDTHS for b in ("general", "isolated")
    }
    assert {id(p) for p in loda.trainable_parameters()} == {id(p) for p in loda.lora_parameters()}
    downs = [layer.branch(b).down for layer in loda.layers.values() for b in layer.branches]
    before = [d.clone() for d in downs]
    fit(loda, 1)
    assert all(torch.equal(a, b) for a, b in zip(downs, before, strict=True))


def test_null_ablation_takes_the_quietest_directions_of_the_history() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP, isolated="null"))
    learn(loda, 0)
    loda.begin_task(batches(1, model))
    for name, layer in loda.layers.items():
        basis = null_subspace(loda.history[name].total, 3)
        torch.testing.assert_close(layer.branch("isolated").down.detach() * 3**0.5, basis.mT)


def test_branches_separate_old_from_new_tasks_better_than_general_ones() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    learn(loda, 0)
    loda.begin_task(batches(1, model))
    new, old = means(model, 1, "0")["0"], loda.history["0"].total
    ratio = {}
    for branch in ("general", "isolated"):
        down = loda.layers["0"].branch(branch).down.detach()
        ratio[branch] = float(torch.trace(down @ new @ down.T) / torch.trace(down @ old @ down.T))
    assert ratio["isolated"] > 2 * ratio["general"]


# Failures


@pytest.mark.parametrize(
    "given",
    [
        [],
        [torch.full((2, 6), float("nan"), dtype=torch.float64)],
        [torch.zeros(2, 7, dtype=torch.float64)],
        breaking([torch.zeros(2, 6, dtype=torch.float64)], KeyboardInterrupt()),
    ],
)
def test_begin_task_that_fails_leaves_the_model_as_it_was(given: Any) -> None:
    model = mlp().eval()
    loda = LoDA(model, LoDASettings(**MLP))
    learn(loda, 0)
    modules, state = list(model.modules()), snapshot(model)
    history = totals(loda)
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        loda.begin_task(given)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert same(snapshot(model), state)
    assert same(totals(loda), history)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    learn(loda, 1)
    assert loda.tasks == 2


def test_model_adapted_by_somebody_else_is_refused_before_any_batch() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    adapt(model, "2")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}

    def never() -> Iterator[Tensor]:
        pytest.fail("a batch was asked for")
        yield torch.ones(1)

    with pytest.raises(ValueError, match=r"\['2'\] are adapted already"):
        loda.begin_task(never())
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen


# Settings that do not fit are known at the start


def test_settings_that_do_not_fit_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"rank 7 is above the input size.*\{'0': 6\}"):
        LoDA(mlp(), LoDASettings(target=("0", "2"), rank=7))
    with pytest.raises(ValueError, match=r"matches no linear layer; linear layers here: 0, 2"):
        LoDA(mlp())
    for wrong in (
        {"rank": 0}, {"rank": 2.0}, {"rank": True}, {"gamma": -1.0}, {"ridge": float("nan")},
        {"general_weight": float("inf")}, {"branches": "none"}, {"isolated": "pca"},
        {"recalibration": "exact"}, {"history": "all"}, {"down_scale": -0.1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            LoDASettings(**wrong)  # type: ignore[arg-type]
    assert type(LoDASettings(rank=np.int64(3)).rank) is int  # type: ignore[arg-type]


def test_trainable_pattern_without_a_match_is_an_error() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP), trainable=["head.*"])
    with pytest.raises(ValueError, match=r"'head\.\*' matches no parameter; parameters: 0\.weight"):
        loda.begin_task(batches(0, model))
    assert all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is nn.Linear


# Bases of the caller's own


def bases(task: int = 0) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(7)
    names = ("general",) if task == 0 else ("general", "isolated")
    return {
        layer: {n: torch.linalg.qr(torch.randn(width, 3, dtype=torch.float64))[0] for n in names}
        for layer, width in WIDTHS.items()
    }


def test_injected_bases_are_used_as_they_are() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP, down_scale=0.5))
    for task in range(2):
        given = bases(task)
        loda.begin_task(batches(task, model), bases=given)
        for name, layer in loda.layers.items():
            assert list(layer.branches) == list(given[name])
            for branch, basis in given[name].items():
                assert torch.equal(layer.branch(branch).down, basis.mT * 0.5)
        record = loda.end_task(batches(task, model))
        torch.testing.assert_close(record.new, means(mlp(), task, MLP["target"]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b.pop("2"), r"must name the layers \['0', '2', '4'\], got \['0', '4'\]"),
        (lambda b: b.update(x=b["0"]), "must name the layers"),
        (lambda b: b["2"].pop("general"), r"bases of layer '2' must have shapes"),
        (lambda b: b["2"].update(isolated=torch.zeros(10, 3)), "must have shapes"),
        (lambda b: b["2"].update(general=torch.zeros(3, 10)), r"\(10, 3\).*got.*\(3, 10\)"),
        (lambda b: b["4"]["general"].fill_(float("nan")), "layer '4' must be finite"),
    ],
)
def test_bases_that_do_not_fit_are_refused_before_any_batch(spoil: Any, message: str) -> None:
    def never() -> Iterator[Tensor]:
        pytest.fail("a batch was asked for")
        yield torch.ones(1)

    model, given = mlp(), bases()
    loda = LoDA(model, LoDASettings(**MLP))
    spoil(given)
    with pytest.raises(ValueError, match=message):
        loda.begin_task(never(), bases=given)
    assert type(model[0]) is nn.Linear
    loda.begin_task(batches(0, model), bases=bases())
