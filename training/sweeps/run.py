"""Running a sweep: each run in a process of its own, by joblib here or submitit on a cluster."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, Literal, NamedTuple

from training.config import dump_experiment
from training.files import write_text
from training.sweeps.jobs import Job, can_go_on, finished

Engine = Literal["processes", "slurm", "local"]
Status = Literal["done before", "finished", "failed", "not started"]


class Outcome(NamedTuple):
    """What became of a run, and where its output is."""

    job: Job
    status: Status
    log: Path


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
    its log, and the others go on.

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
    """
    threads = max(1, (os.cpu_count() or 1) // workers) if engine == "processes" else None
    stop = Event()

    def one(job: Job) -> Outcome:
        if stop.is_set():
            return Outcome(job, "not started", _log(job, out))
        outcome = run_job(job, out, threads)
        tell(f"{job.name}: {outcome.status}" + _hint(outcome))
        return outcome

    try:
        if engine == "processes":
            from joblib import Parallel, delayed

            # Threads are enough: each only waits for the process of its run.
            found: list[Outcome] = Parallel(n_jobs=workers, backend="threading")(
                delayed(one)(job) for job in jobs
            )
            return found
        return list(_submitted(jobs, out, engine, slurm or {}, tell))
    except KeyboardInterrupt:
        stop.set()
        raise


def run_job(job: Job, out: Path, threads: int | None = None) -> Outcome:
    """Run one job in a process of its own, unless it is done; output goes to its log."""
    log = _log(job, out)
    log.parent.mkdir(parents=True, exist_ok=True)
    if finished(job):
        return Outcome(job, "done before", log)
    resumed = can_go_on(job)
    if resumed:
        what = ["--resume", str(job.folder)]
    else:
        # The folder is the sweep's own: what a run left there that cannot go on is replaced.
        config = log.with_suffix(".yaml")
        write_text(config, dump_experiment(replace(job.experiment, overwrite=True)))
        what = ["--config", str(config)]
    environment = dict(os.environ)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    # -P: a folder called training where the sweep was started is not ours.
    command = [sys.executable, "-P", "-m", "training.cli", "train", *what]
    with log.open("a" if resumed else "w", encoding="utf-8") as file:
        done = subprocess.run(  # noqa: S603 - our own command on a file that was just written
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    return Outcome(job, "failed" if done.returncode else "finished", log)


def _submitted(
    jobs: Sequence[Job],
    out: Path,
    engine: Engine,
    slurm: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Iterator[Outcome]:
    try:
        import submitit
    except ModuleNotFoundError as error:
        msg = "the engine slurm needs submitit: pip install 'loda[slurm]'"
        raise ModuleNotFoundError(msg) from error
    executor = submitit.AutoExecutor(folder=out / "logs" / "cluster", cluster=engine)
    executor.update_parameters(**slurm)
    waiting = executor.map_array(run_job, jobs, [out] * len(jobs))
    for job, handle in zip(jobs, waiting, strict=True):
        try:
            outcome = handle.result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
            outcome = Outcome(job, "failed", _log(job, out))
        tell(f"{job.name}: {outcome.status}" + _hint(outcome))
        yield outcome


def _log(job: Job, out: Path) -> Path:
    return out / "logs" / f"{job.folder.parent.name}-{job.folder.name}.log"


def _hint(outcome: Outcome) -> str:
    if outcome.status != "failed":
        return ""
    lines = outcome.log.read_text(encoding="utf-8").splitlines() if outcome.log.is_file() else []
    return f" ({lines[-1] if lines else 'no output'}; log: {outcome.log})"
