"""Checks cost one scalar read, and nothing is read where values come later: torch's tracing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import CALLS, MATRIX, call, every_call
from tiny_models import HostReads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import loda_math as lm


@every_call
def test_one_scalar_is_read(name: str) -> None:
    with HostReads() as reads:
        call(torch, name)
    assert set(reads.seen) == {"_local_scalar_dense"}
    # The search for a trace ratio also reads whether it is done, a few times for every try.
    assert len(reads.seen) == 1 or (name == "trace_ratio_solution" and len(reads.seen) < 30)


def test_steps_read_nothing() -> None:
    one, radius = torch.ones(3), torch.tensor(0.1)
    with HostReads() as reads:
        lm.lookahead([one], [one], radius)
        lm.gradient_alignment([one], [one])
        lm.project_conflict([one], [-one])
        lm.second_moment(torch.ones(4, 3), check=False)
    assert reads.seen == []


def arguments(name: str) -> list[torch.Tensor]:
    return [torch.from_numpy(MATRIX[a]) for a in CALLS[name][1]]


def plain(name: str) -> Callable[..., Any]:
    """The function, with moments reduced to their mean."""
    function = CALLS[name][0]
    return lambda *a: (
        getattr(function(*a), "mean", None) if name == "second_moment" else function(*a)
    )


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (a, b)), strict=True):
        torch.testing.assert_close(x, y)


@every_call
def test_runs_under_vmap_without_reading(name: str) -> None:
    stacked = [torch.stack([x, 2 * x]) for x in arguments(name)]
    function = plain(name)
    with HostReads() as reads:
        mapped = torch.func.vmap(function)(*stacked)
    assert reads.seen == []
    assert_same(mapped, function(*stacked))


@every_call
def test_runs_under_tracing(name: str) -> None:
    function, inputs = plain(name), arguments(name)
    for mode in ("real", "fake"):
        graph = make_fx(function, tracing_mode=mode)(*inputs)
        assert_same(graph(*inputs), function(*inputs))
    with FakeTensorMode() as fake:
        shapes = function(*(fake.from_tensor(x) for x in inputs))
    reality = function(*inputs)
    for x, y in zip(
        *((r if isinstance(r, tuple) else (r,)) for r in (shapes, reality)), strict=True
    ):
        assert x.shape == y.shape
        assert x.dtype == y.dtype


@pytest.mark.parametrize("name", ["second_moment", "isolated_subspace", "recalibration full"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiles_into_one_graph(name: str) -> None:
    function, inputs = plain(name), arguments(name)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert_same(compiled(*inputs), function(*inputs))


def test_gradients_are_looked_ahead_under_tracing() -> None:
    x, labels = torch.ones(3), torch.tensor([1, 2, 1])
    step = make_fx(lambda p, g, r: lm.lookahead([p], [g], r)[0])(x, x.clone(), torch.tensor(0.1))
    assert_same(step(x, 2 * x, torch.tensor(0.5)), lm.lookahead([x], [x], 0.5)[0])
    split = make_fx(lm.class_split)(labels, torch.tensor([1, 2]))
    assert_same(tuple(split(labels, torch.tensor([2, 1]))), (labels == 2, labels == 1))


@every_call
def test_shapes_are_found_without_values(name: str) -> None:
    on_meta = {a: torch.from_numpy(MATRIX[a]).to("meta") for a in CALLS[name][1]}
    result = call(torch, name, **on_meta)
    result = result[0] if isinstance(result, tuple) else result
    assert result.device.type == "meta"
