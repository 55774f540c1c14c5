"""Many runs: variants of an experiment times seeds, side by side, going on after a failure."""

from training.sweeps.files import Sweep, packaged_sweeps, read_sweep
from training.sweeps.jobs import Job, finished, plan
from training.sweeps.run import Engine, Outcome, run_job, run_sweep

__all__ = [
    "Engine",
    "Job",
    "Outcome",
    "Sweep",
    "finished",
    "packaged_sweeps",
    "plan",
    "read_sweep",
    "run_job",
    "run_sweep",
]
