"""What of the mathematics only torch shows: autograd, half precision, autocast."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import orthogonal, seeds

from loda_math import (
    first_order_update,
    general_subspace,
    isolated_subspace,
    lookahead,
    projection_energy,
    recalibration,
    second_moment,
)
from loda_math._eigh import _on_host

halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def tokens_of(count: int, size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).standard_normal((count, size)))


@given(seed=seeds, step=st.sampled_from([1e-3, 2.0]))
def test_first_order_update_is_the_step_that_autograd_finds(seed: int, step: float) -> None:
    rng = np.random.default_rng(seed)
    tokens, down, frozen = (
        torch.from_numpy(rng.standard_normal(shape)) for shape in ((7, 5), (2, 5), (7, 3))
    )
    up = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    output = frozen + tokens @ (up @ down).T
    output.retain_grad()
    torch.nn.functional.cross_entropy(output, torch.arange(7) % 3).backward()
    update = first_order_update(tokens, down, output.grad, step)
    change = tokens @ (-step * up.grad @ down).T
    torch.testing.assert_close(update.output, change)
    torch.testing.assert_close(update.loss, torch.sum(output.grad * change))


def test_half_precision_bases_are_summed_wide() -> None:
    rng = np.random.default_rng(0)
    u = torch.from_numpy(orthogonal(64, rng)[:, :8]).to(torch.bfloat16)
    s = torch.diag(torch.from_numpy(rng.uniform(size=64)))
    energy = projection_energy(u, s)
    assert energy.dtype == torch.float64
    assert float(energy) == pytest.approx(float(torch.trace(u.double().T @ s @ u.double())))
    assert projection_energy(u, s.to(torch.bfloat16)).dtype == torch.bfloat16


@halves
def test_lookahead_in_half_precision(dtype: torch.dtype) -> None:
    params, grads = torch.zeros(300, dtype=dtype), torch.full((300,), 1e-4, dtype=dtype)
    (moved,) = lookahead([params], [grads], 0.5)
    assert moved.dtype == dtype
    assert float(torch.linalg.norm(moved.float())) == pytest.approx(0.5, rel=1e-2)
    # Gradients in float32 beside parameters in half precision, a radius on the device.
    (mixed,) = lookahead([params], [grads.float()], torch.tensor(0.5))
    assert torch.equal(mixed, moved)


@halves
def test_half_precision_is_cast_up_first(dtype: torch.dtype) -> None:
    x = tokens_of(400, 30).to(dtype)
    total = second_moment(x).total
    assert total.dtype == torch.float64
    exact = x.double().T @ x.double()
    assert float((total - exact).abs().max()) < 1e-3
    rounded = (x.T @ x).double()
    assert float((rounded - exact).abs().max()) > 0.05
    assert float(torch.linalg.eigvalsh(total)[0]) > 0


def test_autocast_does_not_halve_the_gram_matrix() -> None:
    x = tokens_of(500, 20).float()
    plain = second_moment(x).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x.T @ x).dtype == torch.bfloat16  # the danger is there
        under = second_moment(x).total
    assert torch.equal(plain, under)


@pytest.mark.parametrize("form", ["full", "diagonal", "direction", "scalar"])
def test_half_precision_branches_beside_precise_moments(form: str) -> None:
    """A model in bfloat16 keeps its quiet directions: the projections are exact as they are."""
    rank = 32
    energies = torch.logspace(0, -3, rank, dtype=torch.float64)
    eye = torch.eye(rank, dtype=torch.bfloat16)
    result = recalibration(eye, eye, torch.diag(energies), torch.diag(energies), 3.0, form)
    torch.testing.assert_close(torch.diagonal(result), torch.full((rank,), 0.75).double())


@halves
def test_half_precision_moments_keep_their_leading_directions(dtype: torch.dtype) -> None:
    size = 300  # size·eps exceeds one in bfloat16
    new = torch.diag(torch.linspace(0, 1, size)).to(dtype)
    old = torch.eye(size, dtype=dtype)
    for u in (general_subspace(new, old, 3), isolated_subspace(new, old, 3)):
        assert u.dtype == dtype
        assert torch.equal(u.float().sum(dim=0), torch.ones(3))
    assert general_subspace(new, old.double(), 3).dtype == torch.float64


def test_tensors_with_gradients_take_the_standard_route() -> None:
    large = torch.eye(200, dtype=torch.float64)
    assert _on_host(large, 5)
    assert not _on_host(large.clone().requires_grad_(), 5)
    assert not _on_host(large.to(torch.bfloat16), 5)
    assert not _on_host(large.to("meta"), 5)
