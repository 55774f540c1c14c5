"""Read-outs: classifiers over all classes seen, from the heads or from stored statistics.

:class:`Readouts` holds those of a run: ``add_task`` gathers the statistics of a task, ``fit`` gives
a :class:`Classifier` for each, ``state_dict`` what the next task needs. `Heads`, `NearestMean`,
`Alignment`, `Compensated` and `Ridge` are packaged; one of your own is a subclass of
:class:`Readout`.
"""

from typing import TYPE_CHECKING

from backends.lazy import load_on_use
from backends.torch.readouts.readout import (
    READOUTS,
    Alignment,
    Classifier,
    Compensated,
    Heads,
    NearestMean,
    Readout,
    Readouts,
    Ridge,
)

if TYPE_CHECKING:
    from backends.torch.readouts.alignment import align_heads, alignment_loss
    from backends.torch.readouts.heads import (
        CosineClassifier,
        CosineHead,
        CosineHeads,
        class_mean_start,
    )
    from backends.torch.readouts.ridge import (
        RIDGE_STRENGTHS,
        RidgeClassifier,
        RidgeStatistics,
        random_features,
        solve_ridge,
    )
    from backends.torch.readouts.statistics import (
        ClassStatistics,
        CompensatedStatistics,
        TaskStatistics,
    )

__all__ = [
    "READOUTS",
    "RIDGE_STRENGTHS",
    "Alignment",
    "ClassStatistics",
    "Classifier",
    "Compensated",
    "CompensatedStatistics",
    "CosineClassifier",
    "CosineHead",
    "CosineHeads",
    "Heads",
    "NearestMean",
    "Readout",
    "Readouts",
    "Ridge",
    "RidgeClassifier",
    "RidgeStatistics",
    "TaskStatistics",
    "align_heads",
    "alignment_loss",
    "class_mean_start",
    "random_features",
    "solve_ridge",
]

# A command line shows the options without loading torch.
__getattr__, __dir__ = load_on_use(__name__, __all__, ("heads", "statistics", "alignment", "ridge"))
