"""Merging: what goes into the weight, what comes out again to the bit, and what is refused."""

import copy

import pytest
import torch
from lora_oracle import D, O, R, linear, random, two_branches

from backends.torch import LoRALinear


def test_coefficients_go_between_up_and_down() -> None:
    layer = two_branches(torch.float64)
    between = random(R, R, seed=11, dtype=torch.float64)
    general, isolated = layer.branch("general"), layer.branch("isolated")
    expected = 0.25 * general.up @ between @ general.down + 0.5 * isolated.up @ isolated.down
    torch.testing.assert_close(layer.delta({"general": between}), expected)
    weight = layer.base.weight + expected
    layer.merge({"general": between})
    torch.testing.assert_close(layer.base.weight, weight, check_stride=False)


def test_coefficients_of_all_branches_mix_them() -> None:
    layer = two_branches(torch.float64)
    between = random(R + 3, R + 3, seed=11, dtype=torch.float64)
    general, isolated = layer.branch("general"), layer.branch("isolated")
    up = torch.cat([0.25 * general.up, 0.5 * isolated.up], dim=1)
    expected = up @ between @ torch.cat([general.down, isolated.down])
    torch.testing.assert_close(layer.delta(between), expected)
    whole = torch.eye(R + 3, dtype=torch.float64)
    torch.testing.assert_close(layer.delta(whole), layer.delta())
    weight = layer.base.weight + expected
    layer.merge(between)
    torch.testing.assert_close(layer.base.weight, weight, check_stride=False)


def test_coefficients_that_do_not_fit_are_refused_and_nothing_is_written() -> None:
    layer = two_branches()
    before = layer.base.weight.clone()
    with pytest.raises(KeyError, match=r"no branch 'genral'.*general.*isolated"):
        layer.merge({"genral": torch.eye(R)})
    with pytest.raises(ValueError, match="must be 2×2"):
        layer.merge({"general": torch.ones(R)})
    with pytest.raises(ValueError, match=r"all branches must be 5×5, got \(2, 2\)"):
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
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.base.weight, before)


def test_merge_refuses_an_update_that_overflows_the_dtype_of_the_weight() -> None:
    layer = LoRALinear(linear(dtype=torch.float16))
    layer.add_branch("big", torch.full((1, D), 300.0), up=torch.full((O, 1), 300.0))
    with pytest.raises(FloatingPointError):
        layer.merge()
    assert bool(layer.base.weight.isfinite().all())


def test_a_merged_layer_can_only_be_unmerged() -> None:
    layer = two_branches()
    layer.merge()
    weight = layer.base.weight.clone()
    for act in (
        lambda: layer.add_branch("third", random(R, D)),
        lambda: layer.drop_branch("general"),
        layer.merge,
    ):
        with pytest.raises(ValueError, match="unmerge first"):
            act()
    assert torch.equal(layer.base.weight, weight)
    assert list(layer.branches) == ["general", "isolated"]
    layer.unmerge()
    with pytest.raises(ValueError, match="not merged"):
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
