"""One run: ``train``, ``eval`` and ``predict``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from training.commands import Commands, require_run, say


def add_train(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Its settings have a parser of their own, which also prints their help."""
    parser = commands.add_parser("train", help="train on a stream of tasks", add_help=False)
    parser.set_defaults(act=train, takes_settings=True)


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add ``eval`` and ``predict``."""
    parser = commands.add_parser("eval", help="evaluate the saved model of a run again")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--root", help="where the data are now, if they moved since the training")
    parser.set_defaults(act=evaluate)
    parser = commands.add_parser("predict", help="classify images with the model of a run")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=int, default=3, help="classes an image (default: 3)")
    parser.set_defaults(act=predict)


def train(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Train, or go on with a run."""
    del arguments
    resuming = argparse.ArgumentParser(prog="loda train", add_help=False, allow_abbrev=False)
    resuming.add_argument("--resume", type=Path, metavar="RUN")
    found, settings = resuming.parse_known_args(rest)
    if found.resume is not None:
        _resume(found.resume, settings)
        return
    from training.config import load_experiment

    # Settings first: help and mistakes need not wait for torch to be imported.
    experiment = load_experiment(rest)
    from training.finished.kept import keeps_nothing
    from training.train import train as run_experiment

    if _first():
        say(f"loda train: {note}" for note in keeps_nothing(experiment))
    run_experiment(experiment)


def evaluate(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Evaluate the saved model of a run."""
    del rest
    require_run(arguments.run)
    from training.finished.evaluate import evaluate_run

    for kind, result in evaluate_run(arguments.run, root=arguments.root).items():
        tasks = "  ".join(f"{100 * share:.2f}" for share in result["by_task"])
        right, total = sum(result["correct"]), sum(result["total"])
        print(f"{kind}: accuracy {100 * result['accuracy']:.2f} % ({right} of {total} images)")
        print(f"  by task: {tasks}")


def predict(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Classify images."""
    del rest
    require_run(arguments.run)
    from training.finished.inference import load_classifier

    classifier = load_classifier(arguments.run)
    top = min(arguments.top, len(classifier.classes))
    found_by_image = classifier.predict(arguments.images, top=top)
    for path, found in zip(arguments.images, found_by_image, strict=True):
        ranked = ", ".join(f"{prediction.name} {prediction.score:.3f}" for prediction in found)
        print(f"{path}: {ranked}")


def _first() -> bool:
    """Whether this is the process of a run that writes and talks."""
    return os.environ.get("RANK", "0") == "0"


def _resume(run: Path, argv: Sequence[str]) -> None:
    require_run(run)
    from training.config import as_recorded, differing_settings, load_experiment
    from training.config.neutral import FREE
    from training.presets import effective
    from training.run_dir import CONFIG, begun_experiment, is_finished, tidy

    recorded = begun_experiment(run)
    given = load_experiment([f"--config={run / CONFIG}", *argv])
    found = differing_settings(as_recorded(effective(given)), recorded)
    if differing := [name for name in found if name not in FREE]:
        msg = (
            f"{run} was begun with other settings ({', '.join(differing)} differ): go on with it "
            f"without them, or begin another run"
        )
        raise ValueError(msg)
    if is_finished(run):
        if _first():
            tidy(run)
        print(f"the run in {run} is finished")
        return
    from training.train import resume

    resume(run, given)
