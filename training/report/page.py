"""The report as one HTML page that needs nothing beside it: no script, no network, no files."""

import re
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from training.report.tables import Table

_TEMPLATE = "page.html"
_PIXELS_A_POINT = 4 / 3


class Figure(NamedTuple):
    """A figure of the page; ``source`` is a data URI, sizes are in CSS pixels.

    One that is folded is opened by the reader.
    """

    title: str
    caption: str
    alt: str
    source: str
    width: int
    height: int
    folded: bool = False


class Part(NamedTuple):
    """A section of the page."""

    slug: str
    title: str
    tables: Sequence[Table]
    figures: Sequence[Figure]


def embed(path: Path, title: str, caption: str, alt: str) -> Figure:
    """A figure from an SVG file, whose size is in points.

    Raises
    ------
    ValueError
        If the file does not say its size.
    """
    content = path.read_bytes()
    size = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', content)
    if size is None:
        msg = f"{path} does not say its size"
        raise ValueError(msg)
    width, height = (round(_PIXELS_A_POINT * float(side)) for side in size.groups())
    source = f"data:image/svg+xml;base64,{b64encode(content).decode('ascii')}"
    return Figure(title, caption, alt, source, width, height)


def page(
    title: str,
    count: str,
    notes: Sequence[str],
    parts: Sequence[Part],
    runs: Table,
) -> str:
    """The page.

    Parameters
    ----------
    title, count : str
        Its title, and how much it covers.
    notes : sequence of str
        What the reader should know first.
    parts : sequence of Part
        The sections.
    runs : Table
        Which runs it is about.
    """
    text = files("training.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    # Whatever a label holds, it is text.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(text).render(
        title=title, count=count, notes=notes, parts=parts, runs=runs
    )
