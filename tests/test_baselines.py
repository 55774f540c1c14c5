"""The property that defines each baseline, on a tiny transformer."""

from typing import Any

import pytest
import torch
from small_runs import small_vit, squares, tiny
from torch import Tensor, nn
from torch.nn import functional

from backends.torch import GradientMemory, LoRALinear, collect_moments, find_layers
from training.config import MethodConfig
from training.run_dir import read_json
from training.train import train
from training.methods import Context, Method, build_method
from training.methods.branches import output_rows
from training.methods.inflora import InfLoRA
from training.methods.loda import LoDAMethod
from training.methods.o_lora import OLoRA, overlap
from training.methods.sd_lora import SDLoRA
from training.train import prepare

LABELS = torch.arange(12) % 3


@pytest.fixture
def model() -> nn.Module:
    return small_vit()


def images(task: int) -> Tensor:
    generator = torch.Generator().manual_seed(task)
    return torch.randn(12, 3, 16, 16, generator=generator)


def made(name: str, model: nn.Module, tasks: int = 3, **settings: Any) -> Method:
    return build_method(MethodConfig(name=name, rank=3, **settings), model, Context(0, tasks))


def learn(method: Method, model: nn.Module, task: int, steps: int = 3, lr: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(task)
    head = torch.randn(3, 16, generator=generator).requires_grad_()
    pixels = images(task)
    method.begin_task([(pixels, LABELS)])
    optimizer = torch.optim.SGD([*method.parameters(), head], lr=lr)
    model.train()

    def loss(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(pixels[rows]) @ head.mT, LABELS[rows])

    for _ in range(steps):
        method.step(loss, LABELS, optimizer, generator=generator, backward=torch.Tensor.backward)
    method.end_task([(pixels, LABELS)])


def qkv(model: nn.Module) -> dict[str, nn.Linear | LoRALinear]:
    return find_layers(model, "*.attn.qkv")


# null-space LoRA


def test_the_null_space_update_leaves_outputs_on_old_inputs_unchanged(model: nn.Module) -> None:
    name = "blocks.0.attn.qkv"
    method = made("null_lora", model, target=name)
    learn(method, model, 0)
    # Old inputs that leave a null space: five tokens in sixteen dimensions.
    layer = qkv(model)[name]
    old = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    history = method.state_dict()
    history[f"history/{name}"] = (old.mT @ old / 5).to(history[f"history/{name}"])
    method.load_state_dict(history)
    before, new = layer(old), layer(torch.ones(1, 16))
    learn(method, model, 1, lr=1.0)
    torch.testing.assert_close(layer(old), before, atol=1e-5, rtol=0)
    assert (layer(torch.ones(1, 16)) - new).abs().max() > 1e-3


# O-LoRA


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
    found = {}
    for penalty in (0.0, 2.0):
        model.load_state_dict(state)
        method = made("o_lora", model, options={"penalty": penalty})
        assert isinstance(method, OLoRA)
        learn(method, model, 0)
        learn(method, model, 1, steps=30)
        (rows,) = {tuple(old.shape) for old in method.old.values()}
        assert rows == (6, 16)  # the rank grows with the tasks
        found[penalty] = max(float(overlap(old[3:], old[:3])) for old in method.old.values())
    assert found[2.0] < 0.5 * found[0.0]


def test_the_penalty_is_lambda_times_the_mean_overlap(model: nn.Module) -> None:
    method = made("o_lora", model, options={"penalty": 0.3})
    assert isinstance(method, OLoRA)
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


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (32.0, 32 / 3)])
def test_the_branch_of_o_lora_is_scaled_by_alpha_over_rank(
    model: nn.Module, alpha: float | None, scale: float
) -> None:
    method = made("o_lora", model, options={"alpha": alpha})
    assert isinstance(method, OLoRA)
    method.begin_task([])
    before = {name: layer.weight.clone() for name, layer in method.layers.items()}
    wanted = {}
    with torch.no_grad():
        for name, layer in method.layers.items():
            branch = layer.branch("all")
            branch.up.normal_()
            wanted[name] = before[name] + scale * branch.up @ branch.down
    method.end_task([])
    for name, layer in qkv(model).items():
        torch.testing.assert_close(layer.weight, wanted[name])


# InfLoRA


def test_inflora_directions_avoid_what_is_kept(model: nn.Module) -> None:
    method = made("inflora", model, options={"lamb": 0.5, "lame": 0.6})
    assert isinstance(method, InfLoRA)
    for task in range(3):
        new = collect_moments(model, [images(task)], "*.attn.qkv")
        kept = dict(method.memories)
        method.begin_task([(images(task), LABELS)])
        for name, layer in method.layers.items():
            down = layer.branch("all").down.detach().double()
            scale = torch.linalg.norm(down, dim=1)
            live = scale > 0
            torch.testing.assert_close(scale[live], torch.full_like(scale[live], 3**-0.5))
            assert live.any()
            assert not layer.branch("all").down.requires_grad
            if task:
                memory = kept[name]
                inside = down - down @ memory.basis @ memory.basis.mT
                outside = inside if memory.free else down - inside
                assert outside.abs().max() < 1e-5
            else:  # the leading directions of the first task's inputs
                values = torch.linalg.eigvalsh(new[name].mean.double())
                energy = 3 * torch.trace(down @ new[name].mean.double() @ down.mT)
                assert float(energy) == pytest.approx(float(values[-3:].sum()), rel=1e-4)
        method.end_task([(images(task), LABELS)])


def test_inflora_protects_a_share_that_grows_over_the_stream(model: nn.Module) -> None:
    method = made("inflora", model, tasks=4, options={"lamb": 0.6, "lame": 0.9})
    assert isinstance(method, InfLoRA)
    expected: dict[str, GradientMemory] = {}
    for task, share in enumerate((0.6, 0.675, 0.75, 0.825)):
        learn(method, model, task)
        for name, found in collect_moments(model, [images(task)], "*.attn.qkv").items():
            # Through the trained and merged model, to rounding.
            memory = expected.get(name) or GradientMemory.empty(found.mean)
            expected[name] = memory.updated(found.mean, share)
            ours, theirs = method.memories[name], expected[name]
            assert (ours.free, ours.basis.shape) == (theirs.free, theirs.basis.shape)
            spans = [m.basis @ m.basis.mT for m in (ours, theirs)]
            torch.testing.assert_close(*spans, atol=1e-3, rtol=0)


def test_inflora_updates_do_not_reach_protected_inputs(model: nn.Module) -> None:
    name = "blocks.0.attn.qkv"
    method = made("inflora", model, target=name, options={"lamb": 0.9, "lame": 0.9})
    learn(method, model, 0)
    assert isinstance(method, InfLoRA)
    memory = method.memories[name]
    assert not memory.free
    layer = qkv(model)[name]
    old = memory.basis.mT.float()
    before = layer(old)
    learn(method, model, 1, lr=1.0)
    torch.testing.assert_close(layer(old), before, atol=1e-5, rtol=0)


def test_inflora_reaches_keys_and_values_alone(model: nn.Module) -> None:
    start = {name: layer.weight.clone() for name, layer in qkv(model).items()}
    learn(made("inflora", model, options={"parts": "kv"}), model, 0)
    for name, layer in qkv(model).items():
        change = (layer.weight - start[name]).abs().amax(dim=1)
        assert change[:16].max() == 0
        assert change[16:].max() > 0


# SD-LoRA


def test_old_directions_stay_and_magnitudes_are_learned(model: nn.Module) -> None:
    method = made("sd_lora", model, options={"parts": "qv"})
    assert isinstance(method, SDLoRA)
    start = {name: layer.weight.clone() for name, layer in qkv(model).items()}
    learn(method, model, 0)
    first = {k: v.clone() for k, v in method.state_dict().items() if "task0" in k}
    assert len(first) == 8  # A and B of queries and values in two layers
    assert all(float(v.norm()) == pytest.approx(1, rel=1e-4) for v in first.values())
    learn(method, model, 1)
    after = method.state_dict()
    assert all(torch.equal(after[key], value) for key, value in first.items())
    assert float((method.magnitudes[0] - 0.8).abs()) > 0
    # Keys have no branch; the update of the queries is the sum of the scaled directions.
    for name, layer in qkv(model).items():
        change = layer.weight.detach() - start[name]
        assert change[16:32].abs().max() == 0
        old = after[f"up/task0_q/{name}"] @ after[f"down/task0_q/{name}"]
        rest = change[:16] - method.magnitudes[0].detach() * old
        assert torch.linalg.matrix_rank(change[:16], atol=1e-6) > 3
        assert torch.linalg.matrix_rank(rest, atol=1e-6) == 3


def test_all_magnitudes_start_again_and_are_trained_on_every_task(model: nn.Module) -> None:
    method = made("sd_lora", model)
    assert isinstance(method, SDLoRA)
    for task in range(3):
        method.begin_task([(images(task), LABELS)])
        assert [float(m.detach()) for m in method.magnitudes] == [pytest.approx(0.8)] * (task + 1)
        trained = {id(p) for p in method.parameters() if p.requires_grad}
        assert {id(m) for m in method.magnitudes} <= trained
        assert len(trained) == task + 1 + 2 * len(qkv(model))  # and A and B of the task alone
        with torch.no_grad():
            for m in method.magnitudes:
                m.fill_(3.0)
        method.end_task([(images(task), LABELS)])


# Upper bound and read-outs without training


def test_joint_on_one_task_is_sequential_lora(tmp_path: Any) -> None:
    root = squares(tmp_path / "data")
    whole = {"init_cls": 6}
    runs = {
        name: train(tiny(root, tmp_path / name, method={"name": name}, data=whole), quiet=True)
        for name in ("joint", "seq_lora")
    }
    found = {name: (run / "model.safetensors").read_bytes() for name, run in runs.items()}
    assert found["joint"] == found["seq_lora"]


def test_joint_learns_all_tasks_at_once(tmp_path: Any) -> None:
    root = squares(tmp_path / "data")
    run = prepare(tiny(root, tmp_path / "run", method={"name": "joint"}))
    assert run.stream.tasks == [(0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize(("name", "kind"), [("ncm", "nearest_mean"), ("ranpac_frozen", "ridge")])
def test_read_outs_without_training_are_those_of_the_frozen_backbone(
    name: str, kind: str, tmp_path: Any
) -> None:
    root = squares(tmp_path / "data")
    asked = {"readout": "heads", "also": ["nearest_mean", "ridge"]}
    bare = train(tiny(root, tmp_path / name, method={"name": name}), quiet=True)
    frozen = train(
        tiny(root, tmp_path / "frozen", method={"name": "frozen"}, head=asked), quiet=True
    )
    summary = read_json(bare / "summary.json")
    assert summary["readout"] == kind
    expected = read_json(frozen / "summary.json")["counts"][kind]
    assert summary["counts"][kind] == expected


# Controls


def test_random_directions_know_nothing_of_the_images(model: nn.Module) -> None:
    method = made("loda", model, options={"directions": "random"})
    assert isinstance(method, LoDAMethod)
    learn(method, model, 0)
    found = []
    for pixels in (images(1), 3 * images(2).abs()):
        method.begin_task([(pixels, LABELS)])
        layer = method.loda.layers["blocks.1.attn.qkv"]
        downs = [layer.branch(b).down.detach() for b in ("general", "isolated")]
        for down in downs:
            torch.testing.assert_close(3 * down @ down.mT, torch.eye(3))
        assert not torch.equal(*downs)
        found.append(downs)
        method.loda.abandon_task()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# What all of them share


@pytest.mark.parametrize("name", ["seq_lora", "null_lora", "o_lora", "inflora", "sd_lora"])
def test_baselines_can_take_gradient_aligned_steps(name: str, model: nn.Module) -> None:
    state = {key: w.clone() for key, w in model.state_dict().items()}
    found = []
    for settings in ({}, {"gao": True, "radius": 0.5}, {"gao": False, "radius": 0.9}):
        model.load_state_dict(state)
        learn(made(name, model, **settings), model, 0)
        found.append({key: w.clone() for key, w in model.state_dict().items()})
    plain, aligned, off = found
    assert all(torch.equal(plain[k], off[k]) for k in plain)
    assert any(not torch.equal(plain[k], aligned[k]) for k in plain)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("o_lora", {"penalty": -1.0}, "at least 0"),
        ("o_lora", {"strength": 1.0}, "penalty, alpha, parts"),
        ("inflora", {"lamb": 0.9, "lame": 0.8}, "lamb <= lame"),
        ("inflora", {"parts": "kq"}, "allowed: all, q, k, v, qk, kv, qv"),
        ("seq_lora", {"penalty": 1.0}, "no options at all"),
        ("loda", {"gamma": 1.0}, "it has directions"),
        ("loda", {"directions": "best"}, "solved, random"),
    ],
)
def test_wrong_options_are_named(
    name: str, options: dict[str, Any], message: str, model: nn.Module
) -> None:
    with pytest.raises(ValueError, match=message):
        made(name, model, options=options)


def test_parts_of_a_layer_that_is_not_fused_are_refused() -> None:
    with pytest.raises(ValueError, match="no fused qkv"):
        output_rows(16, "kv")


def test_an_unknown_method_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="loda, seq_lora, joint"):
        MethodConfig(name="lora")
