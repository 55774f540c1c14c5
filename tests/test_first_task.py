"""first_task: LoDA on the first task, and nothing of the backbone moves after it."""

import pytest
import torch
from learning import learn, made, weights
from torch import nn

from training.methods import MethodConfig
from training.methods.first_task import FirstTask
from training.methods.loda import LoDAMethod


def test_it_is_loda_on_the_first_task_and_frozen_after_it(model: nn.Module) -> None:
    start = weights(model)
    first = learn(made("first_task", model), model, 0)
    assert any(not torch.equal(first[name], start[name]) for name in start)
    method = made("first_task", model)
    model.load_state_dict(start)
    again = learn(method, model, 0)
    later = learn(method, model, 1)
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert all(torch.equal(later[name], first[name]) for name in first)
    model.load_state_dict(start)
    loda = learn(made("loda", model), model, 0)
    assert all(torch.equal(first[name], loda[name]) for name in first)


def test_later_tasks_need_no_memory(model: nn.Module) -> None:
    method = made("first_task", model)
    learn(method, model, 0)
    assert list(method.state_dict()) == ["adapted"]
    assert method.parameters() == []


def test_only_what_the_first_task_uses_is_an_option() -> None:
    options = set(MethodConfig("first_task").options)
    assert options < set(MethodConfig("loda").options)
    assert not options & {"isolated", "isolated_weight", "recalibration", "gamma", "history"}
    with pytest.raises(ValueError, match="gamma"):
        MethodConfig("first_task", {"gamma": 3.0})
    method = MethodConfig("first_task", {"rank": 5}).build()
    assert isinstance(method, FirstTask)
    loda = MethodConfig("loda", {"rank": 5, "heldout": False}).build()
    assert isinstance(loda, LoDAMethod)
    assert method.settings == loda.settings
