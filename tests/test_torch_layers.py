"""Finding, replacing and restoring layers in models of all kinds."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from tiny_models import vit
from torch import Tensor, nn

from backends.torch import PRESETS, LoRALinear, adapt, attach, find_layers, restore


class Attention(nn.Module):
    """Separate projections, as in most libraries but timm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Identity()})

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        y: Tensor = self.out(weights @ self.v(x))
        return y


def fill(layers: dict[str, LoRALinear]) -> None:
    """A branch with something in it in every layer."""
    for seed, layer in enumerate(layers.values()):
        torch.manual_seed(seed)
        up = torch.randn(layer.out_features, 2)
        layer.add_branch("general", torch.randn(2, layer.in_features), up=up)


@pytest.mark.parametrize(
    ("model", "target", "names"),
    [
        (vit(), "*.attn.qkv", ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        (vit(), ["*.mlp.fc1", "head"], ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "head"]),
        (nn.Sequential(Attention(), Attention()), "*.[qv]", ["0.q", "0.v", "1.q", "1.v"]),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "*", ["0", "2"]),
        (Attention(), ("heads.*", "out"), ["out", "heads.a"]),
    ],
)
def test_logits_agree_before_adapted_merged_unmerged_and_restored(
    model: nn.Module, target: str, names: list[str]
) -> None:
    x = torch.randn(2, 3, 8, 8) if isinstance(model, VisionTransformer) else torch.randn(2, 5, 4)
    keys, modules = list(model.state_dict()), list(model.named_modules())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    logits = model(x)

    layers = adapt(model, target)
    assert list(layers) == names
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert all(layer.base is dict(modules)[name] for name, layer in layers.items())
    assert torch.equal(model(x), logits)

    fill(layers)
    adapted = model(x)
    used = [name for name in names if not name.startswith("heads")]
    assert torch.equal(adapted, logits) == (not used)
    for layer in layers.values():
        layer.merge()
    torch.testing.assert_close(model(x), adapted)
    restore(model, layers)
    torch.testing.assert_close(model(x), adapted)  # merged weights stay in the original layers
    for layer in layers.values():
        layer.unmerge()
    assert torch.equal(model(x), logits)

    assert list(model.state_dict()) == keys
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    after = list(model.named_modules())
    assert [n for n, _ in after] == [n for n, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(after, modules, strict=True))


def test_attach_puts_the_same_layers_back() -> None:
    model = vit()
    layers = adapt(model)
    fill(layers)
    x = torch.randn(1, 3, 8, 8)
    adapted = model(x)
    restore(model, layers)
    restore(model, layers)
    assert not torch.allclose(model(x), adapted)
    attach(model, layers)
    attach(model, layers)  # a second time changes nothing
    assert dict(find_layers(model)) == layers
    assert all(type(layer.base) is nn.Linear for layer in layers.values())
    assert torch.equal(model(x), adapted)


def test_only_the_branches_are_trained() -> None:
    model = vit().requires_grad_(False)
    layers = adapt(model)
    fill(layers)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{i}.attn.qkv.branches.general.up" for i in (0, 1)}
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


def test_layer_shared_by_two_parents_stays_shared() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared))
    layers = adapt(model, "*")
    assert len(layers) == 1
    assert model[0][0] is model[1][0] is layers["0.0"]
    restore(model, layers)
    assert model[0][0] is model[1][0] is shared


def test_layer_used_twice_by_one_parent_is_replaced_in_both_places() -> None:
    shared = nn.Linear(4, 4)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(3, 4)
    layers = adapt(model, "0")
    fill(layers)
    assert model[0] is model[2] is layers["0"]
    weight = layers["0"].weight
    step = nn.functional.linear(x, weight, shared.bias).tanh()
    torch.testing.assert_close(model(x), nn.functional.linear(step, weight, shared.bias))
    restore(model, layers)
    assert model[0] is model[2] is shared


def test_wrapped_layers_are_not_found_inside_their_wrapper() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = adapt(model, "0")
    assert list(find_layers(model, "*")) == ["0", "1"]
    with pytest.raises(ValueError, match="restore"):
        adapt(model, "*")
    assert type(model[1]) is nn.Linear
    assert adapt(model, "1")["1"] is model[1]
    restore(model, layers)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], LoRALinear)


def test_pattern_without_a_match_lists_the_linear_layers() -> None:
    model = nn.Sequential(Attention(), nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"attn\.qkv.*0\.q, 0\.k, 0\.v, 0\.out"):
        adapt(model)
    with pytest.raises(ValueError, match="wrong"):
        adapt(model, ["0.q", "wrong"])
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    with pytest.raises(ValueError, match="none"):
        adapt(nn.Sequential(nn.ReLU()), "*")
    with pytest.raises(ValueError, match="pattern"):
        adapt(model, [])


def test_parametrised_layer_is_refused_and_its_neighbours_stay_as_they_were() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), normed)
    with pytest.raises(TypeError, match="parametris"):
        adapt(model, "?")
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_bare_linear_layer_cannot_be_replaced_in_place() -> None:
    with pytest.raises(ValueError, match="Sequential"):
        adapt(nn.Linear(3, 3), "*")
    layers = adapt(nn.Sequential(nn.Linear(3, 3)), "*")
    assert list(layers) == ["0"]


NAMES = ["enc.0.q", "enc.0.k", "enc.1.q", "enc.1.k", "q", "head"]


def named() -> nn.Module:
    model = nn.Module()
    for name in NAMES:
        *path, last = name.split(".")
        parent = model
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, nn.Linear(4, 4))
    return model


@pytest.mark.parametrize(
    ("target", "exclude", "names"),
    [
        ("k", (), ["enc.0.k", "enc.1.k"]),  # a suffix
        ("q", (), ["q"]),  # a layer of that very name
        ("0.q", (), ["enc.0.q"]),
        (["k", "head"], (), ["enc.0.k", "enc.1.k", "head"]),
        ("*", "q", [n for n in NAMES if n != "q"]),
        ("all-linear", ["*.1.*", "head"], ["enc.0.q", "enc.0.k", "q"]),
        ("enc.?.[qk]", "*.0.q", ["enc.0.k", "enc.1.q", "enc.1.k"]),
    ],
)
def test_layers_are_named_by_suffix_pattern_and_exclusion(
    target: Any, exclude: Any, names: list[str]
) -> None:
    assert sorted(find_layers(named(), target, exclude)) == sorted(names)


def test_exclusions_that_match_nothing_or_everything_are_errors() -> None:
    with pytest.raises(ValueError, match=r"enc\.9"):
        find_layers(named(), "*", "enc.9.q")
    with pytest.raises(ValueError, match="exclude"):
        find_layers(named(), "k", "*.k")


def test_any_name_of_a_shared_layer_may_be_given() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert list(find_layers(model, "b.0")) == ["a"]
    assert list(find_layers(model, "b.*")) == ["a"]


def test_all_linear_leaves_out_what_a_model_calls_its_output() -> None:
    assert "head" not in find_layers(vit(), "all-linear")
    assert len(find_layers(vit(), "all-linear")) == 8
    assert len(find_layers(vit(), "*")) == 9


class Outputs(nn.Module):
    """A model that names its output layers as timm and transformers do."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.get_classifier = lambda: layers(self)
        self.get_output_embeddings = lambda: None


@pytest.mark.parametrize(
    ("layers", "left"),
    [
        (lambda model: (model.one, model.two), {"body"}),
        (lambda model: model.two, {"body", "one"}),
        (lambda model: nn.Identity(), {"body", "one", "two"}),
        (lambda model: None, {"body", "one", "two"}),
    ],
)
def test_output_layers_may_be_one_or_two_or_none(layers: Any, left: set[str]) -> None:
    model = Outputs(layers)
    assert set(find_layers(model, "all-linear")) == left
    adapt(model, "all-linear")
    assert set(find_layers(model, "all-linear")) == left


def test_presets_name_patterns() -> None:
    assert find_layers(vit(), "timm").keys() == find_layers(vit(), PRESETS["timm"]).keys()


@given(chosen=st.sets(st.integers(0, 5), min_size=1))
def test_any_subset_of_layers_comes_back_as_it_was(chosen: set[int]) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    originals = list(model)
    layers = adapt(model, [str(i) for i in sorted(chosen)])
    assert {i for i, original in enumerate(originals) if model[i] is not original} == chosen
    restore(model, layers)
    assert all(a is b for a, b in zip(model, originals, strict=True))


# Hooks of the user


def test_hooks_see_input_and_whole_output_in_the_shape_of_the_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(3, 5, 4, requires_grad=True)
    seen: dict[str, Any] = {}
    kept: list[tuple[Tensor, Tensor]] = []  # an output as it was, and as it is held

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.update(input=args[0], output=output)
        kept.append((output.detach().clone(), output))

    before = model[0].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model[0].register_forward_hook(after)
    model[0].register_full_backward_hook(lambda _, __, grad: seen.update(gradient=grad[0]))
    layers = adapt(model, "0")
    fill(layers)
    model(x).sum().backward()
    effective = layers["0"].weight.detach()
    torch.testing.assert_close(seen["input"], 2 * x)
    expected = nn.functional.linear(2 * x, effective, model[0].bias)
    torch.testing.assert_close(seen["output"], expected)
    torch.testing.assert_close(seen["gradient"], model[1].weight.sum(0).expand(3, 5, 4))

    before.remove()  # during the task, by the handle from before it
    model(x)
    torch.testing.assert_close(seen["input"], x)
    late = model[0].register_forward_hook(lambda *_: seen.update(late=True))
    restore(model, layers)
    model(x)
    assert seen.pop("late")
    late.remove()
    model(x)
    assert "late" not in seen
    assert all(torch.equal(was, held) for was, held in kept)
    assert len(model[0]._forward_hooks) == 1


def test_a_hook_that_changes_the_output_changes_it_adapted_too() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    model[0].register_forward_hook(lambda _, __, output: output + 1)
    layers = adapt(model, "0")
    fill(layers)
    adapted = model(x)
    assert torch.equal(model[0](input=x), adapted)
    layers["0"].merge()
    torch.testing.assert_close(model(x), adapted)
    restore(model, layers)
    torch.testing.assert_close(model(x), adapted)


def test_backward_hooks_go_on_in_a_copy_too() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 4)
    seen: list[nn.Module] = []
    model[0].register_full_backward_hook(lambda module, *_: seen.append(module))
    layers = adapt(model, "0")
    fill(layers)
    model(x.requires_grad_()).sum().backward()
    assert len(seen) == 1
    copy.deepcopy(model)(x).sum().backward()
    assert len(seen) == 2


class Keeps(nn.Linear):
    """A layer that holds what it has returned."""

    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def test_what_a_layer_holds_is_not_written_to() -> None:
    model, x = nn.Sequential(Keeps(4, 4)), torch.randn(2, 3, 4)
    plain = model(x).detach().clone()
    layers = adapt(model, "0")
    fill(layers)
    assert not torch.allclose(model(x), plain)
    assert torch.equal(layers["0"].base.last, plain)
