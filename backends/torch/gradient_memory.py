"""DualGPM: the space of past gradients, kept by whichever of it and its complement is smaller."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class GradientMemory(NamedTuple):
    r"""Orthonormal basis of the inputs that past tasks need, or of those that they leave free.

    Gradients of a linear layer lie in the span of its inputs, so an update whose input directions
    avoid that span leaves old outputs alone (Liang and Li, "Adaptive Plasticity Improvement for
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

    basis: Tensor
    free: bool = False

    @classmethod
    def empty(cls, like: Tensor) -> Self:
        """Before the first task: nothing is protected. ``like`` is any (D, D) moment."""
        return cls(like.new_zeros(len(like), 0, dtype=torch.float64))

    def free_part(self, moment: Tensor) -> Tensor:
        """What of a moment (D, D) past tasks leave free: C - M Mᵀ C, or M Mᵀ C."""
        moment = moment.to(self.basis)
        inside = self.basis @ (self.basis.mT @ moment)
        free: Tensor = inside if self.free else moment - inside
        return free

    def free_directions(self, moment: Tensor, rank: int) -> Tensor:
        """Leading left singular vectors (D, r) of the free part, in the dtype of the moment.

        Columns beyond the free part's own rank are zero.
        """
        vectors, values, _ = torch.linalg.svd(self.free_part(moment))
        # Moments are sums of float32 Gram matrices, whatever they are stored in.
        floor = len(moment) * torch.finfo(torch.float32).eps * _size(moment.to(self.basis))
        kept = values[:rank] > floor
        found: Tensor = (vectors[:, :rank] * kept).to(moment.dtype)
        return found

    def updated(self, moment: Tensor, share: float) -> "GradientMemory":
        """The memory after a task.

        Parameters
        ----------
        moment : Tensor, shape (D, D)
            Second moment of the task's inputs through the trained model.
        share : float
            Share ε of ‖C‖²_F, in (0, 1], that must lie in the protected space afterwards.
        """
        moment = moment.to(self.basis)
        basis = self._shrunk(moment, share) if self.free else self._grown(moment, share)
        if not self.free and 2 * basis.shape[1] > len(moment):
            return GradientMemory(_complement(basis), free=True)
        return GradientMemory(basis, self.free)

    def _grown(self, moment: Tensor, share: float) -> Tensor:
        """Append leading left vectors of the residual until the share is reached."""
        residual = self.free_part(moment)
        vectors, values, _ = torch.linalg.svd(residual)
        total = _size(moment) ** 2
        kept = 1 - values.square().sum() / total  # of the task's energy, by the basis as it is
        before = kept + (values.square().cumsum(0) - values.square()) / total
        if self.basis.shape[1]:
            wanted = int((before < share).sum())
        else:  # the published rule of the first task stops one direction earlier
            wanted = max(int((values.square().cumsum(0) / total < share).sum()), 1)
        room = len(moment) - self.basis.shape[1]
        joined = torch.cat([self.basis, vectors[:, : min(wanted, room)]], dim=1)
        # Appended vectors are orthogonal to the basis up to rounding only, which would add up.
        basis: Tensor = torch.linalg.qr(joined).Q
        return basis

    def _shrunk(self, moment: Tensor, share: float) -> Tensor:
        """Drop leading directions of the task from the free space while too much lies in it."""
        vectors, values, _ = torch.linalg.svd(self.free_part(moment))
        total = _size(moment) ** 2
        left = (values.square().sum() - values.square().cumsum(0) + values.square()) / total
        drop = min(int((left >= 1 - share).sum()), self.basis.shape[1])
        if drop == 0:
            return self.basis
        taken = vectors[:, :drop]
        rest = self.basis - taken @ (taken.mT @ self.basis)
        left_vectors: Tensor = torch.linalg.svd(rest, full_matrices=False).U
        return left_vectors[:, : self.basis.shape[1] - drop]


def _size(matrix: Tensor) -> Tensor:
    """Frobenius norm, above zero."""
    size: Tensor = torch.linalg.norm(matrix)
    return size.clamp(min=torch.finfo(matrix.dtype).tiny)


def _complement(basis: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.svd(basis, full_matrices=True).U
    return vectors[:, basis.shape[1] :]
