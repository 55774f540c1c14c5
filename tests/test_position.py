"""Where training stands inside a task, taken up on another machine."""

import pytest
import torch
from torch import nn

from training.survival.position import Position


def stepped(rate: float = 0.1) -> Position:
    """A position after one step on two tensors."""
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 2))]
    at = Position(torch.optim.SGD(weights, lr=rate, momentum=0.9), torch.Generator())
    sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    at.optimizer.step()
    at.batch = 1
    return at


@pytest.mark.parametrize(
    ("tensors", "record", "said"),
    [
        ({}, {"epoch": 2}, "epoch 2, batch 1 is not inside 2 of 4"),
        ({}, {"epoch": -1}, "epoch -1"),
        ({}, {"batch": 5}, "batch 5"),
        ({"optimizer/1/momentum_buffer": torch.zeros(1, 4)}, {}, r"shape \(1, 4\) .* tensor 1"),
        ({"optimizer/2/momentum_buffer": torch.zeros(2)}, {}, "trained tensor 2"),
        ({"optimizer/0/momentum_buffer": torch.ones(2, dtype=torch.int64)}, {}, "tensor 0"),
        ({"meter/loss": torch.zeros(3)}, {}, "no numbers"),
    ],
)
def test_a_position_of_another_training_is_refused(
    tensors: dict[str, torch.Tensor], record: dict[str, int], said: str
) -> None:
    at = stepped()
    stepped().load(at.tensors(), at.record(), epochs=2, batches=4)
    with pytest.raises(ValueError, match=said):
        stepped().load({**at.tensors(), **tensors}, {**at.record(), **record}, epochs=2, batches=4)


def test_a_run_goes_on_where_there_are_fewer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> Position:
        weight = nn.Parameter(torch.zeros(2))
        return Position(torch.optim.SGD([weight], lr=0.1), torch.Generator().manual_seed(1))

    was = fresh()
    state = torch.zeros(16, dtype=torch.uint8)
    tensors = {**was.tensors(), "cuda/0": state, "cuda/1": state + 1}
    for there in range(3):
        with monkeypatch.context() as patch:
            taken: dict[int, int] = {}
            patch.setattr(torch.cuda, "device_count", lambda there=there: there)
            patch.setattr(
                torch.cuda, "set_rng_state", lambda x, n, taken=taken: taken.update({n: int(x[0])})
            )
            fresh().load(tensors, was.record(), epochs=1, batches=0)
        assert taken == {n: n for n in range(there)}
