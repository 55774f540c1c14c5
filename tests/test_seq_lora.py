"""Sequential LoRA: one branch that is trained on; joint, the same on all tasks at once."""

from pathlib import Path

import torch
from learning import LABELS, images, learn, made, weights
from small_runs import tiny
from torch import nn
from torch.nn import functional

from training.train import prepare, train

NAME = "blocks.0.attn.qkv"


def test_one_task_is_lora_written_out(model: nn.Module) -> None:
    """W + B A in the forward pass, plain autograd and SGD."""
    lr, steps = 0.1, 4
    method = made("seq_lora", model, target=NAME)
    down = method.state_dict()[f"down/lora/{NAME}"].clone().requires_grad_()
    up = torch.zeros(48, 3, requires_grad=True)
    assert not method.state_dict()[f"up/lora/{NAME}"].any()
    start = weights(model)[f"{NAME}.weight"]
    head = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.SGD([down, up, head], lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        changed = {f"{NAME}.weight": start + up @ down}
        features = torch.func.functional_call(model, changed, (images(0),))
        torch.Tensor.backward(functional.cross_entropy(features @ head.mT, LABELS))
        optimizer.step()
    after = learn(method, model, 0, steps=steps, lr=lr)
    torch.testing.assert_close(after[f"{NAME}.weight"], (start + up @ down).detach())
    state = method.state_dict()
    torch.testing.assert_close(state[f"up/lora/{NAME}"], up.detach())
    torch.testing.assert_close(state[f"down/lora/{NAME}"], down.detach())
    assert up.detach().abs().max() > 1e-3


def test_one_branch_is_trained_on(model: nn.Module) -> None:
    start = weights(model)[f"{NAME}.weight"]
    method = made("seq_lora", model)
    for task in range(3):
        change = learn(method, model, task)[f"{NAME}.weight"] - start
        # However many tasks, the update has the rank of one branch.
        assert torch.linalg.matrix_rank(change, atol=1e-5) == 3
        state = method.state_dict()
        torch.testing.assert_close(change, state[f"up/lora/{NAME}"] @ state[f"down/lora/{NAME}"])


def test_another_seed_starts_elsewhere(model: nn.Module) -> None:
    states = [made("seq_lora", model, seed=seed).state_dict() for seed in (0, 0, 1)]
    key = f"down/lora/{NAME}"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_joint_on_one_task_is_sequential_lora(root: Path, tmp_path: Path) -> None:
    runs = {
        name: train(tiny(root, tmp_path / name, method={"name": name}, data={"init_cls": 6}))
        for name in ("joint", "seq_lora")
    }
    found = {name: (run / "model.safetensors").read_bytes() for name, run in runs.items()}
    assert found["joint"] == found["seq_lora"]


def test_joint_learns_all_tasks_at_once(root: Path, tmp_path: Path) -> None:
    run = prepare(tiny(root, tmp_path / "run", method={"name": "joint"}))
    run.folder.close()
    assert run.stream.tasks == [(0, 1, 2, 3, 4, 5)]
