"""Where training stands inside a task, as an object that can be written and read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.files import nested, not_finite
from training.monitoring.progress import Meter


@dataclass
class Position:
    """The optimiser, the generators, the epoch and the number of its batches that are done.

    Parameters
    ----------
    optimizer : Optimizer
        Of the task.
    generator : torch.Generator
        What the steps draw from. Drop-out draws from torch's own, which are part of the state too.
    epoch, batch : int
        Epochs done, and batches of the next one.
    meter : Meter
        Loss and accuracy of the epoch so far.
    """

    optimizer: Optimizer
    generator: torch.Generator
    epoch: int = 0
    batch: int = 0
    meter: Meter = field(default_factory=Meter)

    def next_epoch(self) -> None:
        """The epoch is over."""
        self.epoch, self.batch, self.meter = self.epoch + 1, 0, Meter()

    def finite_weights(self) -> bool:
        """Whether all trained tensors are finite; waits for the device."""
        groups = self.optimizer.param_groups
        return all(bool(p.isfinite().all()) for group in groups for p in group["params"])

    def sound(self) -> bool:
        """Whether trained tensors, loss so far and optimiser are finite; waits for the device."""
        return not not_finite(self.tensors()) and self.finite_weights()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under flat names."""
        found = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        for number, state in enumerate(_cuda_states()):
            found[f"cuda/{number}"] = state
        found["meter/loss"] = torch.as_tensor(self.meter.loss)
        found["meter/right"] = torch.as_tensor(self.meter.right)
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    found[f"optimizer/{index}/{name}"] = value
        return found

    def record(self) -> dict[str, Any]:
        """The rest, ready for JSON."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "images": self.meter.images,
            "predicted": self.meter.predicted,
        }

    def load(
        self,
        tensors: Mapping[str, Tensor],
        record: Mapping[str, Any],
        *,
        epochs: int,
        batches: int,
    ) -> None:
        """Take over a position; the optimiser must be a fresh one over the same tensors.

        Raises
        ------
        ValueError
            If it lies outside so many epochs of so many batches, or is of other tensors.
        """
        self.epoch, self.batch = int(record["epoch"]), int(record["batch"])
        if not (0 <= self.epoch < epochs and 0 <= self.batch <= batches):
            msg = f"epoch {self.epoch}, batch {self.batch} is not inside {epochs} of {batches}"
            raise ValueError(msg)
        if tensors["meter/loss"].ndim or tensors["meter/right"].ndim:
            msg = "the loss and accuracy so far are no numbers"
            raise ValueError(msg)
        device = self.optimizer.param_groups[0]["params"][0].device
        self.meter = Meter()
        self.meter.loss = tensors["meter/loss"].to(device)
        self.meter.right = tensors["meter/right"].to(device)
        self.meter.images, self.meter.predicted = int(record["images"]), int(record["predicted"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in nested(tensors, "optimizer").items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = tensor
        self._check_optimizer(state)
        # Groups hold settings and the learning rate, which is set anew for every epoch.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["torch"])
        for number, drawn in nested(tensors, "cuda").items():
            if int(number) < torch.cuda.device_count():  # it may go on with fewer
                torch.cuda.set_rng_state(drawn, int(number))

    def _check_optimizer(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Torch itself takes over a state of any shape, and fails in the next step."""
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, values in state.items():
            for name, value in values.items():
                fits = 0 <= index < len(own) and value.shape in (own[index].shape, ())
                if not (fits and value.is_floating_point()):
                    shape = tuple(value.shape)
                    msg = f"{name} of shape {shape} is not of trained tensor {index}"
                    raise ValueError(msg)


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
