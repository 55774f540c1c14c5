"""The methods under their common interface: what they change in a model, and what they leave."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import finished, small_vit, tiny, tree
from torch import Tensor, nn
from torch.nn import functional

from training.config import MethodConfig
from training.run_dir import read_json
from training.train import train
from training.methods import METHODS, Context, Method, build_method
from training.train import prepare

NAMES = tuple(METHODS)
STILL = {"frozen", "ncm", "ranpac_frozen"}
IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


@pytest.fixture
def model() -> nn.Module:
    return small_vit()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES[:8], LABELS[:8]), (IMAGES[8:], LABELS[8:])]


def backward(value: Tensor) -> None:
    value.backward()  # type: ignore[no-untyped-call]


def learn(
    method: Method, model: nn.Module, steps: int = 3, lr: float = 0.1, seed: int = 0
) -> dict[str, Tensor]:
    """One task of full-batch steps with a fixed random head; the weights after it."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(3, 16, generator=generator).requires_grad_()
    method.begin_task(batches())
    optimizer = torch.optim.SGD([*method.parameters(), head], lr=lr, momentum=0.9)
    model.train()

    def loss(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(IMAGES[rows]) @ head.mT, LABELS[rows])

    for _ in range(steps):
        method.step(loss, LABELS, optimizer, generator=generator, backward=backward)
    method.end_task(batches())
    return weights(model)


@pytest.mark.parametrize("name", NAMES)
def test_between_tasks_the_model_is_the_original_architecture(name: str, model: nn.Module) -> None:
    kinds = [(n, type(m)) for n, m in model.named_modules()]
    shapes = {n: w.shape for n, w in model.state_dict().items()}
    before = weights(model)
    method = build_method(MethodConfig(name=name, rank=4), model, Context(0, 2))
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    for _ in range(2):
        learn(method, model)
        assert [(n, type(m)) for n, m in model.named_modules()] == kinds
        assert {n: w.shape for n, w in model.state_dict().items()} == shapes


@pytest.mark.parametrize("name", NAMES)
def test_only_the_target_layers_change(name: str, model: nn.Module) -> None:
    before = weights(model)
    method = build_method(
        MethodConfig(name=name, rank=4, target="blocks.1.attn.qkv"), model, Context(0, 2)
    )
    learn(method, model)
    after = learn(method, model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == (set() if name in STILL else {"blocks.1.attn.qkv.weight"})


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_model_is_trained_in_the_open(name: str, model: nn.Module) -> None:
    method = build_method(MethodConfig(name=name, rank=4), model, Context(0, 2))
    method.begin_task(batches())
    own = {id(p) for p in method.parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert all(".branches." in n for n in trained)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_carries_a_method_over(name: str, model: nn.Module) -> None:
    method = build_method(MethodConfig(name=name, rank=4), model, Context(0, 2))
    learn(method, model)
    between = weights(model)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    expected = learn(method, model, seed=1)

    other = small_vit()
    for weight in other.parameters():  # the state and the experiment decide
        nn.init.normal_(weight)
    taking_over = build_method(MethodConfig(name=name, rank=4), other, Context(0, 2))
    other.load_state_dict(between)
    taking_over.load_state_dict(state)
    assert all(torch.equal(w, between[n]) for n, w in other.state_dict().items())
    found = learn(taking_over, other, seed=1)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_sequential_lora_is_lora(model: nn.Module) -> None:
    """One task against LoRA written out: W + B A in the forward pass, plain autograd and SGD."""
    name, lr, steps = "blocks.0.attn.qkv", 0.1, 4
    method = build_method(MethodConfig(name="seq_lora", rank=3, target=name), model, Context(0, 2))
    down = method.state_dict()[f"down/lora/{name}"].clone().requires_grad_()
    up = torch.zeros(48, 3, requires_grad=True)
    assert not method.state_dict()[f"up/lora/{name}"].any()
    start = weights(model)[f"{name}.weight"]
    head = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.SGD([down, up, head], lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        features = torch.func.functional_call(
            model, {f"{name}.weight": start + up @ down}, (IMAGES,)
        )
        backward(functional.cross_entropy(features @ head.mT, LABELS))
        optimizer.step()
    after = learn(method, model, steps=steps, lr=lr)
    torch.testing.assert_close(after[f"{name}.weight"], (start + up @ down).detach())
    state = method.state_dict()
    torch.testing.assert_close(state[f"up/lora/{name}"], up.detach())
    torch.testing.assert_close(state[f"down/lora/{name}"], down.detach())
    assert up.detach().abs().max() > 1e-3


def test_sequential_lora_trains_one_branch_on(model: nn.Module) -> None:
    name = "blocks.0.attn.qkv"
    start = weights(model)[f"{name}.weight"]
    method = build_method(MethodConfig(name="seq_lora", rank=3), model, Context(0, 2))
    for seed in range(3):
        after = learn(method, model, seed=seed)
        change = after[f"{name}.weight"] - start
        # However many tasks, the update has the rank of one branch.
        assert torch.linalg.matrix_rank(change, atol=1e-5) == 3
        state = method.state_dict()
        torch.testing.assert_close(change, state[f"up/lora/{name}"] @ state[f"down/lora/{name}"])


def test_another_seed_starts_sequential_lora_elsewhere(model: nn.Module) -> None:
    config = MethodConfig(name="seq_lora", rank=3)
    states = [build_method(config, model, Context(seed, 2)).state_dict() for seed in (0, 0, 1)]
    key = "down/lora/blocks.0.attn.qkv"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


def test_frozen_trains_the_heads_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = finished(tmp_path_factory, "frozen")
    out = tmp_path_factory.mktemp("start") / "run"
    start = prepare(tiny(tree(tmp_path_factory), out)).state.model.state_dict()
    saved = load_file(run / "model.safetensors")
    assert all(torch.equal(saved[name], start[name]) for name in start)
    assert read_json(run / "summary.json")["trainable_parameters"] == [32] * 3


ABLATIONS: dict[str, dict[str, Any]] = {
    "no look-ahead": {"gao": False},
    "radius 0": {"radius": 0.0},
    "general": {"branches": "general"},
    "isolated": {"branches": "isolated"},
    "null": {"isolated": "null"},
    "trace ratio": {"isolated": "trace_ratio"},
    "energy floor": {"isolated": "trace_ratio", "energy_floor": 0.8},
    "joint": {"joint": True},
    "history weight": {"history_weight": 3.0},
    "trained": {"history": "trained"},
    "both passes": {"history": "both"},
    "full rank": {"rank": 16},
    "rank 1": {"rank": 1},
    "projection": {"target": "*.attn.proj"},
    **{f: {"recalibration": f} for f in ("diagonal", "box", "direction", "scalar", "none")},
}


@pytest.fixture(scope="session")
def final(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Tensor]]:
    """Weights after a short run under changed settings of LoDA."""
    root = tree(tmp_path_factory)

    def final(tasks: int = 2, **method: Any) -> dict[str, Tensor]:
        out = tmp_path_factory.mktemp("ablation") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("training.loop.accuracy_figure", lambda *_, **__: None)
            run = train(tiny(root, out, method=method, data={"tasks": tasks}), quiet=True)
        return load_file(run / "model.safetensors")

    return final


@pytest.fixture(scope="session")
def standard(final: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    return final()


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_part_of_loda_can_be_switched(
    ablation: str, final: Callable[..., dict[str, Tensor]], standard: dict[str, Tensor]
) -> None:
    found = final(**ABLATIONS[ablation])
    assert {n: w.shape for n, w in found.items()} == {n: w.shape for n, w in standard.items()}
    assert all(w.isfinite().all() for w in found.values())
    # A switch that changes nothing would be none.
    assert any(not torch.equal(found[n], standard[n]) for n in standard)


@pytest.mark.parametrize("late", [{"history_decay": 0.3}, {"history_weight": "mean"}], ids=str)
def test_weights_of_old_tasks_matter_once_there_are_two(
    late: dict[str, Any], final: Callable[..., dict[str, Tensor]], standard: dict[str, Tensor]
) -> None:
    two, three, whole = final(**late), final(tasks=3, **late), final(tasks=3)
    assert all(torch.equal(two[n], standard[n]) for n in standard)
    assert any(not torch.equal(three[n], whole[n]) for n in whole)


def test_settings_of_other_methods_do_not_matter(
    final: Callable[..., dict[str, Tensor]],
) -> None:
    plain = final(name="seq_lora")
    other = final(name="seq_lora", gamma=9.0, radius=0.9, branches="general", gao=False)
    assert all(torch.equal(plain[n], other[n]) for n in plain)
