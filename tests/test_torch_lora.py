"""LoRA layers against dense algebra and autograd: outputs, gradients, merging, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

from backends.torch import InProjection, LoRALinear

D, O, R = 6, 9, 2  # noqa: E741 - the shapes of the method: inputs, outputs, rank


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def linear(seed: int = 0, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(D, O, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(random(O, D, seed=seed))
        if bias:
            layer.bias.copy_(random(O, seed=seed + 1))
    return layer


def two_branches(dtype: torch.dtype = torch.float32) -> LoRALinear:
    layer = LoRALinear(linear(dtype=dtype))
    layer.add_branch("general", random(R, D, seed=2), up=random(O, R, seed=3), scale=0.25)
    layer.add_branch("isolated", random(3, D, seed=4), up=random(O, 3, seed=5), scale=0.5)
    return layer


def dense(layer: LoRALinear) -> Tensor:
    """W + Σ w B A in float64, rows placed by hand."""
    weight = layer.base.weight.detach().double().clone()
    for name in layer.branches:
        branch = layer.branch(name)
        first, last = branch.rows or (0, O)
        update = branch.up.detach().double() @ branch.down.detach().double()
        weight[first:last] += branch.scale * update
    return weight


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}


@given(
    seed=seeds,
    branches=st.lists(
        st.tuples(
            st.integers(1, 5),
            st.floats(-2, 2),
            st.none() | st.tuples(st.integers(0, O - 1), st.integers(1, O)),
        ),
        max_size=4,
    ),
    leading=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    bias=st.booleans(),
)
def test_output_is_that_of_the_dense_weight_before_merged_and_unmerged(
    seed: int,
    branches: list[tuple[int, float, tuple[int, int] | None]],
    leading: list[int],
    dtype: torch.dtype,
    bias: bool,
) -> None:
    seed %= 2**31
    layer = LoRALinear(linear(seed, bias=bias, dtype=dtype))
    for i, (rank, scale, rows) in enumerate(branches):
        rows = None if rows is None or rows[0] >= rows[1] else rows
        count = O if rows is None else rows[1] - rows[0]
        up = random(count, rank, seed=seed + i)
        layer.add_branch(f"b{i}", random(rank, D, seed=seed - i), up=up, scale=scale, rows=rows)
    x = random(*leading, D, seed=seed + 9, dtype=dtype)
    weight = dense(layer)
    shift = layer.bias.double() if layer.bias is not None else None
    expected = F.linear(x.double(), weight, shift)
    close = {"rtol": TOLERANCE[dtype], "atol": 50 * TOLERANCE[dtype]}
    torch.testing.assert_close(layer(x).double(), expected, **close)
    torch.testing.assert_close(layer.weight.double(), weight, **close)
    before = layer.base.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x).double(), expected, **close)
    torch.testing.assert_close(layer.base(x).double(), expected, **close)
    layer.unmerge()
    torch.testing.assert_close(layer(x).double(), expected, **close)
    assert torch.equal(layer.base.weight, before)


def test_output_is_the_sum_of_the_branches_one_by_one() -> None:
    layer, x = two_branches(), random(7, D, seed=6)
    expected = layer.base(x)
    for name in layer.branches:
        branch = layer.branch(name)
        expected = expected + branch.scale * (x @ branch.down.T @ branch.up.T)
    torch.testing.assert_close(layer(x), expected)


def test_branch_on_value_rows_leaves_queries_and_keys_bit_identical() -> None:
    layer, x = LoRALinear(linear()), random(4, D, seed=7)
    plain = layer(x)
    values = (2 * O // 3, O)
    layer.add_branch("v", random(R, D, seed=8), up=random(O // 3, R, seed=9), rows=values)
    y = layer(x)
    assert torch.equal(y[:, : values[0]], plain[:, : values[0]])
    assert bool((y[:, values[0] :] != plain[:, values[0] :]).all())
    assert torch.count_nonzero(layer.delta()[: values[0]]) == 0
    before = layer.base.weight.clone()
    layer.merge()
    assert torch.equal(layer.base.weight[: values[0]], before[: values[0]])


def test_new_branch_and_no_branch_change_no_bit_of_the_output() -> None:
    base, x = linear(), random(4, D, seed=7)
    plain = base(x)
    layer = LoRALinear(base)
    assert torch.equal(layer(x), plain)
    assert torch.equal(layer.weight, base.weight)
    layer.add_branch("general", random(R, D, seed=8))
    assert torch.equal(layer(x), plain)
    layer.drop_branch("general")
    assert torch.equal(layer(x), plain)
    assert layer.base is base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_branches_are_float32_or_wider_beside_a_layer_of_any_dtype(dtype: torch.dtype) -> None:
    layer = two_branches(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in layer.branches.parameters()} == {wide}
    assert {p.dtype for p in layer.base.parameters()} == {dtype}
    x = random(3, D, seed=1, dtype=dtype)
    assert layer(x).dtype == layer.weight.dtype == dtype
    # The update itself is summed in float32 or wider: halves would lose small branches.
    assert layer.delta().dtype == torch.promote_types(dtype, torch.float32)
    expected = dense(layer).to(dtype)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-2, atol=1e-2)
    effective = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.base.weight, effective)


def test_branch_works_under_autocast() -> None:
    layer, x = two_branches(), random(5, D, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=0.3)
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("train_down", [False, True])
def test_gradients_are_those_of_the_dense_formulation(train_down: bool) -> None:
    layer = LoRALinear(linear(dtype=torch.float64))
    layer.add_branch(
        "v", random(R, D, seed=2), up=random(4, R, seed=3), scale=0.3, rows=(2, 6),
        train_down=train_down,
    )  # fmt: skip
    layer.add_branch("all", random(3, D, seed=4), up=random(O, 3, seed=5), scale=-1.5)
    x = random(8, D, seed=6, dtype=torch.float64).requires_grad_()
    goal = random(8, O, seed=7, dtype=torch.float64)
    F.mse_loss(layer(x), goal).backward()

    copies = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    rows = torch.zeros(O, 4, dtype=torch.float64)
    rows[2:6] = torch.eye(4, dtype=torch.float64)
    weight = (
        copies["base.weight"]
        + 0.3 * rows @ copies["branches.v.up"] @ copies["branches.v.down"]
        - 1.5 * copies["branches.all.up"] @ copies["branches.all.down"]
    )
    z = x.detach().clone().requires_grad_()
    F.mse_loss(z @ weight.T + copies["base.bias"], goal).backward()
    torch.testing.assert_close(x.grad, z.grad)
    trained = {"branches.v.up", "branches.all.up"} | ({"branches.v.down"} if train_down else set())
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad == (name in trained)
        assert (parameter.grad is not None) == (name in trained)
        if name in trained:
            torch.testing.assert_close(parameter.grad, copies[name].grad)


def test_training_moves_the_up_projection_alone() -> None:
    layer = two_branches()
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(random(4, D, seed=9)).square().sum().backward()
    optimizer.step()
    moved = {k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"branches.general.up", "branches.isolated.up"}


def test_projections_are_copied() -> None:
    down, up = random(R, D, seed=1), random(O, R, seed=2)
    layer = LoRALinear(linear())
    branch = layer.add_branch("general", down, up=up)
    down.zero_()
    up.zero_()
    assert bool(branch.down.abs().sum() > 0)
    assert bool(branch.up.abs().sum() > 0)


@pytest.mark.parametrize(
    ("down", "keywords", "message"),
    [
        ((R, D + 1), {}, "down"),
        ((0, D), {}, "down"),
        ((R, D, 1), {}, "down"),
        ((R, D), {"up": (O + 1, R)}, "up"),
        ((R, D), {"up": (O, R), "rows": (0, 3)}, "up"),
        ((R, D), {"rows": (3, 3)}, "rows"),
        ((R, D), {"rows": (-1, 3)}, "rows"),
        ((R, D), {"rows": (0, O + 1)}, "rows"),
    ],
)
def test_branches_that_do_not_fit_are_refused(
    down: tuple[int, ...], keywords: dict[str, tuple[int, ...]], message: str
) -> None:
    layer = LoRALinear(linear())
    given = {k: torch.ones(v) if k == "up" else v for k, v in keywords.items()}
    with pytest.raises(ValueError, match=message):
        layer.add_branch("general", torch.ones(down), **given)  # type: ignore[arg-type]
    assert not layer.branches


def test_names_are_unique_and_known() -> None:
    layer = two_branches()
    with pytest.raises(ValueError, match="general"):
        layer.add_branch("general", random(R, D))
    for act in (layer.branch, layer.drop_branch):
        with pytest.raises(KeyError, match=r"shared.*general.*isolated"):
            act("shared")
    assert "general" in repr(layer)
    assert "merged=False" in repr(layer)


def test_only_linear_layers_with_a_weight_of_their_own_can_be_adapted() -> None:
    with pytest.raises(TypeError, match="Conv2d"):
        LoRALinear(nn.Conv2d(1, 1, 3))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, O))
    with pytest.raises(TypeError, match="parametris"):
        LoRALinear(normed)


def test_a_backward_hook_on_the_frozen_layer_changes_nothing() -> None:
    plain, hooked = two_branches(), two_branches()
    seen, results = [], []
    hooked.base.register_full_backward_hook(lambda *_: seen.append(1))
    for layer in (plain, hooked):
        x = random(2, 3, D, seed=7).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        ups = [layer.branch(name).up.grad for name in layer.branches]
        results.append([y, x.grad, *ups])
    assert seen
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("joint", [False, True])
def test_coefficients_go_between_up_and_down(joint: bool) -> None:
    layer = two_branches(torch.float64)
    general, isolated = layer.branch("general"), layer.branch("isolated")
    size = R + 3 if joint else R
    drawn = random(size, size, seed=11, dtype=torch.float64)
    between = torch.eye(R + 3, dtype=torch.float64)
    torch.testing.assert_close(layer.delta(between), layer.delta())
    between[:size, :size] = drawn
    up = torch.cat([0.25 * general.up, 0.5 * isolated.up], dim=1)
    expected = up @ between @ torch.cat([general.down, isolated.down])
    coefficients = drawn if joint else {"general": drawn}
    torch.testing.assert_close(layer.delta(coefficients), expected)
    weight = layer.base.weight + expected
    layer.merge(coefficients)
    torch.testing.assert_close(layer.base.weight, weight, check_stride=False)


def test_coefficients_that_do_not_fit_are_refused_and_nothing_is_written() -> None:
    layer = two_branches()
    before = layer.base.weight.clone()
    with pytest.raises(KeyError, match=r"genral.*general.*isolated"):
        layer.merge({"genral": torch.eye(R)})
    with pytest.raises(ValueError, match="2×2"):
        layer.merge({"general": torch.ones(R)})
    with pytest.raises(ValueError, match="5×5"):
        layer.merge(torch.eye(R))
    assert not layer.merged
    assert torch.equal(layer.base.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_is_bit_exact(dtype: torch.dtype) -> None:
    layer = two_branches(dtype)
    with torch.no_grad():
        layer.base.weight.mul_(1e4)  # adding and subtracting the update would lose digits here
    before, storage = layer.base.weight.clone(), layer.base.weight.data_ptr()
    layer.merge()
    assert layer.merged
    assert not torch.equal(layer.base.weight, before)
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.base.weight, before)
    assert layer.base.weight.data_ptr() == storage


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merge_refuses_values_that_are_not_finite(value: float) -> None:
    layer = two_branches()
    before = layer.base.weight.clone()
    with torch.no_grad():
        layer.branch("isolated").up[0, 0] = value
    with pytest.raises(FloatingPointError, match="NaN"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.base.weight, before)


def test_merge_refuses_an_update_that_overflows_the_dtype_of_the_weight() -> None:
    layer = LoRALinear(linear(dtype=torch.float16))
    layer.add_branch("big", torch.full((1, D), 300.0), up=torch.full((O, 1), 300.0))
    with pytest.raises(FloatingPointError):
        layer.merge()
    assert bool(layer.base.weight.isfinite().all())


@pytest.mark.parametrize("kind", ["linear", "own forward", "transposed", "convolution", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_staged_layer_computes_with_the_bits_of_a_merged_one(
    kind: str, dtype: torch.dtype
) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + self.bias

    class Conv1D(nn.Module):
        nf = 6

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    torch.manual_seed(0)
    x = torch.randn(3, 8, 2, 2).to(dtype) if kind == "convolution" else torch.randn(3, 8).to(dtype)
    base: nn.Module = {
        "linear": lambda: nn.Linear(8, 6),
        "own forward": lambda: Own(8, 6),
        "transposed": Conv1D,
        "convolution": lambda: nn.Conv2d(8, 6, 1).to(memory_format=torch.channels_last),
        "packed": lambda: InProjection(nn.MultiheadAttention(8, 2).to(dtype), "k"),
    }[kind]()
    layer = LoRALinear(base.to(dtype))
    rows = len(layer.frozen)
    layer.add_branch("a", torch.randn(2, 8), up=torch.randn(rows, 2), scale=0.1)
    before = layer.base.weight.detach().clone()
    apart = layer(x)
    layer.stage({"a": torch.tensor([[2.0, 0.5], [0.1, 1.0]])})
    assert layer.staged
    assert not layer.merged
    assert torch.equal(layer.base.weight, before)  # type: ignore[arg-type]
    staged, weight = layer(x), layer.weight.detach().clone()
    assert torch.equal(layer.base.weight, before)  # type: ignore[arg-type]
    assert weight.stride() == before.stride()
    layer.unstage()
    assert torch.equal(layer(x), apart)
    layer.stage({"a": torch.tensor([[2.0, 0.5], [0.1, 1.0]])})
    layer.commit()
    assert layer.merged
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), staged)
    assert not torch.equal(layer(x), apart)
    for call in (layer.unmerge, layer.commit, layer.stage):  # nothing was saved, nothing is staged
        with pytest.raises(ValueError, match="merge"):
            call()


def test_a_merged_layer_can_only_be_unmerged() -> None:
    layer = two_branches()
    layer.merge()
    weight = layer.base.weight.clone()
    for act in (
        lambda: layer.add_branch("third", random(R, D)),
        lambda: layer.drop_branch("general"),
        layer.merge,
    ):
        with pytest.raises(ValueError, match="unmerge"):
            act()
    assert torch.equal(layer.base.weight, weight)
    assert list(layer.branches) == ["general", "isolated"]
    layer.unmerge()
    with pytest.raises(ValueError, match="merged"):
        layer.unmerge()


def test_copy_in_the_middle_of_a_merge_is_independent() -> None:
    layer = two_branches()
    before = layer.base.weight.clone()
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert layer.merged
    assert torch.equal(twin.base.weight, before)
    assert not torch.equal(layer.base.weight, before)


# Half precision


def half(norm: float = 4e-3, *, master: bool = False) -> LoRALinear:
    """A bfloat16 layer with an update of this size relative to its weight."""
    base = nn.Linear(64, 64).to(torch.bfloat16)
    base.weight.data.copy_(random(64, 64, seed=1))
    layer = LoRALinear(base, master=base.weight.detach().float() if master else None)
    layer.add_branch("a", random(8, 64, seed=2), up=random(64, 8, seed=3))
    with torch.no_grad():
        layer.branch("a").up.mul_(norm * base.weight.float().norm() / layer.delta().norm())
    return layer


def test_small_steps_of_an_optimiser_are_not_lost_in_half_precision() -> None:
    layer = LoRALinear(linear(dtype=torch.bfloat16))
    layer.add_branch("a", random(R, D, seed=2), up=torch.ones(O, R))
    optimizer = torch.optim.SGD(layer.branches.parameters(), lr=1e-5)
    for _ in range(10):
        optimizer.zero_grad()
        layer(random(4, D, seed=1, dtype=torch.bfloat16)).float().sum().backward()
        optimizer.step()
    moved = layer.branch("a").up.detach() - 1
    assert bool((moved != 0).all())
    assert float(moved.abs().max()) < 2**-9  # bfloat16 has nothing that close to 1


@pytest.mark.parametrize("norm", [4e-3, 3e-2])
def test_rounding_of_a_merge_is_measured(norm: float) -> None:
    layer = half(norm)
    assert layer.rounding is None
    before, delta = layer.base.weight.detach().double(), layer.delta().detach().double()
    layer.merge()
    realised = layer.base.weight.detach().double() - before
    both = torch.stack([realised.flatten(), delta.flatten()])
    cosine = both[0] @ both[1] / both[0].norm() / both[1].norm()
    assert layer.rounding is not None
    torch.testing.assert_close(layer.rounding.correlation.double(), cosine, rtol=1e-4, atol=0)
    error = (realised - delta).norm() / delta.norm()
    torch.testing.assert_close(layer.rounding.error.double(), error, rtol=1e-4, atol=0)
    assert (float(cosine) > 0.99) == (norm > 1e-2)


def test_rounding_of_updates_that_are_nothing_or_become_nothing() -> None:
    for norm, expected in ((0.0, (0.0, 1.0)), (1e-6, (1.0, 0.0))):
        layer = half(norm)
        layer.merge()
        assert layer.rounding is not None
        assert tuple(map(float, layer.rounding)) == pytest.approx(expected, abs=1e-3)
    plain = two_branches()
    plain.merge()
    assert plain.rounding is None


def test_master_takes_up_what_many_merges_would_lose() -> None:
    layers = {"with": half(master=True), "without": half()}
    start = layers["with"].base.weight.detach().double()
    total = torch.zeros_like(start)
    for task in range(20):
        for name, last in layers.items():
            layer = layers[name] = LoRALinear(last.base, master=last.master)
            layer.add_branch("a", random(8, 64, seed=task), up=last.branch("a").up)
            if name == "with":
                total += layer.delta().detach().double()
            layer.merge()
    master = layers["with"].master
    assert master is not None
    assert master.dtype == torch.float32
    torch.testing.assert_close(master.double(), start + total, rtol=1e-6, atol=1e-6)
    assert torch.equal(layers["with"].base.weight, master.bfloat16())
    errors = {
        name: float((layer.base.weight.double() - start - total).norm() / total.norm())
        for name, layer in layers.items()
    }
    assert errors["with"] < 0.12 < 0.25 < errors["without"]


def test_unmerge_takes_the_master_back_too() -> None:
    layer = half(master=True)
    weight, master = layer.base.weight.detach().clone(), layer.master
    layer.merge()
    assert layer.master is not master
    layer.unmerge()
    assert torch.equal(layer.base.weight, weight)
    assert layer.master is master


def test_autocast_does_not_reach_a_merge() -> None:
    layer, cast = two_branches(), two_branches()
    layer.merge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.merge()
    assert torch.equal(layer.base.weight, cast.base.weight)


# Frozen down-projections side by side


def frozen_branches() -> tuple[LoRALinear, Tensor]:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 4).double())
    for name in ("a", "b"):
        layer.add_branch(name, torch.randn(2, 6), up=torch.randn(4, 2), scale=0.5)
    return layer, torch.randn(3, 6, dtype=torch.float64)


def plain_output(layer: LoRALinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.frozen + layer.delta(), layer.bias)


def test_downs_that_change_in_any_way_change_the_output() -> None:
    def written(layer: LoRALinear) -> None:
        with torch.no_grad():
            layer.branch("b").down.mul_(3)

    def written_behind_autograd(layer: LoRALinear) -> None:
        layer.branch("a").down.data.add_(1)

    def replaced(layer: LoRALinear) -> None:
        layer.branch("a").down = nn.Parameter(torch.ones(2, 6).double(), requires_grad=False)

    def given_other_memory(layer: LoRALinear) -> None:
        layer.branch("b").down.data = torch.ones(2, 6).double()

    def loaded(layer: LoRALinear) -> None:
        layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()})

    def dropped(layer: LoRALinear) -> None:
        layer.drop_branch("a")
        layer.add_branch("c", torch.ones(2, 6), up=torch.ones(4, 2))

    def trained(layer: LoRALinear) -> None:
        layer.branch("a").down.requires_grad_()
        layer(torch.ones(1, 6).double()).sum().backward()
        assert layer.branch("a").down.grad is not None
        layer.branch("a").down.requires_grad_(False)
        written_behind_autograd(layer)

    def narrowed(layer: LoRALinear) -> None:
        layer.double().float().double()

    for change in (
        written, written_behind_autograd, replaced, given_other_memory, loaded, dropped, trained,
        narrowed,
    ):  # fmt: skip
        layer, x = frozen_branches()
        before = layer(x)
        torch.testing.assert_close(before, plain_output(layer, x))
        change(layer)
        for _ in range(2):
            torch.testing.assert_close(layer(x), plain_output(layer, x))
        if change is not narrowed:
            assert not torch.allclose(layer(x), before)


def test_copies_and_functional_calls_have_downs_of_their_own() -> None:
    layer, x = frozen_branches()
    before = layer(x).detach()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.branch("a").down.zero_()
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(twin(x), plain_output(twin, x))
    other = {name: 2 * value.detach() for name, value in layer.named_parameters()}
    called = torch.func.functional_call(layer, other, (x,))
    torch.testing.assert_close(called - other["base.bias"], F.linear(
        x, 2 * layer.frozen + 4 * layer.delta(),
    ))  # fmt: skip
    torch.testing.assert_close(layer(x), before)
    assert [layer.branch(name).down.shape for name in "ab"] == [(2, 6)] * 2


def test_a_merge_inside_autocast_is_seen_by_the_next_product() -> None:
    base, x = linear(), random(3, D)

    def outputs() -> list[Tensor]:
        seen = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(base(x).detach())  # the cast of the weight is kept for the next product
            layer = LoRALinear(base)
            layer.add_branch("general", random(R, D, seed=2), up=random(O, R, seed=3))
            for change in (layer.merge, layer.unmerge):
                change()
                base.requires_grad_()
                seen.append(base(x).detach())
        return seen

    before, merged, after = outputs()
    assert not torch.equal(before, merged)
    assert torch.equal(before, after)
