"""What a finished task leaves for inspection: moments, branches and coefficients by layer."""

from collections.abc import Mapping
from typing import NamedTuple, Self

from torch import Tensor

from backends.torch.lora import LoRALinear


class TaskRecord(NamedTuple):
    """Tensors of one task, each a dict by layer name.

    Attributes
    ----------
    new : dict of str to Tensor, shape (D, D)
        Moment before training, from which the subspaces were chosen.
    trained, merged : dict of str to Tensor, shape (D, D)
        Moments through the trained and through the merged model; empty where no setting asked
        for the pass.
    downs, ups : dict of str to dict of str to Tensor
        A (r, D) and B (rows, r) by layer and branch, as trained.
    coefficients : dict of str to Tensor, shape (r, r)
        Λ of the general branch; empty where nothing was recalibrated.
    weights : dict of str to float
        Weight of each branch.
    """

    new: dict[str, Tensor]
    trained: dict[str, Tensor]
    merged: dict[str, Tensor]
    downs: dict[str, dict[str, Tensor]]
    ups: dict[str, dict[str, Tensor]]
    coefficients: dict[str, Tensor]
    weights: dict[str, float]

    @classmethod
    def of(
        cls,
        layers: Mapping[str, LoRALinear],
        new: dict[str, Tensor],
        trained: dict[str, Tensor],
        merged: dict[str, Tensor],
        coefficients: dict[str, Tensor],
    ) -> Self:
        """Copy the branches of the adapted layers and put them beside the moments."""
        named = {
            name: [(b, layer.branch(b)) for b in layer.branches] for name, layer in layers.items()
        }
        return cls(
            new=dict(new),
            trained=trained,
            merged=merged,
            downs={n: {b: x.down.detach().clone() for b, x in bs} for n, bs in named.items()},
            ups={n: {b: x.up.detach().clone() for b, x in bs} for n, bs in named.items()},
            coefficients=coefficients,
            weights={b: x.scale for bs in named.values() for b, x in bs},
        )

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
