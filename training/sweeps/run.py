"""Running a sweep: each run in a process of its own, by joblib here or submitit on a cluster."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from training.config import dump_experiment
from training.distributed import usable_cpus
from training.run_dir import held_by, write_text
from training.sweeps.children import Children
from training.sweeps.jobs import (
    Job,
    UnreadableRunError,
    can_go_on,
    finished,
    require_replaceable,
)

Engine = Literal["processes", "slurm", "local"]
Status = Literal[
    "done before",
    "finished",
    "failed",
    "unreadable",
    "running elsewhere",
    "stopped",
    "not started",
]
_PAUSE = 0.2  # seconds between two looks at a job of submitit's


class Outcome(NamedTuple):
    """What became of a run, where its output is, and what there is to say of it."""

    job: Job
    status: Status
    log: Path
    reason: str = ""


def run_sweep(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 1,
    engine: Engine = "processes",
    slurm: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run every job that is not done yet, each in a process of its own.

    A run that was begun and not finished goes on from its newest checkpoint. A failed run leaves
    its log, and the others go on. A run that another process is at is left to it, and looked at
    once more in the end. SIGTERM, SIGHUP or Ctrl-C stop the runs, which save themselves first.

    Parameters
    ----------
    jobs : sequence of Job
        As :func:`plan` gives them.
    out : Path
        Folder of the sweep; logs go to ``out/logs``.
    workers : int
        Runs at a time on this machine; the cores are shared out evenly.
    engine : str
        ``processes`` (joblib, on this machine), ``slurm`` (submitit, on a cluster: a job a run)
        or ``local`` (submitit without a cluster).
    slurm : mapping, optional
        Parameters of the cluster jobs.
    tell : callable
        Receives a line as runs end.

    Returns
    -------
    list of Outcome
        In the order of the jobs.

    Raises
    ------
    ModuleNotFoundError
        If the engine is not installed.
    ValueError
        If there is no cluster, or its parameters are wrong.
    """

    def told(outcome: Outcome) -> Outcome:
        tell(f"{outcome.job.name}: {outcome.status}" + _hint(outcome))
        return outcome

    with Children() as children:
        if engine == "processes":
            found = _side_by_side(jobs, out, workers, children, told)
            elsewhere = [o.job for o in found if o.status == "running elsewhere"]
            if elsewhere and len(elsewhere) < len(jobs) and children.stopped is None:
                again = _side_by_side(elsewhere, out, workers, children, told)
                newer = {o.job.folder: o for o in again}
                found = [newer.get(o.job.folder, o) for o in found]
        else:
            found = list(map(told, _submitted(jobs, out, engine, slurm or {}, children)))
        if children.stopped is not None:
            children.leave()
    return found


def run_job(
    job: Job, out: Path, threads: int | None = None, children: Children | None = None
) -> Outcome:
    """Run one job in a process of its own, unless it is done; output goes to its log."""
    if children is None:  # in a process of submitit's, which gets signals of its own
        with Children() as own:
            return run_job(job, out, threads, own)
    log = _log(job, out)
    try:
        # The lock first: whoever held it may be done by the time of the second look.
        owner = held_by(job.folder)
        if owner is not None:
            return Outcome(job, "running elsewhere", log, f"process {owner}")
        if finished(job):
            return Outcome(job, "done before", log)
        return _train(job, log, threads, children)
    except UnreadableRunError as error:
        return Outcome(job, "unreadable", log, str(error))
    except (ValueError, OSError) as error:
        return Outcome(job, "failed", log, str(error))


def _train(job: Job, log: Path, threads: int | None, children: Children) -> Outcome:
    log.parent.mkdir(parents=True, exist_ok=True)
    resumed = can_go_on(job)
    if resumed:
        what = ["--resume", str(job.folder)]
    else:
        require_replaceable(job)
        # The folder is the sweep's own: what a run left there that cannot go on is replaced.
        config = log.with_suffix(".yaml")
        write_text(config, dump_experiment(replace(job.experiment, overwrite=True)))
        what = ["--config", str(config)]
    environment = dict(os.environ)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    # -P: a folder called training where the sweep was started is not ours.
    command = [sys.executable, "-P", "-m", "training.cli", "train", *what]
    status = children.run(command, log, environment, append=resumed)
    if status == 0:
        return Outcome(job, "finished", log)
    if children.stopped is not None:
        return Outcome(job, "stopped", log)
    owner = held_by(job.folder)
    if owner is not None:  # it began there while the process was started here
        return Outcome(job, "running elsewhere", log, f"process {owner}")
    return Outcome(job, "failed", log, _last_line(log))


def _side_by_side(
    jobs: Sequence[Job],
    out: Path,
    workers: int,
    children: Children,
    told: Callable[[Outcome], Outcome],
) -> list[Outcome]:
    from joblib import Parallel, delayed

    threads = max(1, usable_cpus() // workers)

    def one(job: Job) -> Outcome:
        if children.stopped is not None:
            return Outcome(job, "not started", _log(job, out))
        return told(run_job(job, out, threads, children))

    # Threads are enough: each only waits for the process of its run.
    found: list[Outcome] = Parallel(n_jobs=workers, backend="threading")(
        delayed(one)(job) for job in jobs
    )
    return found


def _submitted(
    jobs: Sequence[Job], out: Path, engine: Engine, slurm: Mapping[str, Any], children: Children
) -> Iterator[Outcome]:
    try:
        import submitit
    except ModuleNotFoundError as error:
        msg = "the engine slurm needs submitit: pip install 'loda[slurm]'"
        raise ModuleNotFoundError(msg) from error
    if engine == "slurm" and shutil.which("srun") is None:
        msg = (
            "the engine slurm needs a SLURM cluster, and there is no srun here: start the sweep "
            "on a machine of the cluster, or use --engine processes"
        )
        raise ValueError(msg)
    executor = submitit.AutoExecutor(folder=out / "logs" / "cluster", cluster=engine)
    try:
        executor.update_parameters(**slurm)
    except (NameError, TypeError, AssertionError) as error:  # what submitit checks them with
        msg = f"slurm is {dict(slurm)}, which submitit does not take: {error}"
        raise ValueError(msg) from error
    waiting = executor.map_array(run_job, jobs, [out] * len(jobs))
    for job, handle in zip(jobs, waiting, strict=True):
        while not handle.done() and children.stopped is None:
            time.sleep(_PAUSE)
        if children.stopped is not None:
            if engine == "local":  # jobs of a cluster go on without us
                for other in waiting:
                    other.cancel()
            return
        try:
            yield handle.result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
            yield Outcome(job, "failed", _log(job, out), _last_line(_log(job, out)))


def _log(job: Job, out: Path) -> Path:
    return out / "logs" / f"{job.folder.parent.name}-{job.folder.name}.log"


def _last_line(log: Path) -> str:
    """The last line of a log that says anything."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _hint(outcome: Outcome) -> str:
    if outcome.status == "failed":
        return f" ({outcome.reason}; log: {outcome.log})"
    if outcome.status == "stopped":
        return " (the sweep goes on with it when started again)"
    return f" ({outcome.reason})" if outcome.reason else ""
