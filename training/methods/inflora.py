"""InfLoRA: the input directions of a task avoid the span of the gradients of old tasks.

Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning",
arXiv:2404.00228. DualGPM (`GradientMemory`) keeps a basis of the protected directions.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from training.components import check, positive
from training.methods.branches import MergedBranches

if TYPE_CHECKING:
    from torch import Tensor

    from backends.torch import TaskRecord


class InfLoRA(MergedBranches):
    """InfLoRA (arXiv:2404.00228): a task's branch reads only inputs that old tasks do not need.

    B of the branch is trained; A is solved from the task's inputs and then frozen.

    Parameters
    ----------
    lamb
        Fraction of the energy of a task's inputs that is protected after the first task.
    lame
        That fraction at the end of the stream; in between it grows linearly with the tasks.
    down_scale
        Factor c of the down-projections A = c·Uᵀ.
    **settings
        The options of BranchMethod.
    """

    def __init__(
        self, *, lamb: float = 0.95, lame: float = 1.0, down_scale: float = 3**-0.5, **settings: Any
    ) -> None:
        super().__init__(**settings)
        fits = 0 < lamb <= lame <= 1
        check(fits, "lamb and lame", f"{lamb} and {lame}", "0 < lamb <= lame <= 1")
        positive("down_scale", down_scale)
        self.lamb, self.lame, self.down_scale = lamb, lame, down_scale
        self.uses_task_count = lamb < lame
        self.memories: dict[str, GradientMemory] = {}

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Solve for the directions from the task's inputs, and attach the branches."""
        moments = self._moments(batches)
        downs = {
            name: self._memory(name, moment).free_directions(moment, self.rank).mT * self.down_scale
            for name, moment in moments.items()
        }
        self.add_branches(lambda name, _: downs[name])

    def end_task(self, batches: Iterable[Any]) -> "TaskRecord":
        """Merge permanently, and protect the inputs of the task through the trained model."""
        share = (self.lame - self.lamb) * (self.tasks / self.context.tasks) + self.lamb
        record = self.merge()
        for name, moment in self._moments(batches).items():
            self.memories[name] = self._memory(name, moment).updated(moment, share)
        return record

    def state_dict(self) -> "dict[str, Tensor]":
        """The memory of every layer: a basis, and whether it spans the free directions.

        In an open task, its branches as well.
        """
        import torch

        state: dict[str, Tensor] = {}
        for name, memory in self.memories.items():
            state[f"basis/{name}"] = memory.basis
            state[f"free/{name}"] = torch.tensor(memory.free)
        return state | super().state_dict()

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Load the memories, and the branches of an open task."""
        self.memories = {
            name: GradientMemory(basis, bool(state[f"free/{name}"]))
            for name, basis in self.carried(state, "basis").items()
        }
        super().load_state_dict(state)

    def _moments(self, batches: Iterable[Any]) -> "dict[str, Tensor]":
        from backends.torch import collect_moments

        layers = collect_moments(self.model, batches, self.target, reduce=self.context.reduce)
        return {name: moments.mean for name, moments in layers.items()}

    def _memory(self, name: str, moment: "Tensor") -> "GradientMemory":
        return self.memories.get(name) or GradientMemory.empty(moment)


class GradientMemory(NamedTuple):
    r"""Orthonormal basis of the inputs that past tasks need, or of the complement.

    Gradients of a linear layer lie in the span of its inputs, so an update whose input directions
    avoid that span does not change old outputs (Liang and Li, "Adaptive Plasticity Improvement for
    Continual Learning", CVPR 2023; used by InfLoRA, arXiv:2404.00228).

    Attributes
    ----------
    basis : Tensor, shape (D, k)
        Orthonormal columns M.
    free : bool
        Whether M spans the complement of the past inputs (the published code's ``retain``)
        instead of the past inputs themselves (``remove``).

    Examples
    --------
    >>> import torch
    >>> old = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0, 0.0]))
    >>> memory = GradientMemory.empty(old).updated(old, share=0.9)
    >>> memory.basis.abs().argmax(dim=0).tolist(), memory.free
    ([0], False)
    >>> memory.free_directions(torch.diag(torch.tensor([9.0, 0.0, 5.0, 1.0, 0.0])), 1).argmax()
    tensor(2)
    """

    basis: "Tensor"
    free: bool = False

    @classmethod
    def empty(cls, like: "Tensor") -> Self:
        """The memory before the first task: nothing is protected. ``like`` is any (D, D) moment."""
        import torch

        return cls(like.new_zeros(len(like), 0, dtype=torch.float64))

    def free_part(self, moment: "Tensor") -> "Tensor":
        """The part of a moment (D, D) that past tasks leave free: C - M Mᵀ C, or M Mᵀ C."""
        moment = moment.to(self.basis)
        spanned = self.basis @ (self.basis.mT @ moment)
        free: Tensor = spanned if self.free else moment - spanned
        return free

    def free_directions(self, moment: "Tensor", rank: int) -> "Tensor":
        """Leading left singular vectors (D, r) of the free part, in the dtype of the moment.

        Columns beyond the free part's own rank are zero.
        """
        import torch

        vectors, values = _left_singular(self.free_part(moment))
        # Moments are sums of float32 Gram matrices, whatever their dtype.
        floor = len(moment) * torch.finfo(torch.float32).eps * _size(moment.to(self.basis))
        above = values[:rank] > floor
        directions: Tensor = (vectors[:, :rank] * above).to(moment.dtype)
        return directions

    def updated(self, moment: "Tensor", share: float) -> "GradientMemory":
        """The memory after a task.

        Parameters
        ----------
        moment : Tensor, shape (D, D)
            Second moment of the task's inputs through the trained model.
        share : float
            Fraction ε of ‖C‖²_F, in (0, 1], that must lie in the protected space afterwards.
        """
        moment = moment.to(self.basis)
        basis = self._shrunk(moment, share) if self.free else self._grown(moment, share)
        if not self.free and 2 * basis.shape[1] > len(moment):
            complement = _left_singular(basis)[0][:, basis.shape[1] :]
            return GradientMemory(complement, free=True)
        return GradientMemory(basis, self.free)

    def _grown(self, moment: "Tensor", share: float) -> "Tensor":
        """Append leading left vectors of the residual until the share is reached."""
        import torch

        vectors, values = _left_singular(self.free_part(moment))
        total = _size(moment) ** 2
        protected = 1 - values.square().sum() / total  # share that already lies in the basis
        before = protected + (values.square().cumsum(0) - values.square()) / total
        if self.basis.shape[1]:
            wanted = int((before < share).sum())
        else:  # the published rule of the first task stops one direction earlier
            wanted = max(int((values.square().cumsum(0) / total < share).sum()), 1)
        room = len(moment) - self.basis.shape[1]
        joined = torch.cat([self.basis, vectors[:, : min(wanted, room)]], dim=1)
        # Appended vectors are orthogonal to the basis only up to rounding, which would add up.
        basis: Tensor = torch.linalg.qr(joined).Q
        return basis

    def _shrunk(self, moment: "Tensor", share: float) -> "Tensor":
        """Drop leading directions of the task from the free space while too much lies in it."""
        vectors, values = _left_singular(self.free_part(moment))
        total = _size(moment) ** 2
        left = (values.square().sum() - values.square().cumsum(0) + values.square()) / total
        drop = min(int((left >= 1 - share).sum()), self.basis.shape[1])
        if drop == 0:
            return self.basis
        taken = vectors[:, :drop]
        rest = self.basis - taken @ (taken.mT @ self.basis)
        return _left_singular(rest, full=False)[0][:, : self.basis.shape[1] - drop]


def _size(matrix: "Tensor") -> "Tensor":
    """Frobenius norm, above zero."""
    import torch

    size: Tensor = torch.linalg.norm(matrix)
    return size.clamp(min=torch.finfo(matrix.dtype).tiny)


def _left_singular(matrix: "Tensor", *, full: bool = True) -> "tuple[Tensor, Tensor]":
    """Left singular vectors as columns, and singular values, the largest first."""
    import torch

    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=full)
    return vectors, values
