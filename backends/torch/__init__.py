"""LoDA for PyTorch: adapt any ``nn.Module`` to a stream of tasks, forgetting little."""

from typing import TYPE_CHECKING

from backends.lazy import load_on_use

if TYPE_CHECKING:
    from backends.torch.distributed import Reduce, sum_over_processes, unshared
    from backends.torch.gao import (
        AlignedStep,
        Half,
        Halves,
        Part,
        RowsLoss,
        draw_permutation,
        gradient_aligned_step,
        plain_step,
    )
    from backends.torch.layers import (
        adapt,
        attach,
        check_rank,
        find_layers,
        plain_state,
        restore,
        untie,
    )
    from backends.torch.linear_maps import InProjection
    from backends.torch.loda import LoDA, Task
    from backends.torch.lora import (
        LargeUpdateWarning,
        LoRABranch,
        LoRALinear,
        MergeRounding,
        weight_matrix,
    )
    from backends.torch.moments import MomentCollector, collect_moments
    from backends.torch.record import TaskRecord
    from backends.torch.settings import PRESETS, TIMM_QKV, LoDASettings
    from backends.torch.solve import random_bases

__all__ = [
    "PRESETS",
    "TIMM_QKV",
    "AlignedStep",
    "Half",
    "Halves",
    "InProjection",
    "LargeUpdateWarning",
    "LoDA",
    "LoDASettings",
    "LoRABranch",
    "LoRALinear",
    "MergeRounding",
    "MomentCollector",
    "Part",
    "Reduce",
    "RowsLoss",
    "Task",
    "TaskRecord",
    "adapt",
    "attach",
    "check_rank",
    "collect_moments",
    "draw_permutation",
    "find_layers",
    "gradient_aligned_step",
    "plain_state",
    "plain_step",
    "random_bases",
    "restore",
    "sum_over_processes",
    "unshared",
    "untie",
    "weight_matrix",
]

# A command line that only shows the settings loads no torch.
__getattr__, __dir__ = load_on_use(
    __name__,
    __all__,
    (
        "settings",
        "linear_maps",
        "lora",
        "layers",
        "distributed",
        "moments",
        "gao",
        "solve",
        "record",
        "loda",
    ),
)
