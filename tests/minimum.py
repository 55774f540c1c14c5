"""The lowest versions that the project file allows, as pins: python tests/minimum.py EXTRA ...

What ``make minimum`` installs. Standard library only: it runs before anything is installed.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))[
    "project"
]
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(\[[^]]*\])?>=([0-9.]+)(\s*;.*)?")
OWN = re.compile(r"loda\[([^]]*)\]")


def pins(*extras: str) -> dict[str, str]:
    """Lowest version by package, of the base install and the extras."""
    lowest: dict[str, str] = {}
    requirements = list(PROJECT["dependencies"])
    for extra in extras:
        requirements += PROJECT["optional-dependencies"][extra]
    for requirement in requirements:
        if own := OWN.fullmatch(requirement):
            found = pins(*own[1].split(","))
        elif bound := REQUIREMENT.fullmatch(requirement):
            found = {bound[1]: bound[3]}
        else:
            msg = f"{requirement!r} must be a package with one lower bound, as in 'numpy>=2.0'"
            raise ValueError(msg)
        for package, version in found.items():
            if lowest.setdefault(package, version) != version:
                msg = f"{package} must have one lower bound, got {lowest[package]} and {version}"
                raise ValueError(msg)
    return lowest


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in pins(*sys.argv[1:]).items())
