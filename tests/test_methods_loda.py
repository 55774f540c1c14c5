"""LoDA as a method of experiments: its switches, its controls, and null_lora."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import QKV, batches, images, learn, made
from safetensors.torch import load_file
from small_runs import tiny
from torch import Tensor, nn

from backends.torch import find_layers
from backends.torch.settings import LoDASettings
from training.methods import MethodConfig
from training.methods.loda import LoDAMethod
from training.train import train

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
    "two patterns": {"target": ["*.attn.proj", "*.attn.qkv"]},
    **{f: {"recalibration": f} for f in ("diagonal", "box", "direction", "scalar", "none")},
}


@pytest.fixture(scope="session")
def final(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Tensor]]:
    """Weights after a short run under changed settings of LoDA."""

    def final(tasks: int = 2, **method: Any) -> dict[str, Tensor]:
        out = tmp_path_factory.mktemp("ablation") / "run"
        data, small = {"tasks": tasks}, {"lr": 0.02}
        experiment = tiny(root, out, method=method, data=data, train=small)
        return load_file(train(experiment, quiet=True) / "model.safetensors")

    return final


@pytest.fixture(scope="session")
def standard(final: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    return final()


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_part_of_loda_can_be_switched(
    ablation: str, final: Callable[..., dict[str, Tensor]], standard: dict[str, Tensor]
) -> None:
    weights = final(**ABLATIONS[ablation])
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in standard.items()}
    assert all(w.isfinite().all() for w in weights.values())
    # A switch that changes nothing would be none.
    assert any(not torch.equal(weights[n], standard[n]) for n in standard)


@pytest.mark.parametrize("late", [{"history_decay": 0.3}, {"history_weight": "mean"}], ids=str)
def test_weights_of_old_tasks_matter_once_there_are_two(
    late: dict[str, Any], final: Callable[..., dict[str, Tensor]], standard: dict[str, Tensor]
) -> None:
    two, three, whole = final(**late), final(tasks=3, **late), final(tasks=3)
    assert all(torch.equal(two[n], standard[n]) for n in standard)
    assert any(not torch.equal(three[n], whole[n]) for n in whole)


def test_the_options_are_the_settings_of_the_backend_and_two_more() -> None:
    # The loop freezes running statistics for all methods.
    settings = {item.name for item in fields(LoDASettings)} - {"freeze_statistics"}
    assert set(MethodConfig("loda").options) == settings | {"gao", "directions"}
    method: LoDAMethod = MethodConfig("loda", {"rank": 5, "gamma": 2.0}).build()
    assert method.settings == LoDASettings(rank=5, gamma=2.0, heldout=True)


def test_null_lora_is_loda_without_a_general_branch_in_the_null_space(
    final: Callable[..., dict[str, Tensor]],
) -> None:
    method: LoDAMethod = MethodConfig("null_lora").build()
    assert (method.settings.branches, method.settings.isolated) == ("isolated", "null")
    null = final(name="null_lora")
    spelled_out = final(branches="isolated", isolated="null", gao=False)
    assert all(torch.equal(null[n], spelled_out[n]) for n in null)


def test_the_null_space_update_leaves_outputs_on_old_inputs_unchanged(model: nn.Module) -> None:
    name = "blocks.0.attn.qkv"
    method = made("null_lora", model, target=name)
    learn(method, model, 0)
    # Old inputs that leave a null space: five tokens in sixteen dimensions.
    layer = find_layers(model, QKV)[name]
    old = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    history = method.state_dict()
    history[f"history/{name}"] = (old.mT @ old / 5).to(history[f"history/{name}"])
    method.load_state_dict(history)
    before, new = layer(old), layer(torch.ones(1, 16))
    learn(method, model, 1, lr=0.15)
    torch.testing.assert_close(layer(old), before, atol=1e-5, rtol=0)
    assert (layer(torch.ones(1, 16)) - new).abs().max() > 1e-3


def test_random_directions_know_nothing_of_the_images(model: nn.Module) -> None:
    method = made("loda", model, directions="random")
    assert isinstance(method, LoDAMethod)
    learn(method, model, 0)
    initial = []
    for pixels in (images(1), 3 * images(2).abs()):
        method.begin_task([(pixels, None)])
        layer = method.loda.layers["blocks.1.attn.qkv"]
        downs = [layer.branch(b).down.detach() for b in ("general", "isolated")]
        for down in downs:
            torch.testing.assert_close(3 * down @ down.mT, torch.eye(3))
        assert not torch.equal(*downs)
        initial.append(downs)
        method.loda.abandon_task()
    assert all(torch.equal(a, b) for a, b in zip(*initial, strict=True))
    method.begin_task(batches(1))
