"""Table and list of mutation_survivors.md beside this file, from what `make mutants` left.

``--sample N`` prints the names of N mutants instead, drawn at random but the same every time, from
all files alike. ``--prune`` takes survivors off the page whose line has changed since; it needs no
mutants. The others need the dev extra.
"""

import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path("mutants")
PAGE = Path(__file__).with_name("mutation_survivors.md")
SOURCES = Path(__file__).parents[2]
COLUMNS = ("killed", "timeout", "survived", "no tests")


class Survivor(NamedTuple):
    """One mutant that no test found."""

    place: str
    before: str
    after: str

    @property
    def words(self) -> str:
        """What the rules below look at."""
        return f"{self.place} | {self.before} | {self.after}"

    @property
    def is_current(self) -> bool:
        """Whether the file still holds the line, which may have been several."""
        path = SOURCES / self.place.partition(":")[0]
        code = " ".join(path.read_text("utf-8").split()) if path.is_file() else ""
        return " ".join(self.before.split()) in code


Rule = Callable[[Survivor], bool]


def like(pattern: str) -> Rule:
    """Whether place, line before and line after, with bars between, hold the pattern."""
    return lambda x: re.search(pattern, x.words) is not None


def alike(pattern: str, put: str = "") -> Rule:
    """Whether the lines are the same once what fits the pattern is replaced."""
    return lambda x: re.sub(pattern, put, x.before) == re.sub(pattern, put, x.after)


# Why a mutant may live, first match wins. What fits none is a gap in the tests.
CLASSES: tuple[tuple[str, str, Rule], ...] = (
    (
        "The words of an error",
        "The tests hold the argument's name and what is wrong with it, not every word.",
        like(r"metavar=|\| (msg|hint|rule) = |\| f?\"|Error\(msg\)"),
    ),
    (
        "Code of other libraries",
        "NumPy never enters it, or never with this value. The tests of torch, JAX, dask and "
        "array-api-strict, which the profile leaves out, do.",
        like(
            r"_arrays\.py:(is_concrete|_is_traced|full_precision|is_\w+|transposed|widest) "
            r"|_eigh\.py:_thread|_threads_of|torch|jax|dask|compensated|is_concrete\(|is_deferred"
            r"|_whitened_solve|:_full \| idle|may_be_differentiated"
            r"|a\.numpy\(\)|widest\(xp, None\)|is_(numpy|array)\(None\)|__module__"
            r"|full_precision\(None\)|zeros_like\(None\)|larger\(None"
        ),
    ),
    (
        "A guard against what cannot happen",
        "The lists were compared, or made, with equal lengths.",
        like(r"strict="),
    ),
    (
        "At the border",
        "Equality of two computed numbers, where both sides of the comparison give the same.",
        alike(r"(?<=[<>])="),
    ),
    (
        "Where nothing is read",
        "The value stands in entries that the next step does not look at, or is what the call does "
        "by itself, or a bound that the argument never reaches.",
        like(
            r"[01] \* (spectrum|chosen)|clip\(xp\.linalg\.diagonal|clean="
            r"|clip\(x, (0\.0, 2\.0|None, 1\.0)\)"
        ),
    ),
    (
        "A zero that carries a shape",
        "`0 * x`, or zeros of a batch, spread a value over a shape; the sign changes nothing.",
        like(r"0(\.0)? \* |[+-] batch"),
    ),
    (
        "An estimate",
        "Its order of magnitude counts; normalised moments in a batch share it.",
        like(r"largest_eigenvalue"),
    ),
    (
        "Rows or columns of a square",
        "The matrix is square.",
        alike(r"shape\[[-+][12]\]|\[-[12]\]", "shape"),
    ),
    (
        "More than is read",
        "A longer list, of which the first entry is read; another word that is not looked for; or "
        "what the library does by itself.",
        # mutmut puts "XXXX" in the place of an empty string.
        like(
            r"\"XXXX\"|spectrum\[\.\.\., :2\]|take_along_axis\(s, start, \)"
            r"|lowest, ridge, \)|best\.directions, None"
        ),
    ),
    (
        "Widths",
        "The dtype that the array has already on NumPy, where everything is solved in float64.",
        like(r"\| .*(astype\([^|]*, None\)|dtype=None|eye\(size, device|bits < 33)[^|]*$"),
    ),
    (
        "The way, not the result",
        "Which of two equal products is formed, from where an iteration starts, which buffers it "
        "uses: the answer is the same, later or sooner.",
        like(
            r"_spectral|recalibration\.py:_box \| pairs"
            r"|range\(0, size|parts\.insert|_is_shut"
            r"|_eigh\.py:_lanczos \| (start|operator|options|steps|if \"rng\")|_box \| target"
            r"|_eigh\.py.*(check_finite|overwrite|clean=|ascontiguousarray|\.copy\(\))"
            r"|:natural_sort_key |_tridiagonal_values \| largest"
        ),
    ),
    (
        "The size of a slack",
        "How much rounding is forgiven. A test at its exact edge would repeat the code.",
        like(r"coarsest_eps|rounding_share|rounding = |slack|residual, axis|1e-\d"),
    ),
)


def verdicts() -> dict[str, dict[str, str]]:
    """What came of every mutant: by file, then by name."""
    from mutmut.stats import status_by_exit_code

    found = {}
    for meta in sorted(ROOT.rglob("*.meta")):
        codes = json.loads(meta.read_text("utf-8"))["exit_code_by_key"]
        found[str(meta.relative_to(ROOT))[: -len(".meta")]] = {
            name: "not run" if code is None else status_by_exit_code[code]
            for name, code in codes.items()
        }
    return found


def sample(count: int) -> list[str]:
    """Names of a random sample: any such list begins with the shorter ones, by file alike."""
    places: list[tuple[float, str]] = []
    for path, results in verdicts().items():
        rng = random.Random(path)  # noqa: S311
        names = sorted(results)
        rng.shuffle(names)
        start = rng.random()
        places += [((i + start) / len(names), name) for i, name in enumerate(names)]
    return [name for _, name in sorted(places)][:count]


def survivor(path: str, name: str) -> Survivor:
    """The line before and after."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    diff = get_diff_for_mutant(name, path=path).split("\n")[2:]
    lines = {sign: [x[1:].strip() for x in diff if x.startswith(sign)] for sign in "-+"}
    function = re.sub(r"__mutmut_\d+$", "", name.rpartition(".")[2])
    function = re.sub(r"^x_|^xǁ", "", function).replace("ǁ", ".")
    return Survivor(f"{path}:{function}", " ".join(lines["-"]), " ".join(lines["+"]))


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that a random sample has."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return centre - half, centre + half


def table(counts: dict[str, Counter[str]]) -> list[str]:
    """Markdown rows by file, and their sum."""
    rows = ["| file | mutants | run | killed | timeout | survived | no tests | score |"]
    rows.append("| --- " * 8 + "|")
    for path, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        run = sum(count.values()) - count["not run"]
        if not sum(count.values()):
            continue
        score = f"{100 * (count['killed'] + count['timeout']) / run:.1f} %" if run else "–"
        cells = [path, sum(count.values()), run, *(count[c] for c in COLUMNS), score]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def quoted(line: str) -> Survivor | None:
    """The survivor that a line of the page is about, if it is about one."""
    match = re.fullmatch(r"- `([^`]+)`: `(.*)` → `(.*)`", line)
    return Survivor(*match.groups()) if match else None


def pruned(page: str) -> str:
    """The page without survivors whose line has changed, and without headings of none."""
    kept: list[str] = []
    for block in re.split(r"\n(?=## )", page):
        lines = block.split("\n")
        stays = [one is None or one.is_current for one in map(quoted, lines)]
        lines = [line for line, stay in zip(lines, stays, strict=True) if stay]
        count = sum(quoted(line) is not None for line in lines)
        if lines[0].startswith("## "):
            lines[0] = re.sub(r"\(\d+\)$", f"({count})", lines[0])
        if count or not lines[0].startswith("## "):
            kept.append("\n".join(lines))
    return "\n".join(kept).rstrip("\n") + "\n"


def explained(found: list[Survivor]) -> list[str]:
    """The survivors by class."""
    groups: dict[str, list[Survivor]] = defaultdict(list)
    for one in found:
        titles = (title for title, _, rule in CLASSES if rule(one))
        groups[next(titles, "Not explained")].append(one)
    reasons = {title: reason for title, reason, _ in CLASSES} | {"Not explained": "A gap."}
    lines = []
    for title in (title for title in reasons if groups[title]):
        lines += ["", f"## {title} ({len(groups[title])})", "", reasons[title], ""]
        lines += [f"- `{x.place}`: `{x.before}` → `{x.after}`" for x in sorted(groups[title])]
    return lines


def main() -> None:
    """Print the page, or the names of a sample, or prune the page."""
    if sys.argv[1:] == ["--prune"]:
        PAGE.write_text(pruned(PAGE.read_text("utf-8")), "utf-8")
        return
    if sys.argv[1:2] == ["--sample"]:
        sys.stdout.write("\n".join(sample(int(sys.argv[2]))) + "\n")
        return
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    found: list[Survivor] = []
    for path, results in verdicts().items():
        counts[path].update(results.values())
        lived = (name for name, status in results.items() if status in ("survived", "no tests"))
        found += [survivor(path, name) for name in lived]
    old = [one for one in found if not one.is_current]
    if old:
        msg = f"{ROOT}/ is of older code, got {old[0].words}; run mutmut again"
        raise SystemExit(msg)
    whole = sum(counts.values(), Counter())
    run = sum(whole.values()) - whole["not run"]
    share = (whole["killed"] + whole["timeout"]) / run
    lines = ["# Mutants of `loda_math`", "", "Written by `docs/developers/mutation_table.py`."]
    lines += ["Survivors are taken off when their line changes; the counts are of the run.", ""]
    lines += [f"{100 * share:.1f} % of {run} mutants were found.", ""]
    if whole["not run"]:
        low, high = interval(share, run)
        lines[-1:] = [
            f"They are a random sample of {sum(whole.values())}, stratified by file: the share of "
            f"all is between {100 * low:.1f} % and {100 * high:.1f} % (95 %, Wilson).",
            "",
        ]
    sys.stdout.write("\n".join([*lines, *table(counts), *explained(found)]) + "\n")


if __name__ == "__main__":
    main()
