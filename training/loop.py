"""The training loop, from the configuration to the finished run folder, top to bottom."""

import time
from contextlib import nullcontext
from pathlib import Path

from training.classifiers import add_head, evaluate_task, update_readouts
from training.config import Experiment
from training.data import loader, passes_begun, start_at, train_transform
from training.plots import accuracy_figure
from training.files import flattened, not_finite
from training.fit import fit
from training.monitoring.memory import peak_memory, reset_peak
from training.monitoring.progress import Progress
from training.randomness import derive, seeded
from training.run_folder import FIGURE, begun_experiment, is_finished
from training.setup import Run, prepare
from training.state import stored_bytes


def train(experiment: Experiment, *, quiet: bool = False) -> Path:
    """Run an experiment; returns the folder with its results.

    Parameters
    ----------
    experiment : Experiment
        All settings.
    quiet : bool
        Show no progress bars and no table.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    ValueError, OSError
        If settings, data, weights or the folder are not sound; raised before training starts. An
        OSError later is a full disk, or a process of the loader or of the run that is gone.
    FloatingPointError
        If training diverges; the message says where.
    """
    return _run(prepare(experiment), quiet=quiet)


def resume(path: Path, experiment: Experiment | None = None, *, quiet: bool = False) -> Path:
    """Go on with a run that was interrupted, from its newest sound checkpoint.

    On the CPU of the same machine the result is the same, bit for bit, as without interruption.

    Parameters
    ----------
    path : Path
        The run folder.
    experiment : Experiment, optional
        Its settings, with other folders of data, workers or checkpoints than it began with.
    quiet : bool
        Show no progress bars and no table.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    ValueError, OSError
        If the folder holds no run that can go on, or another process is at it.
    FloatingPointError
        If training diverges.
    """
    if is_finished(path):
        msg = f"the run in {path} is finished: there is nothing to go on with"
        raise ValueError(msg)
    return _run(prepare(experiment or begun_experiment(path), resume=path), quiet=quiet)


def _run(run: Run, *, quiet: bool) -> Path:
    experiment, saver, tasks = run.experiment, run.saver, len(run.stream.tasks)
    catching = saver.stop if experiment.checkpoint.keep else nullcontext()
    try:
        quiet = quiet or not run.processes.writes
        with catching, Progress(tasks, quiet=quiet) as progress:
            saver.restore_progress(progress)
            if not saver.resumes_in_task and run.state.tasks == 0:
                saver.between_tasks(progress)
            for task in range(run.state.tasks, tasks):
                run_task(run, task, progress)
                if task + 1 < tasks:  # after the last one comes the result itself
                    saver.between_tasks(progress)
            if run.processes.writes:
                _finish(run, progress)
    except RuntimeError as error:
        _explain_lost_worker(error, run)
        raise
    finally:
        run.accelerator.end_training()
        run.folder.close()
    progress.table(run.state.matrices[experiment.head.readout], run.folder.path)
    return run.folder.path


def _explain_lost_worker(error: RuntimeError, run: Run) -> None:
    """Raise anew where a process that loads images was killed, by a lack of memory mostly."""
    said = str(error)
    if said.startswith("DataLoader worker"):  # torch has no type of its own for it
        again = f"; loda train --resume {run.folder.path} goes on from the newest checkpoint"
        msg = (
            f"a process that loads images has ended ({' '.join(said.split())}): if memory ran out, "
            f"lower data.workers{again if run.experiment.checkpoint.keep else ''}"
        )
        raise ChildProcessError(msg) from error


def _finish(run: Run, progress: Progress) -> None:
    """Draw the figure and write the results."""
    experiment = run.experiment
    primary = run.state.matrices[experiment.head.readout]
    summary = {
        "readout": experiment.head.readout,
        "readouts": {kind: m.summary() for kind, m in run.state.matrices.items()},
        "counts": {kind: m.to_dict() for kind, m in run.state.matrices.items()},
        "task_given": {kind: m.summary() for kind, m in run.state.task_given.items()},
        "stored_bytes": stored_bytes(run.state),
        "trainable_parameters": progress.trainable,
        "seconds": progress.seconds,
    }
    data = experiment.data.root if experiment.data.name == "folder" else experiment.data.name
    title = (
        f"{experiment.method.name} on {Path(str(data)).name}, read-out {experiment.head.readout}"
    )
    accuracy_figure(primary, run.folder.path / FIGURE, title=title)
    run.folder.finish(run.state, summary)


def run_task(run: Run, task: int, progress: Progress) -> None:
    """Learn one task and evaluate on all tasks so far."""
    experiment, state, config = run.experiment, run.state, run.experiment.train
    classes = run.stream.tasks[task]
    images = run.stream.train.subset(classes)
    augmented = images.with_transform(train_transform(experiment.data))
    passes = loader(
        augmented,
        config.eval_batch_size,
        shuffle=True,
        seed=derive(experiment.seed, task, "moments"),
        workers=experiment.data.workers,
        share=run.processes.share,
        device=run.accelerator.device,
    )
    reset_peak(run.accelerator.device)
    clock = time.perf_counter()
    seconds: dict[str, float] = {}

    # Every pass has augmentations of its own: those of an earlier process count.
    start_at(passes, run.saver.passes, 0)
    if not run.saver.resumes_in_task:
        state.method.begin_task(passes)
        run.saver.passes = passes_begun(passes)
        _agree_on_weights(run)
        add_head(run, task)
        seconds["begin"], clock = _lap(clock)

    with seeded(derive(experiment.seed, task, "dropout")):
        seconds = fit(run, task, progress, seconds)
    clock = time.perf_counter()

    record = state.method.end_task(passes)
    _agree_on_weights(run)
    seconds["end"], clock = _lap(clock)

    update_readouts(run, task)
    seconds["readouts"], clock = _lap(clock)

    evaluate_task(run, task)
    state.tasks, run.saver.passes = task + 1, 0
    seconds["evaluate"], clock = _lap(clock)
    _require_finite(run, task)

    keep = experiment.keep
    run.folder.keep(
        task,
        branches=record.branch_tensors() if record and keep.branches else {},
        moments=record.moment_tensors() if record and keep.moments else {},
        heads=state.heads.state_dict() if keep.heads else {},
        statistics=state.readouts.statistics["statistics"].state_dict() if keep.statistics else {},
    )
    accuracy = {kind: m.curve[-1] for kind, m in state.matrices.items()}
    counts = {kind: [m.correct[-1], m.total[-1]] for kind, m in state.matrices.items()}
    layers = {"layers": record.diagnostics()} if record and record.effects else {}
    memory = peak_memory(run.accelerator.device)
    run.folder.log(
        "task",
        task=task,
        accuracy=accuracy,
        counts=counts,
        seconds=seconds,
        memory=memory,
        **layers,
    )
    tracked = {f"accuracy/{kind}": value for kind, value in accuracy.items()}
    # Where nothing is trained, tasks are steps: of equal ones a tracker shows the last alone.
    run.accelerator.log(tracked, step=(task + 1) * max(config.epochs, 1))
    progress.end_task(task, accuracy[experiment.head.readout], seconds)


def _require_finite(run: Run, task: int) -> None:
    """Stop before anything of a task is written that left NaN or infinite values."""
    classifiers = flattened(classifiers=run.state.readouts.tensors())
    broken = not_finite(run.state.tensors() | classifiers)
    if broken:
        more = f" and {len(broken) - 4} more" if len(broken) > 4 else ""
        msg = (
            f"task {task + 1} left values that are not finite in {', '.join(broken[:4])}{more}; "
            f"nothing of it was saved, the task before it is. Lower train.lr or method.radius"
        )
        raise FloatingPointError(msg)


def _agree_on_weights(run: Run) -> None:
    """Solves of the same moments may round otherwise in another process."""
    model = run.state.model
    run.processes.copy_first([*model.parameters(), *model.buffers()])


def _lap(clock: float) -> tuple[float, float]:
    now = time.perf_counter()
    return round(now - clock, 3), now
