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
    from training.finished.kept import keeps_nothing
    from training.sweep import plan, read_sweep, run_sweep, standing, write_groups

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
    failed = [o.job.name for o in outcomes if o.status in ("failed", "unreadable")]
    elsewhere = [o.job.name for o in outcomes if o.status == "running elsewhere"]
    # A job of a cluster may be stopped there, and the sweep not.
    stopped = [o.job.name for o in outcomes if o.status in ("stopped", "not started")]
    done = len(outcomes) - len(failed) - len(elsewhere) - len(stopped)
    print(f"{done} of {len(outcomes)} runs are done")
    if elsewhere:
        print(f"running elsewhere: {'; '.join(elsewhere)}")
    for what, names in (("stopped", stopped), ("failed", failed)):
        if names:
            say([f"{what}: {'; '.join(names)}"])
    return 1 if failed or stopped else 0
