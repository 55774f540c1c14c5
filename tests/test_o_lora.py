"""O-LoRA: the penalty, what it does, and the scale of the branch."""

import pytest
import torch
from learning import QKV, learn, made
from torch import nn

from backends.torch import find_layers
from training.methods import Context, MethodConfig
from training.methods.o_lora import OLoRA, overlap


def o_lora(model: nn.Module, **options: object) -> OLoRA:
    method = made("o_lora", model, **options)
    assert isinstance(method, OLoRA)
    return method


def test_the_overlap_is_zero_exactly_for_orthogonal_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert float(overlap(5 * q[:3], 0.1 * q[3:])) < 1e-6
    # The same rows: every new direction meets one old one; scale and rank do not matter.
    assert float(overlap(5 * q[:3], q)) == pytest.approx(1.0, abs=1e-5)
    tilted = (q[0] + q[5]) / 2
    assert float(overlap(tilted[None], q[3:])) == pytest.approx(0.5**0.5, abs=1e-5)


def test_the_penalty_turns_new_directions_away_from_old_ones(model: nn.Module) -> None:
    state = {name: w.clone() for name, w in model.state_dict().items()}
    overlaps = {}
    for penalty in (0.0, 2.0):
        model.load_state_dict(state)
        method = o_lora(model, penalty=penalty)
        learn(method, model, 0)
        learn(method, model, 1, steps=30)
        (rows,) = {tuple(old.shape) for old in method.old.values()}
        assert rows == (6, 16)  # the rank grows with the tasks
        overlaps[penalty] = max(float(overlap(old[3:], old[:3])) for old in method.old.values())
    assert overlaps[2.0] < 0.5 * overlaps[0.0]


def test_the_penalty_is_lambda_times_the_mean_overlap(model: nn.Module) -> None:
    method = o_lora(model, penalty=0.3)
    learn(method, model, 0)
    method.begin_task([])
    shares = iter((0.25, 0.75))  # of the first and of the second layer's rows that meet old ones
    eye = torch.eye(16)
    with torch.no_grad():
        for name, layer in method.layers.items():
            method.old[f"all/{name}"] = eye[:4]
            share = next(shares)
            rows = share * eye[:3] + (1 - share**2) ** 0.5 * eye[8:11]
            layer.branch("all").down.copy_(7 * rows)
    assert method.penalty().item() == pytest.approx(0.3 * 0.5, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 4])
def test_the_penalty_counts_once_over_all_processes(model: nn.Module, processes: int) -> None:
    method: OLoRA = MethodConfig("o_lora", {"rank": 3}).build()
    method.start(model, Context(0, 2, processes))
    rows = torch.arange(2)
    assert method.objective(torch.sum)(rows) == 1  # there is nothing to avoid yet
    learn(method, model, 0)
    method.begin_task([])
    added = method.objective(torch.sum)(rows) - 1
    torch.testing.assert_close(added, method.penalty() / processes)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (32.0, 32 / 3)])
def test_the_branch_is_scaled_by_alpha_over_rank(
    model: nn.Module, alpha: float | None, scale: float
) -> None:
    method = o_lora(model, alpha=alpha)
    method.begin_task([])
    before = {name: layer.weight.clone() for name, layer in method.layers.items()}
    wanted = {}
    with torch.no_grad():
        for name, layer in method.layers.items():
            branch = layer.branch("all")
            branch.up.normal_()
            wanted[name] = before[name] + scale * branch.up @ branch.down
    method.end_task([])
    for name, layer in find_layers(model, QKV).items():
        torch.testing.assert_close(layer.weight, wanted[name])
