"""A frozen linear layer with named low-rank branches, computed as one fused low-rank path."""

from collections.abc import Mapping

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
        # Zeros in the other rows, so that all branches fit into one fused product.
        return F.pad(up, (0, 0, self.rows[0], out_features - self.rows[1]))


class LoRALinear(nn.Module):
    r"""A frozen ``nn.Linear`` plus low-rank branches.

    :math:`y = W x + b + \sum_k w_k B_k A_k x`, with the branches side by side in one pair of thin
    matrix products (LoDA, arXiv:2603.00191, Section 3; two branches there).

    Parameters
    ----------
    base : nn.Linear
        The layer to adapt; held by reference and frozen.

    Examples
    --------
    >>> import torch
    >>> layer = LoRALinear(torch.nn.Linear(4, 6))
    >>> branch = layer.add_branch("general", torch.eye(2, 4), scale=0.5)
    >>> layer(torch.ones(3, 4)).shape, branch.up.shape
    (torch.Size([3, 6]), torch.Size([6, 2]))
    >>> layer.drop_branch("general")
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            msg = f"only nn.Linear layers can carry branches, got {type(base).__name__}"
            raise TypeError(msg)
        if not isinstance(base.weight, nn.Parameter):
            # Merging would write into a tensor that is computed anew at every call.
            msg = "the layer's weight is computed (parametrised); remove the parametrisation first"
            raise TypeError(msg)
        # By reference: optimisers, hooks and shared modules of the model stay valid.
        self.base = base
        self.base.requires_grad_(False)
        self.branches = nn.ModuleDict()
        self._unmerged: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Number D of input features."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Number O of output features."""
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """Effective weight, branches included, for callers that read weights themselves."""
        if self.merged or not self.branches:
            return self.base.weight
        return (self.base.weight + self.delta()).to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the frozen layer."""
        return self.base.bias

    @property
    def merged(self) -> bool:
        """Whether the branches are folded into the weight at the moment."""
        return self._unmerged is not None

    def branch(self, name: str) -> LoRABranch:
        """The branch of that name; the error lists those that exist."""
        if name not in self.branches:
            msg = f"there is no branch {name!r}; branches here: {list(self.branches)}"
            raise KeyError(msg)
        branch = self.branches[name]
        if not isinstance(branch, LoRABranch):
            msg = f"branch {name!r} must be a LoRABranch, got {type(branch).__name__}"
            raise TypeError(msg)
        return branch

    def add_branch(
        self,
        name: str,
        down: Tensor,
        *,
        up: Tensor | None = None,
        scale: float | Tensor = 1.0,
        rows: tuple[int, int] | None = None,
        train_down: bool = False,
    ) -> LoRABranch:
        """Add a branch; without ``up`` it starts at zero and changes nothing yet.

        Parameters
        ----------
        name : str
            A name not in use.
        down : Tensor, shape (r, in_features)
            Down-projection, copied to the layer's dtype and device.
        up : Tensor, shape (len(rows) or out_features, r), optional
            Up-projection, copied; zeros by default.
        scale : float or Tensor, 0-d, default 1
            Weight of the branch; an ``nn.Parameter`` may be shared by branches of many layers.
        rows : tuple of int, optional
            Half-open range of output rows, such as those of the values in a fused qkv.
        train_down : bool, default False
            Whether the down-projection is trained as well.

        Returns
        -------
        LoRABranch
            The branch that was added.

        Raises
        ------
        ValueError
            If the name is taken, shapes do not fit, or the layer is merged.
        """
        self._require_unmerged("add a branch")
        if name in self.branches:
            msg = f"branch {name!r} exists already; drop it first"
            raise ValueError(msg)
        if down.ndim != 2 or down.shape[1] != self.in_features or down.shape[0] == 0:
            msg = f"down must have shape (r, {self.in_features}), got {tuple(down.shape)}"
            raise ValueError(msg)
        first, last = rows if rows is not None else (0, self.out_features)
        if not 0 <= first < last <= self.out_features:
            msg = f"rows must be a range within 0..{self.out_features}, got {rows}"
            raise ValueError(msg)
        shape = (last - first, down.shape[0])
        if up is not None and tuple(up.shape) != shape:
            msg = f"up must have shape {shape}, got {tuple(up.shape)}"
            raise ValueError(msg)
        # Copies, so that training never writes into the caller's bases.
        like = self.base.weight
        down = down.detach().to(like, copy=True).contiguous()
        up = like.new_zeros(shape) if up is None else up.detach().to(like, copy=True)
        branch = LoRABranch(down, up, scale=scale, rows=rows, train_down=train_down)
        self.branches[name] = branch
        return branch

    def drop_branch(self, name: str) -> None:
        """Remove a branch and its parameters."""
        self._require_unmerged("drop a branch")
        self.branch(name)
        del self.branches[name]

    def forward(self, x: Tensor) -> Tensor:
        """Output of the layer for inputs of shape (..., in_features)."""
        if self.merged or not self.branches:
            plain: Tensor = self.base(x)
            return plain
        down, up = self._factors()
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = self.base(rows)
        thin, up = F.linear(rows, down).to(y.dtype), up.mT.to(y.dtype)
        # Added while it is formed, and in place: another array of the size of the output would
        # cost more than the thin products do. Backward hooks make a view, which forbids it, and a
        # compiler finds out for itself.
        in_place = not (torch.compiler.is_compiling() or y._is_view())
        y = y.addmm_(thin, up) if in_place else torch.addmm(y, thin, up)
        return y.view(*x.shape[:-1], self.out_features)

    def delta(self, coefficients: Coefficients | None = None) -> Tensor:
        r"""Update of the weight, :math:`\sum_k w_k B_k \Lambda_k A_k`, in float32 or wider.

        Parameters
        ----------
        coefficients : mapping of str to Tensor, shape (r, r), or Tensor, shape (R, R), optional
            Λ of the branches that have one, the identity for the others; or one Λ for the R
            directions of all branches side by side, :math:`[w_1 B_1, \dots] \Lambda [A_1; \dots]`.

        Returns
        -------
        Tensor, shape (out_features, in_features)

        Raises
        ------
        KeyError
            If Λ is given for a branch that does not exist.
        ValueError
            If Λ is not r×r, or R×R.
        """
        weight = self.base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if isinstance(coefficients, Tensor):
            down, up = (factor.to(dtype) for factor in self._factors())
            if tuple(coefficients.shape) != (len(down), len(down)):
                msg = (
                    f"coefficients of all branches must be {len(down)}×{len(down)}, got "
                    f"{tuple(coefficients.shape)}"
                )
                raise ValueError(msg)
            return up @ (coefficients.to(down) @ down)
        coefficients = coefficients or {}
        for name, factor in coefficients.items():
            rank = len(self.branch(name).down)
            if tuple(factor.shape) != (rank, rank):
                msg = f"coefficients of {name!r} must be {rank}×{rank}, got {tuple(factor.shape)}"
                raise ValueError(msg)
        # Sums in bfloat16 would lose small branches.
        total = torch.zeros_like(weight, dtype=dtype)
        for name in self.branches:
            branch = self.branch(name)
            down = branch.down.to(dtype)
            if name in coefficients:
                down = coefficients[name].to(down) @ down
            total = total + branch.full_up(self.out_features).to(dtype) @ down
        return total

    @torch.no_grad()
    def merge(self, coefficients: Coefficients | None = None) -> None:
        """Fold the branches into the weight; the weight before it is saved, bit for bit.

        Parameters
        ----------
        coefficients : mapping of str to Tensor, shape (r, r), or Tensor, shape (R, R), optional
            Λ by branch or of all branches, as in :meth:`delta`.

        Raises
        ------
        ValueError
            If the layer is merged already, or coefficients do not fit.
        FloatingPointError
            If the merged weight would not be finite; nothing is written then.
        """
        self._require_unmerged("merge")
        weight = self.base.weight
        merged = (weight + self.delta(coefficients)).to(weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            msg = "the merged weight holds NaN or infinite values; the layer was left as it was"
            raise FloatingPointError(msg)
        # Subtracting the update again would not give back the same bits.
        self._unmerged = weight.detach().clone()
        weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight from before the merge, bit for bit."""
        if self._unmerged is None:
            msg = "the layer is not merged"
            raise ValueError(msg)
        self.base.weight.copy_(self._unmerged)
        self._unmerged = None

    def extra_repr(self) -> str:
        """Branches in the printed form of the module."""
        named = {name: tuple(self.branch(name).down.shape) for name in self.branches}
        return f"branches={named}, merged={self.merged}"

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Downs (R, in) stacked vertically, and scaled ups (out, R) side by side."""
        branches = [self.branch(name) for name in self.branches]
        downs: list[Tensor] = [branch.down for branch in branches]
        ups = [branch.full_up(self.out_features) for branch in branches]
        if len(branches) == 1:
            return downs[0], ups[0]  # joining one branch would copy it in every forward pass
        return torch.cat(downs), torch.cat(ups, dim=1)

    def _require_unmerged(self, action: str) -> None:
        if self.merged:
            msg = f"cannot {action}: the branches are merged into the weight; unmerge first"
            raise ValueError(msg)
