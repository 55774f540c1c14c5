"""Several processes of one step, one pass, one model: threads stand in for them here.

Below them are real ones.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_models import MLP, mlp
from torch import Tensor, nn

from backends.torch import (
    LoDA,
    LoDASettings,
    Reduce,
    collect_moments,
    draw_permutation,
    gradient_aligned_step,
    plain_step,
)
from backends.torch.moments import collect_halves


def together(count: int, work: Callable[[int, Reduce], Any]) -> list[Any]:
    """What each of several ranks gives that sum their tensors with each other."""
    meeting = threading.Barrier(count, timeout=300)
    lists: list[Sequence[Tensor]] = [()] * count

    def run(rank: int) -> Any:
        def reduce(tensors: Sequence[Tensor]) -> None:
            lists[rank] = [tensor.clone() for tensor in tensors]
            meeting.wait()
            with torch.no_grad():
                for place, tensor in enumerate(tensors):
                    tensor.copy_(sum(theirs[place] for theirs in lists))
            meeting.wait()

        try:
            return work(rank, reduce)
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def share_loss(
    model: nn.Module, x: Tensor, y: Tensor, mine: Sequence[int], zero: Tensor
) -> Callable[[Tensor], Tensor]:
    """A rank's part of the mean loss, over the rows that are its own."""

    def loss(rows: Tensor) -> Tensor:
        own = [row for row in rows.tolist() if row in mine]
        if not own:
            return 0 * zero.sum()
        return F.cross_entropy(model(x[own]), y[own]) * (len(own) / len(rows))

    return loss


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    "cuts", [[[0, 1], [2, 3, 4, 5, 6]], [[0, 2, 4, 6], [1, 3, 5]], [[], [*range(7)]]]
)
def test_a_step_is_that_of_one_process(aligned: bool, cuts: list[list[int]]) -> None:
    torch.manual_seed(3)
    x, y = torch.randn(7, 6).double(), torch.tensor([0, 1, 0, 1, 0, 3, 0])
    x[3] = 1e3  # a loss that a mean of means would weigh otherwise

    def steps(model: nn.Module, mine: Sequence[int], reduce: Reduce | None) -> list[Tensor]:
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        loss = share_loss(model, x, y, mine, parameters[-1])
        seen = []
        for order in ([0, 1, 3], [3, 0, 1]):
            if aligned:
                step = gradient_aligned_step(
                    loss, y, optimizer, parameters[:2],
                    radius=0.3, permutation=torch.tensor(order), reduce=reduce,
                )  # fmt: skip
            else:
                step = plain_step(loss, y, optimizer, reduce=reduce)
            seen.append(step.loss)
        return [*seen, *(p.detach() for p in parameters)]

    models = [mlp() for _ in range(3)]  # threads share torch's generator
    expected = steps(models[2], range(7), None)
    for shared in together(2, lambda rank, reduce: steps(models[rank], cuts[rank], reduce)):
        torch.testing.assert_close(shared, expected, rtol=1e-11, atol=1e-13)


def test_a_gradient_that_is_not_finite_anywhere_stops_the_step_everywhere() -> None:
    x, y = torch.randn(4, 6).double(), torch.tensor([0, 1, 0, 1])
    x[3] = torch.nan
    models = [mlp() for _ in range(2)]

    def step(rank: int, reduce: Reduce) -> tuple[int, bool]:
        model = models[rank]
        before = copy.deepcopy(model.state_dict())
        loss = share_loss(model, x, y, [2 * rank, 2 * rank + 1], next(model.parameters()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        done = plain_step(loss, y, optimizer, skip_nonfinite=True, reduce=reduce)
        return done.steps, all(v.equal(before[k]) for k, v in model.state_dict().items())

    assert together(2, step) == [(0, True)] * 2


@pytest.mark.parametrize("cuts", [(4, 11), (0, 11), (12, 20)])
def test_moments_and_halves_are_those_of_one_process(cuts: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(11, 5, 6).double()
    parts = [x[: cuts[0]], x[cuts[0] :]]
    target = MLP["target"]

    def collect(rank: int, reduce: Reduce) -> Any:
        mine = [part for part in parts[rank].split(3) if len(part)]
        plain = collect_moments(models[rank], mine, target, reduce=reduce)
        return plain, *collect_halves(models[rank], mine, target, reduce=reduce)

    models = [mlp() for _ in range(3)]
    whole, halves = collect_halves(models[2], x.split(4), target)
    for plain, moments, shared in together(2, collect):
        assert list(plain) == list(moments) == list(whole) == list(shared)
        for name, expected in whole.items():
            for one in (plain[name], moments[name]):
                assert one.count == expected.count == 55
                torch.testing.assert_close(one.total, expected.total, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(shared[name], halves[name], rtol=1e-11, atol=1e-11)


def test_without_a_batch_anywhere_every_process_says_so() -> None:
    def collect(rank: int, reduce: Reduce) -> str:
        with pytest.raises(ValueError, match="no tokens") as caught:
            collect_moments(models[rank], [], MLP["target"], reduce=reduce)
        return str(caught.value)

    models = [mlp() for _ in range(2)]
    first, second = together(2, collect)
    assert first == second


def test_tasks_are_those_of_one_process() -> None:
    def images(task: int) -> tuple[Tensor, Tensor]:
        own = torch.Generator().manual_seed(10 + task)  # threads share torch's
        scale = torch.rand(6, generator=own).double() ** 3 * 3
        return torch.randn(20, 6, generator=own).double() * scale, torch.arange(20) % 4

    def learn(model: nn.Module, mine: range, reduce: Reduce | None) -> dict[str, Tensor]:
        loda = LoDA(model, LoDASettings(**MLP, heldout=True), reduce=reduce)  # type: ignore[arg-type]
        for task in range(2):
            x, y = images(task)
            loda.begin_task(list(x[mine.start : mine.stop].split(3)))
            optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.05, momentum=0.9)
            generator = torch.Generator().manual_seed(task)
            loss = share_loss(model, x, y, mine, loda.trainable_parameters()[0])
            for _ in range(3):
                gradient_aligned_step(
                    loss, y, optimizer, loda.lora_parameters(), radius=0.3,
                    permutation=draw_permutation(y, generator), reduce=reduce,
                )  # fmt: skip
            loda.end_task(list(x[mine.start : mine.stop].split(3)))
        return {**model.state_dict(), **loda.state_dict()}

    models = [mlp() for _ in range(3)]
    expected = learn(models[2], range(20), None)
    parts = [range(6), range(6, 20)]
    for shared in together(2, lambda rank, reduce: learn(models[rank], parts[rank], reduce)):
        for name, tensor in expected.items():
            torch.testing.assert_close(shared[name], tensor, rtol=1e-8, atol=1e-10)


# Real processes: half a minute, most of it the start of two interpreters


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    results = ranks.together(tmp_path_factory.mktemp("ranks"))
    for result in results:
        assert "error" not in result, result["error"]
    return results


@pytest.mark.slow
@pytest.mark.gate
@pytest.mark.parametrize("take", ranks.TAKES)
@pytest.mark.parametrize("wrap", ranks.WRAPS)
def test_processes_train_the_model_of_one_process(
    wrap: str, take: str, processes: list[dict[str, Any]]
) -> None:
    """With and without DistributedDataParallel, in one call and in phases."""
    expected = ranks.learn("bare", take, range(ranks.ROWS), rank=0)
    for result in processes:
        shared = result[f"{wrap}, {take}"]
        assert shared.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(shared[name], tensor, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.slow
@pytest.mark.gate
def test_a_process_that_would_share_nothing_says_what_to_do(
    processes: list[dict[str, Any]],
) -> None:
    for result in processes:
        said = result["messages"]
        assert "reduce" in said["aligned"]
        assert "reduce" in said["plain"]
        assert "share()" in said["forgotten"]
        assert "depends on no branch" in said["cached"]
        assert said["alone"] == "nothing"
        assert "differ" in said["wrapped too early"]
        assert said["wrapped in time"] == "nothing"


@pytest.mark.slow
@pytest.mark.gate
def test_moments_are_summed_over_processes_unless_they_are_not_to_be(
    processes: list[dict[str, Any]],
) -> None:
    first, second = (result["moments"] for result in processes)
    whole = collect_moments(mlp(), [ranks.images(0)], "0")["0"].mean
    torch.testing.assert_close(first["shared"], whole)
    assert torch.equal(first["shared"], second["shared"])
    assert not torch.allclose(first["own"], second["own"])


@pytest.mark.slow
@pytest.mark.gate
def test_tensors_of_any_type_are_copied_from_the_first_process(
    processes: list[dict[str, Any]],
) -> None:
    first, second = (result["copies"] for result in processes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [x.stride() for x in first] == [x.stride() for x in second]
