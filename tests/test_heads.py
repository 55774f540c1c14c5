"""Cosine heads: values, starts, what is trainable, saving."""

import pytest
import torch

from training.step.heads import CosineHead, Heads, class_mean_start


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines(dtype: torch.dtype) -> None:
    head = CosineHead(3, 5, generator=seeded()).to(dtype)
    x = torch.randn(7, 5, generator=seeded(1), dtype=dtype)
    expected = torch.nn.functional.cosine_similarity(x[:, None], head.weight[None], dim=-1)
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head(1e4 * x), expected)


def test_cosines_stay_in_range_and_gradients_finite() -> None:
    x = torch.randn(200, 64, generator=seeded())
    head = CosineHead(200, 64, start=3 * x)
    assert head(x).abs().max() <= 1
    features = torch.zeros(2, 64, requires_grad=True)
    head(features).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision() -> None:
    head, x = CosineHead(3, 8, generator=seeded()), torch.randn(4, 8, generator=seeded(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = head(x)
    torch.testing.assert_close(low, head(x), rtol=0, atol=0)


def test_random_start_is_seeded_and_truncated() -> None:
    weight = CosineHead(100, 100, generator=seeded()).weight
    assert torch.equal(weight, CosineHead(100, 100, generator=seeded()).weight)
    assert not torch.equal(weight, CosineHead(100, 100, generator=seeded(1)).weight)
    assert weight.abs().max() <= 0.04
    # A normal cut at two deviations keeps 0.88 of its deviation.
    assert weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)


def test_class_mean_start_gives_the_nearest_mean() -> None:
    means = torch.randn(4, 6, generator=seeded())
    start = class_mean_start(means)
    torch.testing.assert_close(start.norm(dim=1), torch.ones(4))
    assert CosineHead(4, 6, start=start)(5 * means).argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_class_mean_start_needs_a_direction(bad: float) -> None:
    means = torch.ones(3, 4)
    means[1] = bad
    with pytest.raises(ValueError, match=r"classes \[1\]"):
        class_mean_start(means)


def test_only_the_current_head_is_trained() -> None:
    heads = Heads(6)
    first = heads.add(2, generator=seeded())
    second = heads.add(3, generator=seeded(1))
    before = first.weight.detach().clone()
    optimiser = torch.optim.SGD([p for p in heads.parameters() if p.requires_grad], lr=1.0)
    heads(torch.randn(4, 6, generator=seeded(2))).square().sum().backward()
    optimiser.step()
    assert first.weight.grad is None
    assert torch.equal(first.weight, before)
    assert second.weight.grad is not None
    assert second.weight.grad.abs().sum() > 0
    assert heads.current is second


def test_concatenation_follows_the_tasks() -> None:
    heads = Heads(6)
    parts = [heads.add(n, generator=seeded(n)) for n in (2, 1, 3)]
    x = torch.randn(4, 6, generator=seeded())
    assert torch.equal(heads(x), torch.cat([part(x) for part in parts], dim=1))
    assert torch.equal(heads.weight(), torch.cat([part.weight for part in parts]))
    assert heads.sizes == (2, 1, 3)


def test_weight_is_a_copy_and_assign_writes() -> None:
    heads = Heads(3, sizes=(1, 2))
    new = torch.arange(9.0).reshape(3, 3)
    copy = heads.weight()
    heads.assign(new)
    assert not torch.equal(copy, new)
    assert torch.equal(heads.weight(), new)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        heads.assign(new[:2])


def test_state_round_trip() -> None:
    heads = Heads(5)
    heads.add(2, generator=seeded())
    heads.add(4, generator=seeded(1))
    again = Heads(5, sizes=heads.sizes)
    again.load_state_dict(heads.state_dict())
    assert torch.equal(again.weight(), heads.weight())


def test_new_heads_follow_the_type_of_the_old() -> None:
    heads = Heads(5, sizes=(2,)).double()
    assert heads.add(1).weight.dtype == torch.float64


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least 1 class"):
        CosineHead(0, 3)
    with pytest.raises(ValueError, match=r"of shape \(2, 3\)"):
        CosineHead(2, 3, start=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"reads \(\.\.\., 3\)"):
        CosineHead(2, 3)(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="no head yet"):
        Heads(3)(torch.zeros(1, 3))
