"""SD-LoRA: directions stay, magnitudes are learned anew."""

import pytest
import torch
from learning import QKV, batches, learn, made
from torch import nn

from backends.torch import find_layers
from training.methods.sd_lora import SDLoRA


def sd_lora(model: nn.Module, **options: object) -> SDLoRA:
    method = made("sd_lora", model, **options)
    assert isinstance(method, SDLoRA)
    return method


def test_old_directions_stay_and_magnitudes_are_learned(model: nn.Module) -> None:
    method = sd_lora(model, parts="qv")
    start = {name: layer.weight.clone() for name, layer in find_layers(model, QKV).items()}
    learn(method, model, 0)
    first = {k: v.clone() for k, v in method.state_dict().items() if "task1" in k}
    assert len(first) == 8  # A and B of queries and values in two layers
    assert all(float(v.norm()) == pytest.approx(1, rel=1e-4) for v in first.values())
    learn(method, model, 1)
    after = method.state_dict()
    assert all(torch.equal(after[key], value) for key, value in first.items())
    assert float((method.magnitudes[0] - 0.8).abs()) > 0
    # Keys have no branch; the update of the queries is the sum of the scaled directions.
    for name, layer in find_layers(model, QKV).items():
        change = layer.weight.detach() - start[name]
        assert change[16:32].abs().max() == 0
        old = after[f"up/task1_q/{name}"] @ after[f"down/task1_q/{name}"]
        rest = change[:16] - method.magnitudes[0].detach() * old
        assert torch.linalg.matrix_rank(change[:16], atol=1e-6) > 3
        assert torch.linalg.matrix_rank(rest, atol=1e-6) == 3


def test_all_magnitudes_start_again_and_are_trained_on_every_task(model: nn.Module) -> None:
    method = sd_lora(model, start=0.5)
    for task in range(3):
        method.begin_task(batches(task))
        assert [float(m.detach()) for m in method.magnitudes] == [0.5] * (task + 1)
        trained = {id(p) for p in method.parameters() if p.requires_grad}
        assert {id(m) for m in method.magnitudes} <= trained
        layers = len(find_layers(model, QKV))
        assert len(trained) == task + 1 + 2 * layers  # and A and B of the task alone
        with torch.no_grad():
            for m in method.magnitudes:
                m.fill_(3.0)
        method.end_task(batches(task))
