"""InfLoRA: what it protects and reaches; and DualGPM by itself, on moments of chosen spectra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learning import QKV, batches, images, learn, made
from torch import Tensor, nn

from backends.torch import collect_moments, find_layers
from training.methods.inflora import GradientMemory, InfLoRA

DIM = 12


def inflora(model: nn.Module, **options: object) -> InfLoRA:
    method = made("inflora", model, **options)
    assert isinstance(method, InfLoRA)
    return method


def test_directions_avoid_what_is_protected(model: nn.Module) -> None:
    method = inflora(model, lamb=0.5, lame=0.6)
    for task in range(3):
        new = collect_moments(model, [images(task)], QKV)
        before = dict(method.memories)
        method.begin_task(batches(task))
        for name, layer in method.layers.items():
            down = layer.branch("all").down.detach().double()
            scale = torch.linalg.norm(down, dim=1)
            live = scale > 0
            torch.testing.assert_close(scale[live], torch.full_like(scale[live], 3**-0.5))
            assert live.any()
            assert not layer.branch("all").down.requires_grad
            if task:
                assert (down @ protected(before[name])).abs().max() < 1e-5
            else:  # the leading directions of the first task's inputs
                values = torch.linalg.eigvalsh(new[name].mean.double())
                energy = 3 * torch.trace(down @ new[name].mean.double() @ down.mT)
                assert float(energy) == pytest.approx(float(values[-3:].sum()), rel=1e-4)
        method.end_task(batches(task))


def test_a_share_is_protected_that_grows_over_the_stream(model: nn.Module) -> None:
    method = inflora(model, tasks=4, lamb=0.6, lame=0.9)
    expected: dict[str, GradientMemory] = {}
    for task, wanted in enumerate((0.6, 0.675, 0.75, 0.825)):
        learn(method, model, task)
        for name, collected in collect_moments(model, [images(task)], QKV).items():
            # Through the trained and merged model, to rounding.
            memory = expected.get(name) or GradientMemory.empty(collected.mean)
            expected[name] = memory.updated(collected.mean, wanted)
            ours, theirs = method.memories[name], expected[name]
            assert (ours.free, ours.basis.shape) == (theirs.free, theirs.basis.shape)
            spans = [m.basis @ m.basis.mT for m in (ours, theirs)]
            torch.testing.assert_close(*spans, atol=1e-3, rtol=0)


def test_updates_do_not_reach_protected_inputs(model: nn.Module) -> None:
    name = "blocks.0.attn.qkv"
    method = inflora(model, target=name, lamb=0.9, lame=0.9)
    learn(method, model, 0)
    memory = method.memories[name]
    assert not memory.free
    layer = find_layers(model, name)[name]
    old = memory.basis.mT.float()
    before = layer(old)
    learn(method, model, 1, lr=1.0)
    torch.testing.assert_close(layer(old), before, atol=1e-5, rtol=0)


def test_parts_are_reached_alone(model: nn.Module) -> None:
    start = {name: layer.weight.clone() for name, layer in find_layers(model, QKV).items()}
    learn(inflora(model, parts="kv"), model, 0)
    for name, layer in find_layers(model, QKV).items():
        change = (layer.weight - start[name]).abs().amax(dim=1)
        assert change[:16].max() == 0
        assert change[16:].max() > 0


# DualGPM


def moment(spectrum: list[float], seed: int) -> Tensor:
    """Q diag(s) Qᵀ with a random orthogonal Q."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(square).Q
    values = torch.tensor(spectrum + [0.0] * (DIM - len(spectrum)), dtype=torch.float64)
    return (q * values) @ q.mT


def protected(memory: GradientMemory) -> Tensor:
    """Projector onto the protected space."""
    span = memory.basis @ memory.basis.mT
    return torch.eye(len(span), dtype=torch.float64) - span if memory.free else span


def share(memory: GradientMemory, of: Tensor) -> float:
    return float((protected(memory) @ of).square().sum() / of.square().sum())


spectra = st.lists(st.floats(0.01, 10.0), min_size=2, max_size=5)


@settings(max_examples=40, deadline=None)
@given(spectra, spectra, spectra, st.floats(0.5, 0.99), st.integers(0, 1000))
def test_the_share_asked_for_is_protected_and_nothing_is_forgotten(
    first: list[float], second: list[float], third: list[float], wanted: float, seed: int
) -> None:
    moments = [moment(s, seed + k) for k, s in enumerate((first, second, third))]
    memory = GradientMemory.empty(moments[0])
    before = protected(memory)
    for task, current in enumerate(moments):
        memory = memory.updated(current, wanted)
        k = memory.basis.shape[1]
        gram = memory.basis.mT @ memory.basis
        torch.testing.assert_close(gram, torch.eye(k, dtype=torch.float64))
        after = protected(memory)
        # The protected space only grows, and holds the share of the task that was just learned
        # (on the first task the published rule stops one direction earlier).
        torch.testing.assert_close(after @ before, before, atol=1e-8, rtol=0)
        if task:
            assert share(memory, current) >= wanted - 1e-8
        before = after


def test_the_first_task_stops_a_direction_early_and_keeps_at_least_one() -> None:
    gram = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    # Cumulative shares of the squares: 9/14, 13/14, 1.
    sizes = [GradientMemory.empty(gram).updated(gram, e).basis.shape[1] for e in (0.5, 0.7, 0.95)]
    assert sizes == [1, 1, 2]


def test_the_smaller_of_space_and_complement_is_kept() -> None:
    gram = torch.eye(6)
    memory = GradientMemory.empty(gram).updated(gram, 0.9)
    # Five of six directions are protected; kept is the one that is free.
    assert memory.free
    assert memory.basis.shape == (6, 1)
    again = memory.updated(gram, 0.9)
    assert again.basis.shape[1] in (0, 1)


def test_free_directions_are_the_best_of_what_is_free() -> None:
    old, new = moment([5.0, 4.0], 0), moment([9.0, 3.0, 2.0, 1.0], 1)
    memory = GradientMemory.empty(old).updated(old, 0.9).updated(old, 0.999)
    assert memory.basis.shape[1] == 2
    directions = memory.free_directions(new, 3)
    torch.testing.assert_close(memory.basis.mT @ directions, torch.zeros(2, 3).double())
    # Independent oracle: eigenvectors of R Rᵀ with R = (I - P) C.
    rest = (torch.eye(DIM).double() - protected(memory)) @ new
    values, vectors = torch.linalg.eigh(rest @ rest.mT)
    top = vectors[:, -3:]
    torch.testing.assert_close(directions @ directions.mT, top @ top.mT, atol=1e-8, rtol=0)
    assert values[-3] > 1e-6


def test_no_direction_is_made_up_where_nothing_is_free() -> None:
    old = moment([5.0, 4.0, 3.0], 0)
    memory = GradientMemory.empty(old).updated(old, 0.999).updated(old, 0.9999)
    assert memory.basis.shape[1] == 3
    assert memory.free_directions(old, 2).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_have_the_dtype_of_the_moment(dtype: torch.dtype) -> None:
    gram = moment([2.0, 1.0], 0).to(dtype)
    assert GradientMemory.empty(gram).free_directions(gram, 1).dtype == dtype
