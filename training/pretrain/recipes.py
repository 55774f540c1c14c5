"""Recipes of pretraining on the command line: a setting is a field, with its default."""

import argparse
import sys
from dataclasses import asdict, fields
from typing import Any


def add_settings(parser: argparse.ArgumentParser, recipe: type[Any]) -> None:
    """Give the parser a flag for every field of a recipe's dataclass."""
    for field in fields(recipe):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        parser.add_argument(flag, type=kind, default=field.default, help="default: %(default)s")


def command_line(program: str, recipe: Any) -> str:
    """Return the command line that trains by ``recipe``, all settings spelt out."""
    words = [f"--{name.replace('_', '-')} {value}" for name, value in asdict(recipe).items()]
    return " ".join([program, *words])


def say(text: str) -> None:
    """Write a line at once, also where the output is a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
