"""A frozen linear layer with named low-rank branches, computed as one fused low-rank path."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from backends.torch import linear_maps
from backends.torch.linear_maps import matrix

_HOOKS: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps the hooks on its calls."""

Coefficients = Mapping[str, Tensor] | Tensor
"""Λ by branch, shape (r, r) each, or one Λ of all branches side by side, shape (R, R)."""


class MergeRounding(NamedTuple):
    r"""How much of an update a weight in half precision took up at a merge.

    With Δ the update and R the difference of the weights before and after the merge.

    Attributes
    ----------
    error : Tensor, 0-d
        :math:`\|R - \Delta\|_F / \|\Delta\|_F`.
    correlation : Tensor, 0-d
        :math:`\langle R, \Delta\rangle / (\|R\|_F \|\Delta\|_F)`, 1 without rounding; 0 if the
        whole update was rounded away.
    """

    error: Tensor
    correlation: Tensor


class LoRABranch(nn.Module):
    """One low-rank update ``scale · up @ down`` of (some rows of) a linear layer.

    Parameters
    ----------
    down : Tensor, shape (r, in_features)
        Down-projection A.
    up : Tensor, shape (rows, r)
        Up-projection B, of the rows that the branch writes to.
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
    r"""A frozen linear layer plus low-rank branches.

    :math:`y = W x + b + \sum_k w_k B_k A_k x`, with the branches side by side in one pair of thin
    matrix products (LoDA, arXiv:2603.00191, Section 3; two branches there).

    Branches are float32 (or wider) whatever the dtype of the layer, or small steps of an optimiser
    would be rounded away; outputs have the dtype of the layer's own. Hooks on the layer are called
    as before, with its input and with its output, branches included.

    Parameters
    ----------
    base : nn.Module
        The layer to adapt, held by reference and frozen: an ``nn.Linear``, transformers'
        ``Conv1D``, a convolution with a kernel of one point, or an :class:`InProjection`.
    master : Tensor, shape (out_features, in_features), optional
        The weight in float32, of which that of a layer in half precision is the rounded value.
        A merge adds to it, so that rounding errors do not add up over the tasks.

    Attributes
    ----------
    rounding : MergeRounding or None
        Of the last merge; ``None`` before one, and for weights in float32 or wider.
    norms : tuple of Tensor, 0-d, or None
        Frobenius norms of the update ΔW of the last merge and of the weight W before it.

    Examples
    --------
    >>> import torch
    >>> layer = LoRALinear(torch.nn.Linear(4, 6))
    >>> branch = layer.add_branch("general", torch.eye(2, 4), scale=0.5)
    >>> layer(torch.ones(3, 4)).shape, branch.up.shape
    (torch.Size([3, 6]), torch.Size([6, 2]))
    >>> layer.drop_branch("general")
    """

    def __init__(self, base: nn.Module, *, master: Tensor | None = None) -> None:
        super().__init__()
        if not linear_maps.is_linear_map(base):
            msg = (
                f"a layer with branches must be an nn.Linear, a Conv1D of transformers or a "
                f"convolution with a kernel of one point, got {type(base).__name__}"
            )
            raise TypeError(msg)
        reason = linear_maps.why_not_adaptable(base)
        if reason is not None:
            msg = f"the layer cannot carry branches: {reason}"
            raise TypeError(msg)
        # By reference: optimisers, hooks and shared modules of the model stay valid.
        self.base = base
        self.base.requires_grad_(False)
        # One set of hooks for both, so that they are called on the input and on the whole output,
        # and those that are added or removed during a task are so for the layer itself.
        self.__dict__.update({hooks: base.__dict__[hooks] for hooks in _HOOKS})
        self.branches = nn.ModuleDict()
        self.master = master
        self.rounding: MergeRounding | None = None
        self.norms: tuple[Tensor, Tensor] | None = None
        self._merged = False
        self._unmerged: tuple[Tensor, Tensor | None] | None = None
        self._staged: Coefficients | None = None
        self._whole: Tensor | None = None
        self._downs: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Number D of input features."""
        return self.frozen.shape[1]

    @property
    def out_features(self) -> int:
        """Number O of output features."""
        return self.frozen.shape[0]

    @property
    def frozen(self) -> Tensor:
        """Frozen weight as a matrix (out_features, in_features); a view of the layer's own."""
        return matrix(self.base)

    @property
    def weight(self) -> Tensor:
        """Effective weight, branches included, for callers that read weights themselves."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        if self._staged is not None:
            merged = linear_maps.like_weight(self.base, self._sum(self._staged)[0])
            # In the memory format of the weight, or products could round otherwise.
            own = torch.empty_like(weight, requires_grad=False)
            return linear_maps.mark(own.copy_(merged), {None: self})
        if self.merged or not self.branches:
            return weight
        delta = linear_maps.like_weight(self.base, self.delta())
        return linear_maps.mark((weight + delta).to(weight.dtype), {None: self})

    @property
    def bias(self) -> Tensor | None:
        """Bias of the frozen layer."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    # Which kind of backward hooks the shared ones are is a flag beside them.
    @property
    def _is_full_backward_hook(self) -> bool | None:
        base = self.__dict__.get("_modules", {}).get("base")
        return None if base is None else base._is_full_backward_hook

    @_is_full_backward_hook.setter
    def _is_full_backward_hook(self, full: bool | None) -> None:
        base = self.__dict__.get("_modules", {}).get("base")
        # nn.Module sets None before there is a base, and in a copy after there is one.
        if base is not None and full is not None:
            base._is_full_backward_hook = full

    @property
    def merged(self) -> bool:
        """Whether the branches are folded into the weight at the moment."""
        return self._merged

    @property
    def staged(self) -> bool:
        """Whether the layer computes with a merged weight that is not written yet."""
        return self._staged is not None

    def branch(self, name: str) -> LoRABranch:
        """The branch of that name; the error lists those that exist."""
        if name not in self.branches:
            msg = f"there is no branch {name!r}; branches here: {list(self.branches)}"
            raise KeyError(msg)
        branch: LoRABranch = self.branches[name]  # type: ignore[assignment]
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
            Down-projection, copied to the layer's device, in float32 or the layer's wider dtype.
        up : Tensor, shape (rows, r), optional
            Up-projection of the rows that the branch writes to, copied; zeros by default.
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
        device, dtype = self.frozen.device, _at_least_float32(self.frozen.dtype)
        down = down.detach().to(device, dtype, copy=True).contiguous()
        up = down.new_zeros(shape) if up is None else up.detach().to(device, dtype, copy=True)
        branch = LoRABranch(down, up, scale=scale, rows=rows, train_down=train_down)
        self.branches[name] = branch
        return branch

    def drop_branch(self, name: str) -> None:
        """Remove a branch and its parameters."""
        self._require_unmerged("drop a branch")
        self.branch(name)
        del self.branches[name]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - a keyword of nn.Linear
        """Output of the layer for inputs of shape (..., in_features), or as its own for others."""
        x = input
        if self.staged:
            return linear_maps.with_weight(self.base, self.weight, x)
        # Not base(x): the hooks are called by this module.
        if self.merged or not self.branches:
            plain: Tensor = self.base.forward(x)
            return plain
        down, up = self._factors()
        if type(self.base) not in linear_maps.PLAIN or "forward" in self.base.__dict__:
            # A layer with a forward of its own may hold what it returns.
            whole: Tensor = self.base.forward(x)
            thin = F.linear(linear_maps.tokens(self.base, x), down.to(x.dtype)).to(whole.dtype)
            return whole + linear_maps.from_tokens(self.base, F.linear(thin, up.to(whole.dtype)))
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, self.frozen, self.bias)
        thin, up = F.linear(rows, down.to(rows.dtype)).to(y.dtype), up.mT.to(y.dtype)
        # Added while it is formed, and in place: another array of the size of the output would
        # cost more than the thin products do. A compiler finds that out for itself.
        y = torch.addmm(y, thin, up) if torch.compiler.is_compiling() else y.addmm_(thin, up)
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
        # Under autocast the products would be as inexact as those of a forward pass.
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self._delta(coefficients)

    def _delta(self, coefficients: Coefficients | None) -> Tensor:
        weight = self.frozen
        dtype = _at_least_float32(weight.dtype)
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
        """Fold the branches into the weight; the weight before it is saved for :meth:`unmerge`.

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
        self.stage(coefficients)
        # Subtracting the update again would not give back the same bits.
        unmerged = self.frozen.detach().clone(), self.master
        self.commit()
        self._unmerged = unmerged

    @torch.no_grad()
    def stage(self, coefficients: Coefficients | None = None) -> None:
        """Compute with the merged weight from now on, but do not write it yet.

        The merged weight is formed anew whenever it is used, to the bits that a merge would write.
        So the weight before it is there until :meth:`commit`, and needs no memory of its own.

        Parameters
        ----------
        coefficients : mapping of str to Tensor, shape (r, r), or Tensor, shape (R, R), optional
            Λ by branch or of all branches, as in :meth:`delta`.

        Raises
        ------
        ValueError, FloatingPointError
            As :meth:`merge`.
        """
        self._require_unmerged("merge")
        whole, delta = self._sum(coefficients)
        merged = whole.to(self.frozen.dtype)
        if not bool(torch.isfinite(merged).all()):
            msg = "the merged weight holds NaN or infinite values; the layer was left as it was"
            raise FloatingPointError(msg)
        self.rounding = _rounding(self.frozen, merged, delta)
        before = torch.linalg.vector_norm(self.frozen, dtype=delta.dtype)
        self.norms = torch.linalg.vector_norm(delta), before
        self._staged = {} if coefficients is None else coefficients

    def unstage(self) -> None:
        """Compute with the branches beside the weight again."""
        self._staged = None

    @torch.no_grad()
    def commit(self) -> None:
        """Write the merged weight of :meth:`stage`, for good; may be repeated if interrupted."""
        if self._staged is None:
            msg = "no merge is staged: call stage first"
            raise ValueError(msg)
        if self._whole is None:
            self._whole, _ = self._sum(self._staged)
        # Once more does no harm, should Ctrl-C come before the next line and commit be repeated.
        self.frozen.copy_(self._whole)
        self.master = None if self.master is None else self._whole
        self._staged, self._whole, self._merged = None, None, True
        torch.clear_autocast_cache()  # it may hold a cast of the weight from before

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weight from before :meth:`merge`, bit for bit."""
        if self._unmerged is None:
            msg = "the layer is not merged, or its weight from before was not saved"
            raise ValueError(msg)
        weight, self.master = self._unmerged
        self.frozen.copy_(weight)
        torch.clear_autocast_cache()
        self._merged, self._unmerged = False, None

    @torch.no_grad()
    def _sum(self, coefficients: Coefficients | None) -> tuple[Tensor, Tensor]:
        """The merged weight, not yet rounded to the dtype of the layer, and the update in it."""
        weight = self.frozen if self.master is None else self.master.to(self.frozen.device)
        delta = self.delta(coefficients)
        return weight + delta, delta

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
        return self._side_by_side(downs), torch.cat(ups, dim=1)

    def _side_by_side(self, downs: list[Tensor]) -> Tensor:
        """Down-projections stacked vertically; frozen ones are parts of one tensor, made once."""
        # Tensors that stand in for them (torch.func) have no memory of their own.
        own = all(type(down) is nn.Parameter and not down.requires_grad for down in downs)
        if not own or torch.compiler.is_compiling():
            return torch.cat(downs)
        stack = self._downs
        if stack is None or not _is_made_of(stack, downs):
            # New branches, or the model was copied or moved. A value that is written to a
            # projection later is written to the stack.
            stack = self._downs = torch.cat([down.detach() for down in downs])
            parts = torch.split(stack, [len(down) for down in downs])
            for down, part in zip(downs, parts, strict=True):
                down.data = part
        return stack

    def _require_unmerged(self, action: str) -> None:
        if self.merged:
            msg = f"cannot {action}: the branches are merged into the weight; unmerge first"
            raise ValueError(msg)


def _is_made_of(stack: Tensor, parts: list[Tensor]) -> bool:
    """Whether the parts are the rows of the stack, in order and in its memory."""
    place = stack.data_ptr()
    for part in parts:
        if (part.data_ptr(), part.dtype, part.device) != (place, stack.dtype, stack.device):
            return False
        place += part.numel() * part.element_size()
    return place == stack.data_ptr() + stack.numel() * stack.element_size()


def warn_of_rounding(rounding: Mapping[str, MergeRounding]) -> None:
    """Warn of layers whose weights took up less than nearly all of an update at a merge."""
    correlations = {name: float(x.correlation) for name, x in rounding.items()}
    poor = {name: c for name, c in correlations.items() if c < _ENOUGH}
    if poor:
        worst = min(poor, key=poor.__getitem__)
        msg = (
            f"rounding at the merge loses a part of the update: in {len(poor)} of {len(rounding)} "
            f"layers what is left has a correlation with it of less than {_ENOUGH} (worst: "
            f"{poor[worst]:.3f} in {worst!r}); set master to keep the weights in float32 as well"
        )
        warnings.warn(msg, stacklevel=4)  # who ended the task, behind the frame of torch.no_grad


class LargeUpdateWarning(UserWarning):
    """The update of a task is larger than the weights of the layers that it was added to."""


def warn_of_size(layers: Iterable[LoRALinear]) -> None:
    """Warn of an update that is larger than the weights of the layers that it was added to."""
    norms = [layer.norms for layer in layers if layer.norms is not None]
    moved, size = (math.hypot(*map(float, lengths)) for lengths in zip(*norms, strict=True))
    if moved > size > 0:
        msg = (
            f"the update of this task is {moved / size:.3g} times as large as the weights of the "
            f"adapted layers (Frobenius norm), so probably little is left of what they knew: lower "
            f"the learning rate, or train fewer steps"
        )
        # Who ended the task, behind the frame of torch.no_grad.
        warnings.warn(msg, LargeUpdateWarning, stacklevel=4)


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer of the model itself, without branches."""
    return layer.base if isinstance(layer, LoRALinear) else layer


def weight_matrix(layer: nn.Module) -> Tensor:
    """Frozen weight (out_features, in_features) of a layer, adapted or not; a view of its own."""
    return matrix(base_layer(layer))


def input_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    """Input of a layer, adapted or not, with the features last."""
    return linear_maps.tokens(base_layer(layer), x)


_ENOUGH: Final = 0.99
"""Correlation of a merged with the wanted update from which rounding is not worth a warning."""


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rounding(before: Tensor, after: Tensor, delta: Tensor) -> MergeRounding | None:
    """What of an update is left in a weight; nothing is measured in float32 and wider."""
    if _at_least_float32(before.dtype) == before.dtype:
        return None
    realised = after.to(delta.dtype) - before.to(delta.dtype)
    norm, lengths = delta.norm(), delta.norm() * realised.norm()
    error, product = (realised - delta).norm(), (realised * delta).sum()
    # An update of zero is taken up exactly.
    return MergeRounding(
        torch.where(norm > 0, error / norm, 0.0),
        torch.where(lengths > 0, product / lengths, (norm == 0).to(delta.dtype)),
    )
