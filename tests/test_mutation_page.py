"""The page of surviving mutants: it quotes code that exists."""

import mutation_table

LINE = "- `loda_math/energy.py:f`: `{}` → `other`"


def test_every_quoted_line_is_in_the_code() -> None:
    page = mutation_table.PAGE.read_text("utf-8")
    quoted = [one for one in map(mutation_table.quoted, page.split("\n")) if one]
    assert quoted
    gone = [one.before for one in quoted if not one.is_current]
    assert not gone, "take them off: python docs/developers/mutation_table.py --prune"


def test_what_is_gone_is_taken_off_with_its_heading() -> None:
    there, gone = LINE.format("from typing import Any"), LINE.format("no such line")
    page = f"# Title\n\n## First (2)\n\nWhy.\n\n{there}\n{gone}\n"
    rest = mutation_table.pruned(f"{page}\n## Second (1)\n\nWhy.\n\n{gone}\n")
    assert rest == f"# Title\n\n## First (1)\n\nWhy.\n\n{there}\n"
    assert mutation_table.pruned(rest) == rest


def test_lines_that_were_joined_are_known() -> None:
    # As in the file, where the call is spread over lines.
    source = (mutation_table.SOURCES / "loda_math/energy.py").read_text("utf-8")
    start = source.index("def projection_energy(")
    joined = " ".join(source[start : start + 60].split())
    assert mutation_table.quoted(LINE.format(joined)).is_current
