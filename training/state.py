"""The whole state of a run, as one object that can be written and read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backends.torch import plain_state
from backends.torch.readouts import CosineHeads, Readouts
from training.files import flattened, nested
from training.methods import Method
from training.metrics import AccuracyMatrix


@dataclass
class RunState:
    """Everything that a run carries from one task to the next.

    All randomness of a task follows from the seed and the task's number, so no generator is part
    of it. Inside a task it is complete for methods that save an open task; where training stands
    in it is a `training.survival.position.Position`.

    Parameters
    ----------
    model : nn.Module
        The backbone, with what was learned merged.
    method : Method
        Carries its own state (moments, branches).
    heads : CosineHeads
        One cosine head a task.
    readouts : Readouts
        What they gathered, and the classifiers after the last task.
    tasks : int
        Tasks completed.
    matrices : dict of str to AccuracyMatrix
        Accuracy so far by read-out.
    task_given : dict of str to AccuracyMatrix
        The same where the task of every image is given, so that only its classes compete.
    """

    model: nn.Module
    method: Method
    heads: CosineHeads
    readouts: Readouts
    tasks: int = 0
    matrices: dict[str, AccuracyMatrix] = field(default_factory=dict)
    task_given: dict[str, AccuracyMatrix] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state under flat names."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": plain_state(self.model),
            "method": self.method.state_dict(),
            "heads": self.heads.state_dict(),
            "readouts": self.readouts.state_dict(),
        }
        return flattened(**groups)

    def record(self) -> dict[str, Any]:
        """The rest of the state, ready for JSON."""
        return {
            "tasks": self.tasks,
            "head_sizes": list(self.heads.sizes),
            "matrices": {kind: matrix.to_dict() for kind, matrix in self.matrices.items()},
            "task_given": {kind: matrix.to_dict() for kind, matrix in self.task_given.items()},
        }

    def load(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Take over a state; this object must be a fresh one of the same experiment."""
        self.tasks = int(record["tasks"])
        self.matrices, self.task_given = (
            {kind: AccuracyMatrix.from_dict(m) for kind, m in record[group].items()}
            for group in ("matrices", "task_given")
        )
        self.model.load_state_dict(nested(tensors, "model"))
        self.method.load_state_dict(nested(tensors, "method"))
        heads = nested(tensors, "heads")
        _check(record, [len(weight) for weight in heads.values()])
        for size in record["head_sizes"]:
            self.heads.add(int(size), generator=torch.Generator())  # overwritten below
        self.heads.load_state_dict(heads)
        self.heads.to(next(self.model.parameters()).device)
        self.readouts.load_state_dict(nested(tensors, "readouts"))


def stored_bytes(state: RunState) -> dict[str, int]:
    """Bytes that a run carries from task to task beside the weights of the model and the heads."""
    # Folded methods hold the weights without their branches too: those are the model's own.
    own = {k: v for k, v in state.method.state_dict().items() if not k.startswith("weight/")}
    method = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    return {"method": method, **state.readouts.stored_bytes()}


def _check(record: Mapping[str, Any], weights: list[int]) -> None:
    """Refuse a record whose parts are of different tasks, before anything is made of it."""
    sizes, tasks = list(record["head_sizes"]), int(record["tasks"])
    matrices = [m for group in ("matrices", "task_given") for m in record[group].values()]
    if weights != sizes or not 0 <= len(sizes) - tasks <= 1:
        msg = f"{tasks} tasks are done, with heads of {sizes} classes and weights of {weights}"
        raise ValueError(msg)
    if any(list(matrix["sizes"]) != sizes[:tasks] for matrix in matrices):
        msg = f"accuracies are not those of {tasks} tasks with {sizes[:tasks]} classes"
        raise ValueError(msg)
