"""The classification loss of the paper's protocol: CosFace."""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["cosface"]

_LOW = (torch.float16, torch.bfloat16)


def cosface(
    cosines: Tensor, targets: Tensor, /, *, scale: float = 20.0, margin: float = 0.0
) -> Tensor:
    r"""Mean CosFace loss of a batch: cross-entropy of scaled cosines with a margin on the target.

    .. math:: L = -\frac1N \sum_n \log
        \frac{e^{s(\cos_{n,y_n} - m)}}{e^{s(\cos_{n,y_n} - m)} + \sum_{c \ne y_n} e^{s\cos_{n,c}}}

    (Wang et al., "CosFace", arXiv:1801.09414, equation 4; LoDA, arXiv:2603.00191, uses s = 20).

    Parameters
    ----------
    cosines : (N, C) floating
        Cosines of the features to the C heads. float16 and bfloat16 are computed in float32.
    targets : (N,) int64
        Columns of the true classes, 0 ... C - 1.
    scale : float
        s > 0.
    margin : float
        m >= 0, subtracted from the cosine of the true class.

    Returns
    -------
    scalar, float32 or float64

    Raises
    ------
    ValueError
        For wrong shapes, an empty batch, targets out of range (checked on the CPU only: on an
        accelerator it would wait for the device at every step), or a bad scale or margin.
    TypeError
        For cosines that are not floating or targets that are not int64.

    Examples
    --------
    >>> import torch
    >>> cosines = torch.tensor([[0.5, 0.1], [0.0, 0.2]])
    >>> targets = torch.tensor([0, 1])
    >>> round(cosface(cosines, targets, scale=1.0).item(), 4)
    0.5556
    >>> round(cosface(cosines, targets, scale=1.0, margin=0.1).item(), 4)
    0.5994
    """
    if not (math.isfinite(scale) and scale > 0):
        msg = f"scale must be finite and above 0, got {scale}"
        raise ValueError(msg)
    if not (math.isfinite(margin) and margin >= 0):
        msg = f"margin must be finite and at least 0, got {margin}"
        raise ValueError(msg)
    if not cosines.is_floating_point() or targets.dtype != torch.int64:
        msg = f"cosines must be floating and targets int64, got {cosines.dtype} and {targets.dtype}"
        raise TypeError(msg)
    if cosines.ndim != 2 or targets.shape != cosines.shape[:1] or 0 in cosines.shape:
        msg = (
            "cosines and targets must have the shapes (N, C) and (N,) with N and C at least 1, got "
            f"{tuple(cosines.shape)} and {tuple(targets.shape)}"
        )
        raise ValueError(msg)
    classes = cosines.shape[1]
    if targets.device.type == "cpu" and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        msg = (
            f"targets must be columns 0 to {classes - 1}, got {int(targets.min())} to "
            f"{int(targets.max())}; subtract the first class of the task from the labels"
        )
        raise ValueError(msg)
    # Rounding of 20·cos in bfloat16 is up to 0.06, as large as a margin: widen before scaling.
    wide = cosines.float() if cosines.dtype in _LOW else cosines
    if margin:
        wide = wide - margin * functional.one_hot(targets, classes).to(wide.dtype)
    with torch.autocast(device_type=wide.device.type, enabled=False):
        return functional.cross_entropy(scale * wide, targets)
