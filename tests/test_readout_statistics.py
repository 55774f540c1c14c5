"""Statistics that are gathered task by task: the definition, and what is refused."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from made_up_features import SIZES, by_task, gathered, made_up, seeded

from backends.torch.readouts import ClassStatistics, RidgeStatistics, align_heads


@given(
    cuts=st.lists(st.integers(1, 59), max_size=5, unique=True),
    offset=st.sampled_from([0.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_streaming_statistics_equal_the_definition(
    cuts: list[int], offset: float, dtype: torch.dtype
) -> None:
    x = torch.randn(60, 5, generator=seeded(), dtype=torch.float64).to(dtype) + offset
    y = torch.randint(0, 3, (60,), generator=seeded(1))
    statistics = ClassStatistics(dtype=torch.float64)
    for part in torch.arange(60).tensor_split(sorted(cuts)):
        statistics.collect(x[part], y[part])
    statistics.end_task(3)
    for label in range(3):
        rows = x[y == label].double()
        assert int(statistics.count[label]) == len(rows)
        torch.testing.assert_close(statistics.mean[label], rows.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            statistics.covariance[label], torch.cov(rows.T), rtol=1e-9, atol=1e-9
        )


def test_finished_classes_are_never_refreshed() -> None:
    x, y = made_up()
    statistics = gathered(x, y)
    first = ClassStatistics()
    first.add_task(*by_task(x, y)[0])
    assert torch.equal(statistics.mean[:2], first.mean)
    assert torch.equal(statistics.covariance[:2], first.covariance)
    with pytest.raises(ValueError, match="never refreshed"):
        statistics.collect(x[:1], torch.tensor([0]))


def test_statistics_round_trip() -> None:
    statistics = gathered(*made_up())
    again = ClassStatistics()
    again.load_state_dict(statistics.state_dict())
    assert again.task_sizes == SIZES
    assert torch.equal(
        align_heads(again, generator=seeded()), align_heads(statistics, generator=seeded())
    )
    with pytest.raises(ValueError, match="must hold"):
        again.load_state_dict({})


@pytest.mark.parametrize("kind", ["class", "ridge"])
def test_bad_features_are_refused(kind: str) -> None:
    statistics = ClassStatistics() if kind == "class" else RidgeStatistics(3, features=8)
    good, labels = torch.ones(4, 3), torch.tensor([0, 0, 1, 1])
    for bad in (float("nan"), float("inf")):
        broken = good.clone()
        broken[2, 1] = bad
        with pytest.raises(ValueError, match="1 of 4 feature rows"):
            statistics.collect(broken, labels)
    with pytest.raises(ValueError, match="begin at 0"):
        statistics.collect(good, labels - 1)
    with pytest.raises(ValueError, match=r"give floating \(N, D\)"):
        statistics.collect(good[None], labels)
    with pytest.raises(ValueError, match="integers"):
        statistics.collect(good, labels.float())
    with pytest.raises(ValueError, match="no classes"):
        statistics.end_task()
    statistics.collect(good, labels)
    with pytest.raises(ValueError, match="end_task before"):
        statistics.state_dict()
    with pytest.raises(ValueError, match="4 wide"):
        statistics.collect(torch.ones(1, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"Classes \[2\] have no features"):
        statistics.end_task(3)
    with pytest.raises(ValueError, match=r"Labels \[1\] lie beyond"):
        statistics.end_task(1)
    statistics.end_task(2)
    assert statistics.task_sizes == (2,)
