"""LoDA over whole models: saved and loaded states, copies, and records for files."""

import copy
import io
from typing import Any

import pytest
import torch
from tiny_models import MLP, WIDTHS, batches, fit, learn, mlp, same, snapshot, vit
from torch import Tensor, nn

from backends.torch import LoDA, LoDASettings, LoRALinear


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("build", [vit, mlp])
def test_run_continues_bit_for_bit_in_a_fresh_object_between_tasks(build: Any) -> None:
    model = build()
    settings = LoDASettings(**MLP) if isinstance(model, nn.Sequential) else LoDASettings(rank=3)
    loda = LoDA(model, settings)
    learn(loda, 0)
    saved = through_a_file({"loda": loda.state_dict(), "model": model.state_dict()})
    twin = LoDA(build(), settings)
    twin.model.load_state_dict(saved["model"])
    twin.load_state_dict(saved["loda"])
    for task in (1, 2):
        learn(loda, task)
        learn(twin, task)
        assert same(snapshot(model), snapshot(twin.model))
        assert same(loda.state_dict(), twin.state_dict())


@pytest.mark.parametrize("task", [0, 1])
def test_run_continues_bit_for_bit_from_the_middle_of_a_task(task: int) -> None:
    model, settings = mlp(), LoDASettings(**MLP, history="both")
    loda = LoDA(model, settings, trainable=["5.*"])
    for past in range(task):
        learn(loda, past)
    loda.begin_task(batches(task, model))
    optimizer = fit(loda, task)
    saved = through_a_file(
        {"loda": loda.state_dict(), "model": model.state_dict(), "sgd": optimizer.state_dict()}
    )
    twin = LoDA(mlp(seed=5), settings, trainable=["5.*"])
    # The names of the saved weights are those of the adapted model, so the method comes first.
    twin.load_state_dict(saved["loda"])
    twin.model.load_state_dict(saved["model"])
    other = torch.optim.SGD(twin.trainable_parameters(), lr=0.05, momentum=0.9)
    other.load_state_dict(saved["sgd"])
    fit(loda, task, optimizer)
    fit(twin, task, other)
    assert [p.requires_grad for p in twin.model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    records = [x.end_task(batches(task, model)) for x in (loda, twin)]
    assert same(snapshot(model), snapshot(twin.model))
    assert same(loda.state_dict(), twin.state_dict())
    assert same(records[0].moment_tensors(), records[1].moment_tensors())
    assert same(records[0].branch_tensors(), records[1].branch_tensors())
    assert all(p.requires_grad for p in twin.model.parameters())


def test_loaded_state_is_a_copy() -> None:
    model = mlp()
    loda = LoDA(model, LoDASettings(**MLP))
    learn(loda, 0)
    loda.begin_task(batches(1, model))
    fit(loda, 1)
    state = {k: v.clone() for k, v in loda.state_dict().items()}
    twin = LoDA(mlp(), LoDASettings(**MLP))
    twin.load_state_dict(state)
    for value in state.values():
        value.zero_()
    assert same(twin.state_dict(), loda.state_dict())


def test_deep_copy_in_the_middle_of_a_task_goes_its_own_way() -> None:
    loda = LoDA(mlp(), LoDASettings(**MLP))
    loda.begin_task(batches(0, loda.model))
    twin = copy.deepcopy(loda)
    fit(loda, 0)
    fit(twin, 0)
    loda.end_task(batches(0, loda.model))
    assert all(isinstance(twin.model.get_submodule(n), LoRALinear) for n in WIDTHS)
    twin.end_task(batches(0, twin.model))
    assert same(snapshot(loda.model), snapshot(twin.model))
    assert all(p.requires_grad for p in twin.model.parameters())


def test_state_of_another_model_or_other_settings_is_refused_whole() -> None:
    source = LoDA(mlp(), LoDASettings(**MLP))
    learn(source, 0)
    between = source.state_dict()
    source.begin_task(batches(1, source.model))
    within = source.state_dict()
    without = {k: v for k, v in within.items() if k != "up/isolated/2"}
    model = mlp()
    for settings, state in (
        ({**MLP, "target": ("0", "2")}, between),
        ({**MLP, "target": ("0", "2", "4", "5")}, between),
        (MLP, {k: v for k, v in between.items() if k != "tasks"}),
        (MLP, between | {"history/0": torch.zeros(7, 7)}),
        (MLP, {}),
        (MLP, without),
        ({**MLP, "branches": "general"}, within),
        ({**MLP, "rank": 2}, within),
    ):
        loda = LoDA(model, LoDASettings(**settings))
        with pytest.raises(ValueError, match="the state must be"):
            loda.load_state_dict(state)
        assert loda.tasks == 0
        assert loda.history == loda.layers == {}
        assert type(model[0]) is nn.Linear
    # Between tasks the rank may change: the history knows nothing of it.
    loda = LoDA(model, LoDASettings(**{**MLP, "rank": 2}))
    loda.load_state_dict(between)
    assert loda.tasks == 1


def test_names_with_slashes_survive_the_state() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ModuleDict({"a/b": nn.Linear(6, 4)}))

    def forward(model: Any, x: Tensor) -> Any:
        return model[0]["a/b"](x)

    settings = LoDASettings(target="*a/b", rank=2)
    loda = LoDA(build(), settings, forward=forward)
    loda.begin_task([torch.randn(5, 6)])
    loda.end_task([torch.randn(5, 6)])
    loda.begin_task([torch.randn(5, 6)])
    twin = LoDA(build(), settings)
    twin.load_state_dict(loda.state_dict())
    assert same(twin.state_dict(), loda.state_dict())


def test_record_gives_flat_tensors_for_files() -> None:
    loda = LoDA(mlp(), LoDASettings(**MLP, history="both"))
    learn(loda, 0)
    record = learn(loda, 1)
    kinds = {"coefficients", *(f"{k}/{b}" for k in ("down", "up") for b in record.weights)}
    assert set(record.branch_tensors()) == {f"{k}/{n}" for k in kinds for n in WIDTHS}
    passes = ("new", "trained", "merged")
    assert set(record.moment_tensors()) == {f"{p}/{n}" for p in passes for n in WIDTHS}
    assert all(not t.requires_grad for t in record.branch_tensors().values())
