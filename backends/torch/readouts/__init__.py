"""Read-outs: classifiers over all classes seen, built from heads or stored statistics.

Every read-out has a ``kind``, gives ``logits(features)`` (N, C_seen) and its ``tensors()``, from
which :func:`load_readout` rebuilds it bit for bit. Statistics are filled task by task: ``collect``
batches of features, then ``end_task``.
"""

from backends.torch.readouts.align import (
    AlignmentSettings,
    align_heads,
    alignment,
    alignment_loss,
)
from backends.torch.readouts.base import Readout, load_readout
from backends.torch.readouts.cosine import CosineReadout, heads, nearest_mean
from backends.torch.readouts.ridge_regression import (
    RIDGE_STRENGTHS,
    RidgeReadout,
    RidgeStatistics,
    random_features,
    ridge,
    solve_ridge,
)
from backends.torch.readouts.statistics import ClassStatistics

__all__ = [
    "RIDGE_STRENGTHS",
    "AlignmentSettings",
    "ClassStatistics",
    "CosineReadout",
    "Readout",
    "RidgeReadout",
    "RidgeStatistics",
    "align_heads",
    "alignment",
    "alignment_loss",
    "heads",
    "load_readout",
    "nearest_mean",
    "random_features",
    "ridge",
    "solve_ridge",
]
