"""Many runs: variants of an experiment times seeds, each run in a process of its own.

Finished runs are skipped, interrupted ones are resumed, and a failure does not stop the others. No
run outlives its sweep unless the sweep itself is killed.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple, NoReturn, Self

from training.checkpoint import handle_signals, has_checkpoint, restore_signals
from training.components import LARGEST_SEED, check
from training.config import (
    NEUTRAL,
    Experiment,
    as_recorded,
    differing_settings,
    dump_experiment,
    effective,
    experiment_of,
    foreign_classes,
    read_experiment,
    resolved,
)
from training.distributed import usable_cpus
from training.run_dir import (
    CONFIG,
    ENVIRONMENT,
    file_sha256,
    held_by,
    is_finished,
    read_json,
    readable,
    write_json,
    write_text,
)
from training.spelling import did_you_mean, prefixed
from training.yaml_files import read_yaml

Engine = Literal["processes", "slurm", "local"]
JobState = Literal["done", "to do", "running elsewhere", "unreadable"]
Status = Literal[
    "done before", "finished", "failed", "unreadable", "running elsewhere", "stopped", "not started"
]
_KEYS = {"configs", "settings", "variants", "groups", "seeds", "slurm"}
_GROUPS = "groups.json"
_LOGS = "logs"
_PACKAGED = files("training") / "configs" / "sweeps"
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_PAUSE = 0.2  # seconds between polls of a submitit job


@dataclass(frozen=True)
class Sweep:
    """Runs of one comparison: every variant with every seed.

    Runs with one seed see the same class order, mini-batches and augmentation whatever the
    variant, so differences between variants can be paired.

    Parameters
    ----------
    variants
        For each variant, by name, the settings in which it differs.
    seeds
        Seeds of class order and training.
    configs
        Configurations that all runs start from, as ``--config`` of ``loda train``.
    settings
        Settings of all runs; they override the configurations.
    slurm
        Parameters for submitit, such as {timeout_min: 600, gpus_per_node: 1}.
    groups
        For each title, the variants that a report shows together; one may be in several groups.

    Raises
    ------
    ValueError
        If a field is invalid.
    """

    variants: Mapping[str, Mapping[str, Any] | None]
    seeds: Sequence[int]
    configs: Sequence[str] = ()
    settings: Mapping[str, Any] | None = None
    slurm: Mapping[str, Any] | None = None
    groups: Mapping[str, Sequence[str]] | None = None

    def __post_init__(self) -> None:
        variants, groups = self.variants, self.groups
        check(
            isinstance(variants, Mapping)
            and all(isinstance(own, Mapping | None) for own in variants.values())
            and all(map(_is_folder_name, variants))
            and len({name.casefold() for name in variants}) == len(variants) > 0,
            "variants",
            variants,
            "different names (letters, digits, . _ -) with a mapping of settings each",
        )
        check(
            isinstance(self.seeds, Sequence)
            and all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in self.seeds)
            and len(set(self.seeds)) == len(self.seeds) > 0,
            "seeds",
            self.seeds,
            f"a list of different whole numbers from 0 to {LARGEST_SEED}",
        )
        check(_is_list_of_texts(self.configs), "configs", self.configs, "a list of configurations")
        for key in ("settings", "slurm"):
            value = getattr(self, key)
            check(isinstance(value, Mapping | None), key, value, "a mapping")
        check(
            isinstance(groups, Mapping | None)
            and all(isinstance(title, str) and title.strip() for title in groups or {})
            and all(_is_part(names, variants) for names in (groups or {}).values()),
            "groups",
            groups,
            "lists of different variants of the sweep, each under a title",
        )


class Job(NamedTuple):
    """One run of a sweep."""

    name: str
    experiment: Experiment
    folder: Path


class Outcome(NamedTuple):
    """Outcome of a run: its status, its log file and, if there is one, a reason."""

    job: Job
    status: Status
    log: Path
    reason: str = ""


class UnreadableRunError(ValueError):
    """A run is finished, but its config.yaml cannot be read."""


def packaged_sweeps() -> list[str]:
    """Names of the sweeps in the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _PACKAGED.iterdir())


def read_sweep(source: str | Path) -> Sweep:
    """Read a sweep from a YAML file, or a packaged one by its name.

    Raises
    ------
    ValueError
        If there is no such sweep, or the file does not hold one, or holds a key twice.
    """
    path = Path(source)
    if not path.is_file():
        if str(source) not in packaged_sweeps():
            known = packaged_sweeps()
            cure = did_you_mean(str(source), known) or f"; packaged are {', '.join(known)}"
            msg = f"a sweep must be a YAML file or the name of a packaged one, got {source}{cure}"
            raise ValueError(msg)
        path = Path(str(_PACKAGED / f"{source}.yaml"))
    content = read_yaml(path)
    if not isinstance(content, dict) or not {"variants", "seeds"} <= set(content) <= _KEYS:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        msg = (
            f"{path}: a sweep must have variants and seeds, and may have configs, settings, groups "
            f"and slurm, got {keys}"
        )
        raise ValueError(msg)
    variants = content["variants"]
    if _is_list_of_texts(variants):
        # Plain names are names of methods.
        content["variants"] = {name: {"method": {"name": name}} for name in variants}
    with prefixed(path):
        return Sweep(**content)


def write_groups(out: Path, groups: Mapping[str, Sequence[str]] | None) -> None:
    """Put the groups of a sweep into its folder; a sweep without groups leaves what is there."""
    if groups:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / _GROUPS, {title: list(names) for title, names in groups.items()})


def read_groups(out: Path) -> dict[str, list[str]]:
    """The groups of the sweep in a folder, in the order of its file; empty where it has none.

    Raises
    ------
    ValueError
        If the file holds no lists of names by title.
    """
    path = out / _GROUPS
    if not path.is_file():
        return {}
    content = read_json(path)
    with readable(path):
        return {title: [str(name) for name in names] for title, names in content.items()}


def plan(
    sweep: Sweep, out: Path, extra: Sequence[str] = (), *, only: Sequence[str] | None = None
) -> list[Job]:
    """The runs of a sweep, their settings checked; seeds change slowest.

    A run goes to ``out/VARIANT/seedN``. ``extra`` are further arguments of ``loda train`` for every
    run; ``only`` are the variants to run, all by default.

    Raises
    ------
    ValueError
        If there is no such variant, settings of one are wrong, or a run's folder holds a run of
        other settings. A finished run that cannot be read does not raise here: it is reported as
        failed when its turn comes.
    """
    unknown = sorted(set(only or ()) - set(sweep.variants))
    if unknown:
        names = ", ".join(sweep.variants)
        msg = f"variants must be among {names}, got {', '.join(unknown)}"
        raise ValueError(msg)
    chosen = [name for name in sweep.variants if only is None or name in only]
    variants = {name: _experiment(sweep, name, extra) for name in chosen}
    jobs = []
    for seed in sweep.seeds:
        for name, experiment in variants.items():
            folder = out / name / f"seed{seed}"
            own = replace(experiment, seed=seed, out=str(folder))
            jobs.append(Job(f"{name}, seed {seed}", own, folder))
            job_state(jobs[-1])
    return jobs


def _experiment(sweep: Sweep, name: str, extra: Sequence[str]) -> Experiment:
    configs = [f"--config={config}" for config in sweep.configs]
    given = [sweep.settings or {}, sweep.variants[name] or {}]
    fixed = [key for layer in given for key in layer if key in ("seed", "out")]
    fixed += [x for x in extra if x.partition("=")[0] in ("--seed", "--out")]
    with prefixed(f"variant {name}"):
        if fixed:
            msg = f"{', '.join(fixed)}: the sweep sets seeds and folders itself; leave it out"
            raise ValueError(msg)
        # The command line overrides the common settings of the sweep, not what defines a variant.
        return experiment_of(configs, given[0], extra, given[1])


def job_state(job: Job) -> JobState:
    """State of the run of a job.

    Raises
    ------
    ValueError
        If the folder holds a finished run of other settings.
    """
    try:
        if finished(job):
            return "done"
    except UnreadableRunError:
        return "unreadable"
    return "to do" if held_by(job.folder) is None else "running elsewhere"


def finished(job: Job) -> bool:
    """Whether the run of a job is in its folder already.

    Raises
    ------
    UnreadableRunError
        If the folder holds a finished run whose settings cannot be read.
    ValueError
        If the folder holds a finished run of other settings.
    """
    if not is_finished(job.folder):
        return False
    _require_same(job, "a finished run", {*NEUTRAL, "device", "threads", "tracker"})
    return True


def can_resume(job: Job) -> bool:
    """Whether the folder of a job holds an unfinished run with its settings and a checkpoint.

    It is resumed with the settings that it was started with; those that do not affect what is
    learned may differ.

    Raises
    ------
    ValueError
        If an unfinished run with other settings is there, or one whose settings cannot be read. It
        could still be resumed, so it is not replaced.
    """
    begun = (job.folder / CONFIG).is_file() and not is_finished(job.folder)
    if not begun or not has_checkpoint(job.folder):
        return False
    # A resumed run looks for its data in the old place.
    _require_same(job, "an unfinished run", {*NEUTRAL} - {"data.root"})
    return True


def _require_same(job: Job, what: str, ignored: Collection[str]) -> None:
    """Raise if the run in the folder of a job has other settings, or ones that cannot be read."""
    done = is_finished(job.folder)
    try:
        recorded = read_experiment(job.folder / CONFIG)
        given = as_recorded(resolved(effective(job.experiment)))
        differing = differing_settings(resolved(recorded), given)
    except (ValueError, OSError) as error:
        msg = f"{job.folder} holds {what} that cannot be read ({error}): move it away"
        raise (UnreadableRunError if done else ValueError)(msg) from error
    differing = [name for name in differing if name not in ignored]
    if done and "backbone.weights" in differing and _same_weights(job):
        differing.remove("backbone.weights")
    if differing:
        msg = (
            f"{job.folder} holds {what} with other values of {', '.join(differing)}: give "
            "another --out, or move that run away"
        )
        raise ValueError(msg)


def _same_weights(job: Job) -> bool:
    """Whether the file of weights has the content that the run in the folder recorded."""
    path = Path(job.experiment.backbone.options.get("weights") or "").expanduser()
    if not path.is_file() or not (job.folder / ENVIRONMENT).is_file():
        return False
    recorded = read_json(job.folder / ENVIRONMENT).get("backbone", {}).get("weights_sha256")
    return recorded is not None and recorded == _digest(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _digest(path: Path, modified: int) -> str:
    """Hash of a file, cached because many runs ask for the same one."""
    del modified
    return file_sha256(path)


def run_sweep(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 1,
    engine: Engine = "processes",
    slurm: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = print,
    children: "Children | None" = None,
) -> list[Outcome]:
    """Run every job that is not done yet, each in a process of its own.

    An unfinished run is resumed from its newest checkpoint. A failed run leaves its log, and the
    others continue. A run held by another process is left to it, and checked once more at the end.
    SIGTERM, SIGHUP or Ctrl-C stop the runs, which save themselves first.

    Parameters
    ----------
    jobs, out
        As for :func:`plan`; logs go to ``out/logs``. The outcomes are in the order of the jobs.
    workers
        Runs at a time on this machine; the cores are shared out evenly.
    engine
        ``processes`` (on this machine), ``slurm`` (submitit, on a cluster: one job per run, with
        the parameters ``slurm``) or ``local`` (submitit without a cluster).
    tell
        Called with one line whenever a run ends.
    children
        Starts the processes on this machine.

    Raises
    ------
    ModuleNotFoundError
        If the engine is not installed.
    ValueError
        If there is no cluster, or its parameters are wrong.
    """

    def told(outcome: Outcome) -> Outcome:
        tell(f"{outcome.job.name}: {outcome.status}{_hint(outcome)}")
        return outcome

    with children or Children() as children:
        if engine == "processes":
            outcomes = _run_here(jobs, out, workers, children, told)
            elsewhere = [o.job for o in outcomes if o.status == "running elsewhere"]
            if elsewhere and len(elsewhere) < len(jobs) and children.stopped is None:
                again = _run_here(elsewhere, out, workers, children, told)
                newer = {o.job.folder: o for o in again}
                outcomes = [newer.get(o.job.folder, o) for o in outcomes]
        else:
            outcomes = list(map(told, _submitted(jobs, out, engine, slurm or {}, children)))
        if children.stopped is not None:
            children.leave()
    return outcomes


def summarise(outcomes: Sequence[Outcome]) -> tuple[list[str], list[str]]:
    """Summary of a sweep: lines about successes, and lines about failures."""

    def line(title: str, *kinds: Status) -> list[str]:
        names = [
            outcome.job.name for kind in kinds for outcome in outcomes if outcome.status == kind
        ]
        return [f"{title}: {'; '.join(names)}"] if names else []

    done = sum(outcome.status in ("done before", "finished") for outcome in outcomes)
    told = [f"{done} of {len(outcomes)} runs are done"]
    told += line("running elsewhere", "running elsewhere")
    # A job may be stopped by the cluster while the sweep continues.
    failures = line("stopped", "stopped", "not started") + line("failed", "failed", "unreadable")
    return told, failures


def run_job(
    job: Job, out: Path, threads: int | None = None, children: "Children | None" = None
) -> Outcome:
    """Run one job in a process of its own, unless it is done; output goes to its log."""
    if children is None:  # in a submitit process, which receives signals itself
        with Children() as own:
            return run_job(job, out, threads, own)
    log = _log(job, out)
    try:
        # Check the lock first: its holder may finish between the two checks.
        owner = held_by(job.folder)
        if owner is not None:
            return Outcome(job, "running elsewhere", log, f"process {owner}")
        if finished(job):
            return Outcome(job, "done before", log)
        return _train(job, log, threads, children)
    except (ValueError, OSError) as error:
        unreadable = isinstance(error, UnreadableRunError)
        return Outcome(job, "unreadable" if unreadable else "failed", log, str(error))


class Children:
    """Starts processes and waits for them; within a ``with`` block, signals are passed on.

    The first SIGINT, SIGTERM or SIGHUP to this process is passed on as SIGTERM, on which a run
    saves itself and ends. The second one is passed on too, and ends it at once.

    Attributes
    ----------
    stopped : signal.Signals or None
        The signal that has arrived.
    """

    def __init__(self) -> None:
        self.stopped: signal.Signals | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = handle_signals(_SIGNALS, self._stop)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:  # running threads must not start another job
            self.stopped = self.stopped or signal.SIGTERM
        self._terminate()
        for child in list(self._running):
            child.wait()
        restore_signals(self._before)

    def run(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], *, append: bool
    ) -> int:
        """Run a command to its end, its output in a log; returns its status."""
        if not append:
            log.write_bytes(b"")
        with log.open("ab") as file:
            child = subprocess.Popen(  # noqa: S603 - our own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                # Ctrl-C reaches a whole group: a run would get it twice, and end unsaved.
                process_group=0 if os.name == "posix" else None,
            )
        self._running.append(child)
        if self.stopped is not None:  # it arrived while the process was started
            child.terminate()
        status = child.wait()
        self._running.remove(child)
        return status

    def leave(self) -> NoReturn:
        """End as the signal asks: KeyboardInterrupt, or SystemExit with its usual status."""
        if self.stopped == signal.SIGINT or self.stopped is None:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.stopped)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.stopped = self.stopped or signal.Signals(number)
        self._terminate()
        # Not by print: the signal may have come in the middle of one.
        text = f"{signal.Signals(number).name}: stopping as soon as every run is saved\n"
        os.write(2, text.encode())

    def _terminate(self) -> None:
        for child in list(self._running):
            child.terminate()


def _train(job: Job, log: Path, threads: int | None, children: Children) -> Outcome:
    log.parent.mkdir(parents=True, exist_ok=True)
    resumed = can_resume(job)
    if resumed:
        arguments = ["--resume", str(job.folder)]
        # The sweep itself names these classes, so they are trusted; the recorded file alone is not.
        arguments += [f"--allow={name}" for name in foreign_classes(job.experiment)]
    else:
        # Of this process: another sweep in the folder may have other settings.
        config = log.with_suffix(f".{os.getpid()}.yaml")
        write_text(config, dump_experiment(job.experiment))
        # The folder belongs to the sweep: an unfinished run that cannot be resumed is overwritten.
        # It may be finished by another sweep while the process starts.
        arguments = ["--config", str(config), "--overwrite-unfinished"]
    environment = dict(os.environ)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    # -P: never import a folder called `training` from the working directory.
    command = [sys.executable, "-P", "-m", "training.cli", "train", *arguments]
    status = children.run(command, log, environment, append=resumed)
    if not resumed:
        config.unlink(missing_ok=True)
    if status == 0:
        return Outcome(job, "finished", log)
    if children.stopped is not None:
        return Outcome(job, "stopped", log)
    owner = held_by(job.folder)
    if owner is not None:  # another process took the run while ours was starting
        return Outcome(job, "running elsewhere", log, f"process {owner}")
    if finished(job):  # it also ended before ours looked at the folder
        return Outcome(job, "done before", log)
    return Outcome(job, "failed", log, _last_line(log))


def _run_here(
    jobs: Sequence[Job],
    out: Path,
    workers: int,
    children: Children,
    told: Callable[[Outcome], Outcome],
) -> list[Outcome]:
    threads = max(1, usable_cpus() // workers)
    broken = threading.Event()

    def run(job: Job) -> Outcome:
        if children.stopped is not None or broken.is_set():
            return Outcome(job, "not started", _log(job, out))
        try:
            return told(run_job(job, out, threads, children))
        except BaseException:
            broken.set()  # before this thread takes the next job, which the pool may not prevent
            raise

    # Threads are enough: each only waits for the process of its run.
    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(run, jobs))
    finally:  # after an error, Children ends the processes that the threads wait for
        pool.shutdown(wait=False, cancel_futures=True)


def _submitted(
    jobs: Sequence[Job], out: Path, engine: Engine, slurm: Mapping[str, Any], children: Children
) -> Iterator[Outcome]:
    try:
        import submitit
    except ModuleNotFoundError as error:
        msg = f"the engine {engine} needs submitit: pip install 'loda[slurm]'"
        raise ModuleNotFoundError(msg) from error
    if engine == "slurm" and shutil.which("srun") is None:
        msg = (
            "the engine slurm needs a SLURM cluster, and there is no srun here: start the sweep "
            "on a machine of the cluster, or use --engine processes"
        )
        raise ValueError(msg)
    executor = submitit.AutoExecutor(folder=out / _LOGS / "cluster", cluster=engine)
    try:
        executor.update_parameters(**slurm)
    except (NameError, TypeError, AssertionError) as error:  # what submitit checks them with
        msg = f"slurm must hold parameters of submitit, got {dict(slurm)}: {error}"
        raise ValueError(msg) from error
    waiting = executor.map_array(run_job, jobs, [out] * len(jobs))
    for job, handle in zip(jobs, waiting, strict=True):
        while not handle.done() and children.stopped is None:
            time.sleep(_PAUSE)
        if children.stopped is not None:
            if engine == "local":  # cluster jobs continue without us
                for other in waiting:
                    other.cancel()
            return
        try:
            yield handle.result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
            yield Outcome(job, "failed", _log(job, out), _last_line(_log(job, out)))


def _log(job: Job, out: Path) -> Path:
    return out / _LOGS / f"{job.folder.parent.name}-{job.folder.name}.log"


def _last_line(log: Path) -> str:
    """The last non-empty line of a log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _hint(outcome: Outcome) -> str:
    if outcome.status == "failed":
        return f" ({outcome.reason}; log: {outcome.log})"
    if outcome.status == "stopped":
        return " (start the sweep again to resume it)"
    return f" ({outcome.reason})" if outcome.reason else ""


def _is_folder_name(name: Any) -> bool:
    """Whether a name of a variant can be that of a folder beside the sweep's own files."""
    return (
        isinstance(name, str)
        and all(c.isalnum() or c in "._-" for c in name)
        and name.casefold() not in ("", ".", "..", _LOGS, _GROUPS)
        and not name.startswith("-")
    )


def _is_part(names: Any, variants: Mapping[str, Any]) -> bool:
    """Whether names is a non-empty list of different variants."""
    return _is_list_of_texts(names) and {*names} <= {*variants} and len({*names}) == len(names) > 0


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
