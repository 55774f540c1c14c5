"""What a finished task leaves for inspection: moments, branches and coefficients by layer."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from backends.torch.lora import LoRALinear, MergeRounding
from backends.torch.solve import HeldoutRatios
from loda_math import UpdateEffect


class TaskRecord(NamedTuple):
    """Tensors of one task, each a dict by layer name.

    Attributes
    ----------
    new : dict of str to Tensor, shape (D, D)
        Moment before training, from which the subspaces were chosen. All moments are empty without
        ``LoDA(record_moments=True)``.
    trained, merged : dict of str to Tensor, shape (D, D)
        Moments through the trained and through the merged model; empty if no setting asked
        for the pass.
    downs, ups : dict of str to dict of str to Tensor
        A (r, D) and B (rows, r) by layer and branch, as trained.
    coefficients : dict of str to Tensor, shape (r, r)
        Λ of the general branch, or (R, R) of all branches jointly; empty where nothing was
        recalibrated.
    weights : dict of str to dict of str to float
        Weight of a branch by layer and branch.
    heldout : dict of str to dict of str to HeldoutRatio
        By layer and branch, energy ratio of the directions on images that they were not chosen
        on; empty if it was not measured.
    effects : dict of str to UpdateEffect
        What the merge does to the outputs of a layer, known before it: mean squares over the
        tokens of the new task (through the trained model, or the previous one where no setting
        asked for that pass) and of past tasks (their mean). Empty on the first task.
    rounding : dict of str to MergeRounding
        How much of the update a weight in half precision took up; only of such layers.
    """

    new: dict[str, Tensor]
    trained: dict[str, Tensor]
    merged: dict[str, Tensor]
    downs: dict[str, dict[str, Tensor]]
    ups: dict[str, dict[str, Tensor]]
    coefficients: dict[str, Tensor]
    weights: dict[str, dict[str, float]]
    heldout: HeldoutRatios
    effects: dict[str, UpdateEffect]
    rounding: dict[str, MergeRounding]

    @classmethod
    def of(cls, layers: Mapping[str, LoRALinear], **computed: Mapping[str, Any]) -> Self:
        """Make a record: copies of the branches, and the other attributes as given.

        Parameters
        ----------
        layers : mapping of str to LoRALinear
            The adapted layers, with their branches as trained.
        **computed
            The other attributes by name; those that are not given are empty.
        """
        # Copies: the branches are dropped when the task is closed.
        named = {
            name: [(b, layer.branch(b)) for b in layer.branches] for name, layer in layers.items()
        }
        copied: dict[str, Any] = {
            "downs": {n: {b: x.down.detach().clone() for b, x in bs} for n, bs in named.items()},
            "ups": {n: {b: x.up.detach().clone() for b, x in bs} for n, bs in named.items()},
            "weights": {n: {b: float(x.scale) for b, x in bs} for n, bs in named.items()},
        }
        return cls(**{field: {} for field in cls._fields} | copied | computed)

    def branch_tensors(self) -> dict[str, Tensor]:
        """Branches and coefficients under flat names, ready for a safetensors file."""
        flat = {f"coefficients/{n}": c for n, c in self.coefficients.items()}
        for kind, group in (("down", self.downs), ("up", self.ups)):
            for name, branches in group.items():
                flat.update({f"{kind}/{b}/{name}": tensor for b, tensor in branches.items()})
        return flat

    def moment_tensors(self) -> dict[str, Tensor]:
        """Moments under flat names, ready for a safetensors file."""
        passes = {"new": self.new, "trained": self.trained, "merged": self.merged}
        return {f"{p}/{n}": m for p, moments in passes.items() for n, m in moments.items()}

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Effects, rounding and held-out ratios by layer as plain numbers, ready for JSON.

        A ratio that is infinite, as on a direction without energy on old tasks, is ``None``.
        """
        entries: dict[tuple[str, ...], Tensor] = {}
        measured: tuple[tuple[str, Mapping[str, UpdateEffect | MergeRounding]], ...] = (
            ("effect", self.effects),
            ("rounding", self.rounding),
        )
        for kind, by_layer in measured:
            for name, values_of in by_layer.items():
                entries |= {(name, kind, field): x for field, x in values_of._asdict().items()}
        for name, ratios in self.heldout.items():
            for branch, ratio in ratios.items():
                place = (name, "heldout", branch)
                entries |= {(*place, field): x for field, x in ratio._asdict().items()}
        layers: dict[str, dict[str, Any]] = {}
        # One read for all layers.
        home = next((x.device for x in entries.values()), None)
        numbers = [x.to(home) for x in entries.values()]  # layers may be on several devices
        values = torch.stack(numbers).tolist() if numbers else []
        for path, value in zip(entries, values, strict=True):
            inner: dict[str, Any] = layers
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = value if math.isfinite(value) else None
        return layers
