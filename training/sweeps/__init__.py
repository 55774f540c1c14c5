"""Many runs: variants of an experiment times seeds, side by side, going on after a failure."""

from training.sweeps.files import Sweep, packaged_sweeps, read_sweep
from training.sweeps.groups import read_groups, write_groups
from training.sweeps.jobs import Job, UnreadableRunError, finished, plan, standing
from training.sweeps.run import Engine, Outcome, run_job, run_sweep

__all__ = [
    "Engine",
    "Job",
    "Outcome",
    "Sweep",
    "UnreadableRunError",
    "finished",
    "packaged_sweeps",
    "plan",
    "read_groups",
    "read_sweep",
    "run_job",
    "run_sweep",
    "standing",
    "write_groups",
]
