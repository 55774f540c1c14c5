"""How far a task moved the weights, and how many predictions that changed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contents import events
from small_runs import finished, plain, tiny, tree
from torch import nn

from backends.torch import adapt
from training.train import Run, compared_features, prepare, run_to_end
from training.updates import SAMPLE, Before, sample, weights_of


class Sign:
    """Class 1 where the first feature is positive."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros(len(features)), features[:, 0]], dim=1)


def test_the_change_is_measured_over_the_adapted_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    weights = weights_of(model)
    layer = adapt(model, "0")["0"]
    layer.add_branch("a", torch.eye(4)[:2])
    trained = list(layer.branch("a").parameters())
    before = Before.opened(weights, model, trained, torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]))
    assert list(before.weights) == ["0.weight"]
    assert "weights/0.weight" not in before.tensors(model)  # the open layer still has it

    with torch.no_grad():
        layer.frozen.add_(1.0)
        model[1].weight.add_(5.0)
    update = before.compare(model, torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), Sign())
    expected = math.sqrt(12) / float(weights["0.weight"].norm())
    assert update.relative == pytest.approx(expected, rel=1e-5)
    assert update.layers == {"0.weight": update.relative}
    assert (update.changed, update.images) == (0.5, 4)


def test_weights_that_a_method_took_apart_are_saved_with_an_open_task() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    weights = weights_of(model)
    layer = adapt(model, "0")["0"]
    layer.add_branch("a", torch.eye(4)[:2])
    with torch.no_grad():
        layer.frozen.sub_(1.0)
    features = torch.ones(2, 1)
    before = Before.opened(weights, model, layer.branch("a").parameters(), features)
    tensors = before.tensors(model)
    assert torch.equal(tensors["weights/0.weight"], weights["0.weight"])
    back = Before.loaded(tensors, ["0.weight"], model)
    assert torch.equal(back.weights["0.weight"], weights["0.weight"])
    assert torch.equal(back.features, features)


def test_a_model_that_is_trained_itself_is_compared_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    weights = weights_of(model)
    for trained in (model[1].parameters(), [nn.Parameter(torch.ones(2))]):
        before = Before.opened(weights, model, trained, torch.ones(1, 1))
        assert "1.weight" in before.weights


def test_the_sample_is_spread_over_all_images() -> None:
    for count in (1, SAMPLE, SAMPLE + 1, 7 * SAMPLE + 3):
        chosen = sample(count)
        assert len(set(chosen)) == len(chosen) == min(count, SAMPLE)
        assert chosen[0] == 0
        assert count - chosen[-1] <= max(1, 2 * count // SAMPLE)


def lines(run: Path) -> list[dict[str, Any]]:
    return [event for event in events(run) if event["event"] == "task"]


def test_what_adapts_nothing_has_no_update(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert all("update" not in line for line in lines(finished(tmp_path_factory, "frozen")))


@pytest.mark.parametrize("method", ["seq_lora", "sd_lora", "o_lora", "inflora"])
def test_every_method_that_adapts_says_how_much(
    method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for line in lines(plain(tmp_path_factory, method=method)):
        assert 0 < line["update"]["relative"] < 1
        assert len(line["update"]["layers"]) == 2
        assert 0 <= line["update"]["changed"] <= 1


@pytest.mark.parametrize("readout", ["heads", "compensated"])
def test_predictions_are_compared_with_the_model_from_before_the_task(
    readout: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # SD-LoRA changes the model when a task begins: its magnitudes start anew.
    settings = {"method": {"name": "sd_lora"}, "head": {"readout": readout, "also": []}}
    run = prepare(tiny(tree(tmp_path_factory), tmp_path / "run", data={"tasks": 2}, **settings))
    begin, expected, kept = run.state.method.begin_task, list[torch.Tensor](), {}

    def features(run: Run, task: int) -> torch.Tensor:
        return compared_features(run, run.stream.train.subset(run.stream.tasks[task]), None)

    def spied(*args: Any) -> None:
        expected.append(features(run, run.state.tasks))
        begin(*args)
        if run.state.tasks:
            assert not torch.equal(features(run, 1), expected[1])

    def keep(run: Run) -> None:
        assert run.state.open
        assert run.state.open.before
        kept[run.state.tasks] = run.state.open.before.features

    monkeypatch.setattr(run.state.method, "begin_task", spied)
    run.on_step = keep
    run_to_end(run, quiet=True)
    assert len(kept) == len(expected) == 2
    for task, before in enumerate(expected):
        torch.testing.assert_close(kept[task], before)
