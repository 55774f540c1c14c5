"""Many runs: ``sweep``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from training.commands import Commands, say


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add ``sweep``."""
    parser = commands.add_parser(
        "sweep",
        help="train many runs: methods times seeds, skipping what is done",
        epilog="Further arguments are settings of loda train, for every run.",
    )
    parser.add_argument("sweep", metavar="SWEEP", help="a YAML file, or the name of a packaged one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--engine",
        choices=["processes", "slurm", "local"],
        default="processes",
        help="processes on this machine, jobs of a SLURM cluster, or its stand-in for trials",
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants alone")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs")
    parser.set_defaults(act=sweep, takes_settings=True)


def sweep(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run a sweep, or list its runs."""
    from training.config import keeps_nothing
    from training.sweep import plan, read_sweep, run_sweep, standing, summarise, write_groups

    if arguments.workers < 1:
        msg = f"--workers is {arguments.workers}; allowed: at least 1"
        raise ValueError(msg)
    chosen = read_sweep(arguments.sweep)
    jobs = plan(chosen, arguments.out, rest, only=arguments.only)
    if arguments.dry_run:
        for job in jobs:
            print(f"{job.name}: {standing(job)} ({job.folder})")
        return 0
    say(dict.fromkeys(f"loda sweep: {x}" for job in jobs for x in keeps_nothing(job.experiment)))
    write_groups(arguments.out, chosen.groups)
    outcomes = run_sweep(
        jobs,
        arguments.out,
        workers=arguments.workers,
        engine=arguments.engine,
        slurm=chosen.slurm,
    )
    said, failures = summarise(outcomes)
    print("\n".join(said))
    say(failures)
    return 1 if failures else 0
