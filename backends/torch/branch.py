"""One low-rank update of a linear layer, several of them side by side, and what they add up to."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

Coefficients = Mapping[str, Tensor] | Tensor
"""Λ by branch, shape (r, r) each, or one Λ of all branches side by side, shape (R, R)."""


class LoRABranch(nn.Module):
    """One low-rank update ``scale · up @ down`` of (some rows of) a linear layer.

    Parameters
    ----------
    down : Tensor, shape (r, in_features)
        Down-projection A.
    up : Tensor, shape (len(rows) or out_features, r)
        Up-projection B.
    scale : float or Tensor, 0-d
        Weight of the branch; trained with it where it is an ``nn.Parameter``.
    rows : tuple of int, optional
        Half-open range of output rows that the branch writes to; ``None`` for all.
    train_down : bool
        Whether the down-projection is trained too; the up-projection always is.
    """

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        *,
        scale: float | Tensor = 1.0,
        rows: tuple[int, int] | None = None,
        train_down: bool = False,
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=train_down)
        self.up = nn.Parameter(up)
        self.scale = scale
        self.rows = rows

    def full_up(self, out_features: int) -> Tensor:
        """Scaled up-projection over all output rows, shape (out_features, r)."""
        up = self.scale * self.up
        if self.rows is None:
            return up
        return F.pad(up, (0, 0, self.rows[0], out_features - self.rows[1]))


def side_by_side(branches: Sequence[LoRABranch], out_features: int) -> tuple[Tensor, Tensor]:
    """Down-projections (R, in_features) above one another, scaled up-projections (out, R) beside.

    R is the sum of the ranks of the branches, of which there is at least one.
    """
    downs: list[Tensor] = [branch.down for branch in branches]
    ups = [branch.full_up(out_features) for branch in branches]
    if len(branches) == 1:
        return downs[0], ups[0]
    return torch.cat(downs), torch.cat(ups, dim=1)


def weight_update(
    branches: Mapping[str, LoRABranch], weight: Tensor, coefficients: Coefficients | None = None
) -> Tensor:
    """What branches add to a weight (out, in), in float32 or wider; Λ goes between up and down.

    Raises
    ------
    ValueError
        If Λ is not r×r, or R×R.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(coefficients, Tensor):
        down, up = (f.to(dtype) for f in side_by_side([*branches.values()], len(weight)))
        if tuple(coefficients.shape) != (len(down), len(down)):
            msg = (
                f"coefficients of all branches must be {len(down)}×{len(down)}, got "
                f"{tuple(coefficients.shape)}"
            )
            raise ValueError(msg)
        return up @ (coefficients.to(down) @ down)
    coefficients = coefficients or {}
    for name, given in coefficients.items():
        rank = branches[name].down.shape[0]
        if tuple(given.shape) != (rank, rank):
            msg = f"coefficients of {name!r} must be {rank}×{rank}, got {tuple(given.shape)}"
            raise ValueError(msg)
    total = torch.zeros_like(weight, dtype=dtype)
    for name, branch in branches.items():
        down = branch.down.to(dtype)
        if name in coefficients:
            down = coefficients[name].to(down) @ down
        total = total + branch.full_up(len(weight)).to(dtype) @ down
    return total
