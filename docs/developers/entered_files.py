"""How much of this package ``loda train`` enters: files and functions, counted by a profile hook.

``python docs/developers/entered_files.py`` trains two tasks of the digits in a temporary folder and
prints, package by package, in how many files a function was called, and how many functions were.
Functions are those with a name, and lambdas; bodies of modules and classes, which importing runs,
and comprehensions do not count. Further arguments are settings of ``loda train``; with ``--files``
every file is listed.
"""

import inspect
import sys
import tempfile
import threading
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("loda_math", "backends", "training")
SETTINGS = ("--data.name=digits", "--data.tasks=2", "--train.epochs=1", "--device=cpu")
SETTINGS += ("--threads=1",)
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


def entered(settings: list[str]) -> Counter[Path]:
    """Number of functions that were called, by file."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        from training.cli import main

        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            status = main(["train", *SETTINGS, *settings, f"--out={folder}/run"])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if status:
        sys.exit(status)
    found: Counter[Path] = Counter()
    for code in seen:
        path = Path(code.co_filename)
        if not path.is_relative_to(ROOT) or code.co_name in COMPREHENSIONS:
            continue
        package = path.relative_to(ROOT).parts[0]
        # Only functions have local variables that are known by number.
        if package in PACKAGES and code.co_flags & inspect.CO_OPTIMIZED:
            found[path.relative_to(ROOT)] += 1
    return found


def main() -> None:
    """Count, and print the table."""
    arguments = sys.argv[1:]
    listed = "--files" in arguments
    found = entered([x for x in arguments if x != "--files"])
    if not found:
        msg = f"the code that ran is not that of {ROOT}: set PYTHONPATH to it"
        raise RuntimeError(msg)
    lines = [f"{functions:5d}  {path}" for path, functions in sorted(found.items()) if listed]
    for package in PACKAGES:
        own = [number for path, number in found.items() if path.parts[0] == package]
        lines.append(f"{package}: {len(own)} files, {sum(own)} functions")
    lines.append(f"together: {len(found)} files, {found.total()} functions")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
