"""One more task, or several, on a finished run.

The new run continues from the state of the old one (`training.state`), in a folder of its own; the
old one is only read. Its configuration declares the classes of both, in the order of learning, so
it is also that of the same run without the interruption.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from training.checkpoint import Checkpoint, read_final_state
from training.components import at_least
from training.config import FREE, Experiment, begun_experiment, differing_settings, foreign_classes
from training.data import DataConfig, Stream
from training.data.datasets import DATA_SETS
from training.methods.base import fact
from training.run_dir import (
    CLASSES,
    CONFIG,
    ENVIRONMENT,
    Overwrite,
    is_finished,
    read_json,
    readable,
    require_intact,
)
from training.spelling import some
from training.train import prepare, run_to_end

MAY_CHANGE = (*FREE, "device", "threads", "tracker", "keep.state")
"""Settings that an extension may change: where data are, how it runs, what else it leaves."""


def extend(
    run: str | Path,
    photos: str | Path | None = None,
    *,
    increment: int | None = None,
    tasks: int | None = None,
    out: str | Path | None = None,
    experiment: Experiment | None = None,
    overwrite: Overwrite = False,
    allow: Collection[str] = (),
    quiet: bool = False,
) -> Path:
    """Learn one more task, or several, on a finished run.

    Parameters
    ----------
    run : str or Path
        A finished run, trained with ``keep.state`` (the default). It is only read.
    photos : str or Path, optional
        A folder of class folders, with ``train/`` and ``test/`` or without. Folders with new names
        are new classes; images in the others update the statistics of the classes of that name,
        as far as the read-outs keep any. Without it, the stream of the run itself goes on, if
        ``data.tasks`` has cut it short.
    increment : int, optional
        Number of new classes of a task, the last one may have fewer; by default one task of all
        of them.
    tasks : int, optional
        Without ``photos``: the number of further tasks; by default all that are left.
    out : str or Path, optional
        Folder of the new run; by default beside the old one, ``RUN-extended-1``, then ``-2``.
    experiment : Experiment, optional
        The settings of the run, where some of `MAY_CHANGE` differ from the recorded ones.
    overwrite : bool or "unfinished"
        Replace the run in ``out``: any, or only one without results.
    allow : collection of str
        Import paths of classes of other packages that the run may load.
    quiet : bool
        Print nothing.

    Returns
    -------
    Path
        The folder of the new run, which has the files of any run, and can be extended in its turn.

    Raises
    ------
    ValueError, OSError
        If the run cannot be extended, by its method say, or there is nothing to learn; nothing
        has been written then.
    FloatingPointError
        If training diverges.

    Notes
    -----
    On the CPU of one machine, with the same versions and number of threads, the new run is the
    same, bit for bit, as ``loda train --config OUT/config.yaml`` on all images from the beginning.
    What differs is printed, and recorded in ``environment.json`` under ``extends``.
    """
    folder = Path(run)
    longer = extended_experiment(
        folder,
        photos,
        increment=increment,
        tasks=tasks,
        out=out,
        experiment=experiment or begun_experiment(folder, allow),
    )
    origin = FinishedRun.read(folder, longer)
    return run_to_end(prepare(longer, overwrite=overwrite, origin=origin), quiet=quiet)


def extended_experiment(
    run: Path,
    photos: str | Path | None,
    *,
    experiment: Experiment,
    increment: int | None = None,
    tasks: int | None = None,
    out: str | Path | None = None,
) -> Experiment:
    """The settings of a finished run with the tasks that are added; see `extend`.

    Raises
    ------
    ValueError, OSError
        If the run cannot be extended, or there is nothing to learn.
    """
    if not is_finished(run):
        msg = f"{run} holds no finished run: only a finished run can be extended"
        raise ValueError(msg)
    require_intact(run, CONFIG, CLASSES, ENVIRONMENT)
    if fact(experiment.method.kind, "joins_tasks"):
        msg = (
            f"method {experiment.method.name} learns all tasks as one, so none can be added: train "
            "again on all images"
        )
        raise ValueError(msg)
    changed = differing_settings(experiment, begun_experiment(run, foreign_classes(experiment)))
    refused = [name for name in changed if name not in MAY_CHANGE]
    if refused:
        msg = (
            f"{run} was trained with other values of {', '.join(refused)}: an extension "
            f"may change {', '.join(MAY_CHANGE)} only"
        )
        raise ValueError(msg)
    if photos is None:
        data = _further_tasks(experiment.data, tasks, increment)
    else:
        if tasks is not None:
            msg = (
                f"tasks must be left out with a folder of photos, got {tasks}; increment cuts its "
                "classes into tasks"
            )
            raise ValueError(msg)
        data = _with_photos(experiment.data, run, photos, increment)
    folder = _beside(run) if out is None else Path(out).expanduser()
    if folder.resolve() == run.resolve():
        msg = f"out must be another folder than {run}, which is only read: leave --out out"
        raise ValueError(msg)
    return replace(experiment, data=data, out=str(folder))


def _beside(run: Path) -> Path:
    """The folder of the next extension: ``RUN-extended-1``, and ``-2`` after that.

    Examples
    --------
    >>> _beside(Path("runs/mine")).as_posix(), _beside(Path("runs/mine-extended-9")).as_posix()
    ('runs/mine-extended-1', 'runs/mine-extended-10')
    """
    named = run if run.name not in ("", "..") else run.resolve()
    stem, _, number = named.name.rpartition("-extended-")
    if stem and number.isdecimal():
        return named.with_name(f"{stem}-extended-{int(number) + 1}")
    return named.with_name(f"{named.name}-extended-1")


def _further_tasks(data: DataConfig, tasks: int | None, increment: int | None) -> DataConfig:
    """The settings of a stream that goes on where ``data.tasks`` has cut it short."""
    if increment is not None:
        msg = f"increment must be left out without a folder of photos, got {increment}"
        raise ValueError(msg)
    if data.tasks is None:
        msg = "all tasks of the stream are learned: give a folder of new photos"
        raise ValueError(msg)
    at_least("tasks", tasks, 1)
    return replace(data, tasks=None if tasks is None else data.tasks + tasks)


def _with_photos(
    data: DataConfig, run: Path, photos: str | Path, increment: int | None
) -> DataConfig:
    """The settings of the stream of a run that goes on with the classes of a folder."""
    at_least("increment", increment, 1)
    root = Path(photos).expanduser().absolute()
    classes = DATA_SETS.build("folder", {"root": str(root)}).load("train").classes
    with readable(run / CLASSES):
        content = read_json(run / CLASSES)
        names = [str(name) for name in content["class_names"]]
        sizes = [len(task) for task in content["tasks"]]
    new = [name for name in classes if name not in set(names)]
    step = increment or max(len(new), 1)
    cut = [len(new[first : first + step]) for first in range(0, len(new), step)]
    return replace(
        data,
        classes=None,
        tasks=None,
        class_order=[*names, *new],
        task_sizes=[*sizes, *cut],
        extensions=[*data.extensions, str(root)],
        extension_tasks=[*data.extension_tasks, len(cut)],
    )


@dataclass
class FinishedRun:
    """The run that is extended, as `training.train.prepare` takes it."""

    path: Path
    experiment: Experiment  # of the new run
    classes: dict[str, Any]
    environment: dict[str, Any]
    checkpoint: Checkpoint

    @classmethod
    def read(cls, path: Path, experiment: Experiment) -> Self:
        """Read a finished run.

        Raises
        ------
        FileNotFoundError
            If it did not keep its state.
        ValueError
            If a file is damaged, or not as the run wrote it.
        """
        require_intact(path, CONFIG, CLASSES, ENVIRONMENT)
        classes, environment = read_json(path / CLASSES), read_json(path / ENVIRONMENT)
        return cls(path, experiment, classes, environment, read_final_state(path))

    def lineage(self, stream: Stream, environment: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The runs that the new one extends, this one last, and what differs.

        Raises
        ------
        ValueError
            If the stream does not begin with the tasks of the run, or adds nothing.
        """
        with readable(self.path / CLASSES):
            names = list(self.classes["class_names"])
            tasks = [tuple(task) for task in self.classes["tasks"]]
        if (stream.class_names[: len(names)], stream.tasks[: len(tasks)]) != (names, tasks):
            msg = f"the classes of the data set have changed since {self.path} was trained"
            raise ValueError(msg)
        known = len(stream.extensions[-1].known) if stream.extensions else 0
        if len(stream.tasks) == len(tasks) and not known:
            place = self.experiment.data.extensions[-1:] or ["the stream"]
            msg = f"there is nothing to learn: {place[0]} holds no new class and no new image"
            raise ValueError(msg)
        with readable(self.path / ENVIRONMENT):
            notes = [
                *self._of_the_order(stream, tasks),
                *self._of_known_images(stream),
                *self._of_old_images(stream, names, tasks),
                *self._of_the_machine(environment),
            ]
            own = {key: self.environment[key] for key in ("started", "threads", "packages")}
            before = list(self.environment.get("extends", []))
        own |= {"run": str(self.path.absolute()), "tasks": len(tasks), "notes": notes}
        return [*before, own]

    def _of_the_order(self, stream: Stream, tasks: Sequence[Sequence[int]]) -> Iterator[str]:
        added = stream.tasks[len(tasks) :]
        if not added:
            return
        classes = [stream.class_names[label] for task in added for label in task]
        if self.experiment.data.extensions and self.experiment.data.shuffle:
            yield (
                f"the new classes ({some(classes)}) come after the old ones; a run of all classes "
                "at once would draw another order, unless it has this one as data.class_order"
            )
        method = self.experiment.method.build()
        if fact(method, "uses_task_count"):
            yield (
                f"{self.experiment.method.name} depends on the number of tasks: the old ones were "
                f"learned as part of {len(tasks)}, the new ones are as part of {len(stream.tasks)}"
            )

    def _of_known_images(self, stream: Stream) -> Iterator[str]:
        known = stream.extensions[-1].known if stream.extensions else None
        if known is None or not len(known):
            return
        classes = [stream.class_names[label] for label in sorted(set(known.labels.tolist()))]
        updated = [readout.name for readout in self.experiment.head.build() if readout.gathers]
        effect = (
            f"they update the statistics of {', '.join(updated)}; the model and the heads are not "
            "trained on them"
            if updated
            else "they change nothing: no read-out of the run keeps statistics of its classes"
        )
        yield f"{len(known)} new images of known classes ({some(classes)}): {effect}"
        if stream.missing:
            reasons = ", ".join(reason.partition(";")[0] for reason in stream.missing)
            yield (
                "images among them that were learned before cannot be recognised, and count "
                f"twice: {reasons}"
            )

    def _of_old_images(
        self, stream: Stream, names: Sequence[str], tasks: Sequence[tuple[int, ...]]
    ) -> Iterator[str]:
        present = set(stream.test.labels.tolist())
        lacking = [name for label, name in enumerate(names) if label not in present]
        if lacking:
            reason = "".join(f" ({reason})" for reason in stream.missing)
            yield (
                f"no test images are there of the old classes {some(lacking)}{reason}"
                + (": accuracies are over the other classes" if present else "")
            )
            return
        count = max(len(stream.extensions) - 1, 0)
        with readable(self.path / CLASSES):
            then = replace(
                stream,
                class_names=list(names),
                tasks=list(tasks),
                order=list(self.classes["order"]),
                test=stream.evaluated(len(tasks), count),
            )
        if then.test_record() != self.classes.get("test"):
            yield (
                f"the test images of the old classes are not those that {self.path} was evaluated "
                "on: some may have been trained on"
            )

    def _of_the_machine(self, environment: Mapping[str, Any]) -> Iterator[str]:
        then, now = self.environment, environment
        pairs = [(key, then[key], now[key]) for key in ("processor", "gpu", "threads")]
        pairs += [(key, then["packages"].get(key), x) for key, x in now["packages"].items()]
        changed = [f"{key} {old} there, {new} here" for key, old, new in pairs if old != new]
        if changed:
            yield f"rounding may differ from that of {self.path}: {', '.join(changed)}"
