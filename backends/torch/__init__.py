"""LoDA for PyTorch: adapt any ``nn.Module`` to a stream of tasks without forgetting."""

from backends.torch.adapt import (
    TIMM_QKV,
    adapt,
    attach,
    check_rank,
    find_layers,
    plain_state,
    restore,
)
from backends.torch.branch import LoRABranch
from backends.torch.gao import draw_permutation, gradient_aligned_step
from backends.torch.loda import LoDA
from backends.torch.lora import LoRALinear
from backends.torch.moments import MomentCollector, collect_moments
from backends.torch.processes import Reduce, sum_over_processes
from backends.torch.random_bases import random_bases
from backends.torch.record import TaskRecord
from backends.torch.settings import LoDASettings
from backends.torch.step import AlignedStep, RowsLoss, plain_step

__all__ = [
    "TIMM_QKV",
    "AlignedStep",
    "LoDA",
    "LoDASettings",
    "LoRABranch",
    "LoRALinear",
    "MomentCollector",
    "Reduce",
    "RowsLoss",
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
]
