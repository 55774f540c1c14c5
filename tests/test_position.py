"""Where training stands inside a task, taken up on another machine."""

import pytest
import torch
from torch import nn

from training.position import Position


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
            fresh().load(tensors, was.record())
        assert taken == {n: n for n in range(there)}
