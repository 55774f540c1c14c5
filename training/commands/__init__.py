"""The commands of ``loda``, a file a family: their arguments, and what they print.

Nothing heavy is imported before a command needs it. A command takes its own arguments and those
that its parser left over, and returns the exit status or None.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

Commands = argparse._SubParsersAction  # argparse has no public name for it


def say(lines: Iterable[str]) -> None:
    """Print lines to the standard error."""
    for line in lines:
        print(line, file=sys.stderr)


def require_run(run: Path) -> None:
    """Raise FileNotFoundError unless there is a folder; said before torch is imported."""
    # What the folder holds is checked by whoever loads it.
    if not run.is_dir():
        msg = f"no run folder {run}"
        raise FileNotFoundError(msg)
