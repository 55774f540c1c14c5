"""Everything that changes during a run, in one object that can be saved and loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.torch import plain_state
from backends.torch.readouts import CosineHeads, Readouts
from training.methods import Method
from training.metrics import AccuracyMatrix, Meter
from training.run_dir import flattened, nested, not_finite
from training.updates import Before


@dataclass
class State:
    """Everything that changes while a run trains: the content of a checkpoint.

    All randomness of a task follows from the seed and the task's number, so between tasks no
    generator is part of it.

    Parameters
    ----------
    model : nn.Module
        The backbone, with what was learned merged.
    method : Method
        Carries its own state (moments, branches).
    heads : CosineHeads
        One cosine head per task.
    readouts : Readouts
        The read-outs: their statistics, and the classifiers fitted after the last task.
    tasks : int
        Tasks completed.
    accuracy : dict of str to AccuracyMatrix
        Accuracy so far by read-out.
    task_given : dict of str to AccuracyMatrix
        The same where the task of every image is given, so that only its classes compete.
    trainable : list of int
        Number of trained values of each task that has begun.
    seconds : dict of str to float
        Time by part, summed over the completed tasks.
    extensions : int
        Extensions of the stream whose images of known classes are in the statistics.
    calibration : dict of str to dict
        After the last task, by read-out: see `training.calibration.calibrate`.
    passes : int
        Passes that the method has made over the images of the open task.
    open : OpenTask or None
        Position of the training in a task that has begun but is not completed.
    """

    model: nn.Module
    method: Method
    heads: CosineHeads
    readouts: Readouts
    tasks: int = 0
    accuracy: dict[str, AccuracyMatrix] = field(default_factory=dict)
    task_given: dict[str, AccuracyMatrix] = field(default_factory=dict)
    trainable: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    extensions: int = 0
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    passes: int = 0
    open: OpenTask | None = None

    def __post_init__(self) -> None:
        for matrices in (self.accuracy, self.task_given):
            matrices.update({name: AccuracyMatrix() for name in self.readouts.readouts})

    def trained(self) -> list[nn.Parameter]:
        """What the optimiser trains in the open task: the method's tensors and the head."""
        return [*self.method.parameters(), *self.heads.current.parameters()]

    def complete(self, seconds: Mapping[str, float]) -> None:
        """Mark the open task as completed and add the seconds of its parts."""
        for part, value in seconds.items():
            self.seconds[part] = round(self.seconds.get(part, 0.0) + value, 3)
        self.tasks, self.passes, self.open = self.tasks + 1, 0, None

    def stored_bytes(self) -> dict[str, int]:
        """Bytes that are carried from task to task besides the weights of model and heads."""
        # Folded methods hold the weights without their branches too: those are the model's own.
        # Settings are no data that a method carries along.
        state = self.method.state_dict()
        own = {k: v for k, v in state.items() if k != "settings" and not k.startswith("weight/")}
        method = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
        return {"method": method, **self.readouts.stored_bytes()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under flat names; those of an open task are valid if the method saves it."""
        return flattened(
            model=plain_state(self.model),
            method=self.method.state_dict(),
            heads=self.heads.state_dict(),
            readouts=self.readouts.state_dict(),
            open={} if self.open is None else self.open.tensors(),
            before=self.open.before.tensors(self.model) if self.open and self.open.before else {},
        )

    def record(self) -> dict[str, Any]:
        """Everything that is not a tensor, ready for JSON."""
        return {
            "tasks": self.tasks,
            "extensions": self.extensions,
            "heads": list(self.heads.sizes),
            "accuracy": {name: matrix.to_dict() for name, matrix in self.accuracy.items()},
            "task_given": {name: matrix.to_dict() for name, matrix in self.task_given.items()},
            "trainable": self.trainable,
            "seconds": self.seconds,
            "calibration": self.calibration,
            "passes": self.passes,
            "open": None if self.open is None else self.open.record(),
        }

    def load(
        self,
        tensors: Mapping[str, Tensor],
        record: Mapping[str, Any],
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    ) -> None:
        """Load what `tensors` and `record` gave into a fresh object of the same experiment.

        If a task was open, ``make_optimizer`` makes a fresh optimiser over its trained tensors.

        Raises
        ------
        ValueError, LookupError, TypeError, RuntimeError
            If the state does not belong to this experiment.
        """
        _require_numbers(tensors)
        self.tasks, self.passes = int(record["tasks"]), int(record["passes"])
        self.extensions = int(record["extensions"])
        self.calibration = dict(record.get("calibration", {}))  # older states have none
        self.trainable, self.seconds = list(record["trainable"]), dict(record["seconds"])
        self.accuracy, self.task_given = (
            {name: AccuracyMatrix.from_dict(m) for name, m in record[group].items()}
            for group in ("accuracy", "task_given")
        )
        self.model.load_state_dict(nested(tensors, "model"))
        self.method.load_state_dict(nested(tensors, "method"))
        for size in record["heads"]:
            self.heads.add(int(size), generator=torch.Generator())  # overwritten below
        self.heads.load_state_dict(nested(tensors, "heads"))
        self.heads.to(next(self.model.parameters()).device)
        self.readouts.load_state_dict(nested(tensors, "readouts"))
        if record["open"] is not None:
            self.open = OpenTask(make_optimizer(self.trained()), torch.Generator())
            self.open.load(nested(tensors, "open"), record["open"])
            if (names := record["open"]["adapted"]) is not None:
                self.open.before = Before.loaded(nested(tensors, "before"), names, self.model)


@dataclass
class OpenTask:
    """Position of the training in a task that has begun.

    Parameters
    ----------
    optimizer : Optimizer
        Of this task.
    generator : torch.Generator
        Generator of the steps. Drop-out uses torch's global generators, whose states are saved as
        well.
    epoch, batch : int
        Completed epochs, and completed mini-batches of the next one.
    meter : Meter
        Loss and accuracy of the epoch so far.
    seconds : dict of str to float
        Time by part of the task, over all interrupted attempts: ``load`` while training waited for
        images, ``train`` the rest of training.
    resumed : dict of str to Tensor
        Saved states of torch's global generators, until the resumed training sets them.
    before : Before or None
        The model before the task; None if the method trains nothing of it.
    loss : float or None
        Mean training loss of the last completed epoch.
    """

    optimizer: Optimizer
    generator: torch.Generator
    epoch: int = 0
    batch: int = 0
    meter: Meter = field(default_factory=Meter)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("begin", "load", "train"), 0.0)
    )
    resumed: dict[str, Tensor] = field(default_factory=dict)
    before: Before | None = None
    loss: float | None = None

    def spent(self, part: str, since: float) -> float:
        """Add the time since ``since`` (time.perf_counter) to a part; returns the current time."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - since
        return now

    def rounded_seconds(self) -> dict[str, float]:
        """Seconds of the parts, as they are written."""
        return {part: round(value, 3) for part, value in self.seconds.items()}

    def has_finite_weights(self) -> bool:
        """Whether all trained tensors are finite; waits for the device."""
        groups = self.optimizer.param_groups
        return all(bool(p.isfinite().all()) for group in groups for p in group["params"])

    def is_finite(self) -> bool:
        """Whether trained tensors, loss so far and optimiser are finite; waits for the device."""
        return not not_finite(self.tensors()) and self.has_finite_weights()

    def restore_generators(self) -> None:
        """Restore torch's global generators if the task was resumed."""
        for name, drawn in self.resumed.items():
            if name == "torch":
                torch.set_rng_state(drawn)
            elif int(name) < torch.cuda.device_count():  # it may be resumed with fewer GPUs
                torch.cuda.set_rng_state(drawn, int(name))
        self.resumed = {}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors except the trained ones, under flat names."""
        tensors = {
            "generator": self.generator.get_state(),
            "generators/torch": torch.get_rng_state(),
            "meter/loss": torch.as_tensor(self.meter.loss),
            "meter/right": torch.as_tensor(self.meter.right),
        }
        if torch.cuda.is_available():
            for number, drawn in enumerate(torch.cuda.get_rng_state_all()):
                tensors[f"generators/{number}"] = drawn
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{name}"] = value
        return tensors

    def record(self) -> dict[str, Any]:
        """Everything that is not a tensor, ready for JSON."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "images": self.meter.images,
            "predicted": self.meter.predicted,
            "seconds": self.rounded_seconds(),
            "loss": self.loss,
            "adapted": None if self.before is None else list(self.before.weights),
        }

    def load(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Load a position; the optimiser must be a fresh one over the same tensors.

        Raises
        ------
        ValueError
            If the state of the optimiser belongs to other tensors.
        """
        self.epoch, self.batch = int(record["epoch"]), int(record["batch"])
        self.loss = record.get("loss")  # older checkpoints have none
        self.seconds = {part: float(value) for part, value in record["seconds"].items()}
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.meter = Meter()
        self.meter.loss = tensors["meter/loss"].to(trained[0].device)
        self.meter.right = tensors["meter/right"].to(trained[0].device)
        self.meter.images, self.meter.predicted = int(record["images"]), int(record["predicted"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in nested(tensors, "optimizer").items():
            index, _, name = key.partition("/")
            # torch would load a state of any shape and fail in the next step.
            if tensor.shape not in (trained[int(index)].shape, ()):
                msg = f"{name} of shape {tuple(tensor.shape)} does not fit trained tensor {index}"
                raise ValueError(msg)
            moments.setdefault(int(index), {})[name] = tensor
        # Groups hold settings and the learning rate, which is set anew for every epoch.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self.resumed = nested(tensors, "generators")


# Dtypes allowed in a state; others, from a foreign file, would fail late and obscurely.
_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
}


def _require_numbers(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            msg = f"{name} has the unsupported dtype {tensor.dtype}"
            raise ValueError(msg)
    # Held-out ratios are only logged and may be infinite.
    broken = not_finite({k: t for k, t in tensors.items() if "/heldout/" not in k})
    if broken:
        msg = f"{broken[0]} holds values that are not finite"
        raise ValueError(msg)
