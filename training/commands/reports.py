"""Finished runs: ``report``, ``bundle`` and ``analyse``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from training.commands import Commands, say

_SOURCES = "run folders, folders that hold runs, or files of loda bundle"


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add ``report``, ``bundle`` and ``analyse``."""
    parser = commands.add_parser(
        "report", help="compare finished runs: tables, figures, and a page that holds them all"
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help=_SOURCES)
    parser.add_argument("--out", type=Path, help="write everything to this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the report in --out")
    parser.add_argument("--figure", type=Path, help="draw accuracy over tasks to this PNG or SVG")
    parser.add_argument("--against", help="whose lead over the others is given (default: loda)")
    parser.add_argument("--baseline", help="relative to whom accuracies are drawn")
    parser.set_defaults(act=report)
    parser = commands.add_parser(
        "bundle", help="write what a report needs of finished runs to one text file, to share it"
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help=_SOURCES)
    parser.add_argument("--out", type=Path, required=True, help="the file, FILE.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace the bundle in --out")
    parser.set_defaults(act=bundle)
    parser = commands.add_parser(
        "analyse", help="compute what the report's figures of LoDA need from what a run kept"
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished runs of LoDA")
    parser.add_argument(
        "--parts", nargs="+", choices=("subspaces", "losses"), default=("subspaces", "losses")
    )
    parser.add_argument(
        "--tasks", type=int, nargs="+", help="take losses of these (default: 2, middle and last)"
    )
    parser.add_argument("--points", type=int, default=16, help="steps from 0 to 1.5 (default: 16)")
    parser.add_argument("--root", help="where the data are now, if they moved since the training")
    parser.set_defaults(act=analyse)


def report(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print a report, or write it."""
    del rest
    from training.report import Report, comparison_curves, write_report

    made = Report.over(arguments.runs, against=arguments.against, baseline=arguments.baseline)
    if arguments.out is None:
        print(made.markdown(), end="")
    else:
        print(f"report: {write_report(made, arguments.out, overwrite=arguments.overwrite)}")
    if arguments.figure is not None:
        from training.plots import comparison_figure

        title = "Accuracy over all classes seen"
        comparison_figure(comparison_curves(made.sections), arguments.figure, title=title)


def bundle(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write what a report needs of runs to one file."""
    del rest
    from training.report import find_runs, write_bundle

    found = find_runs(arguments.runs)
    say(f"loda bundle: not finished, left out: {path}" for path in found.unfinished)
    say(f"loda bundle: left out: {path}: {why}" for path, why in found.unreadable.items())
    written = write_bundle(found.runs, arguments.out, overwrite=arguments.overwrite)
    print(f"bundle of {len(found.runs)} runs: {written}")


def analyse(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write the analysis of every run beside it."""
    del rest
    from training.analyse import analyse as analyse_run

    for run in arguments.runs:
        written, notes = analyse_run(
            run,
            parts=arguments.parts,
            tasks=arguments.tasks,
            points=arguments.points,
            root=arguments.root,
        )
        say(f"loda analyse: {note}" for note in notes)
        print(f"analysis: {written}")
