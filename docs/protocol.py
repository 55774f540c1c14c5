"""The comparison of docs/protocol.md as sweep files: the trials, and the test that they decide.

    python docs/protocol.py choose > training/configs/sweeps/glyphs-choose.yaml
    python docs/protocol.py choose RECORDS                 # the same with the rates that are due
    python docs/protocol.py rates RECORDS                  # the trials as a table, the best in bold
    python docs/protocol.py test RECORDS > training/configs/sweeps/glyphs-test.yaml
    python docs/protocol.py controls RECORDS --stream caltech101-dinov2   # for three seeds
    python docs/protocol.py contrasts RECORDS --tests TESTS           # what the test shows

RECORDS and TESTS are bundles of the trials and of the test, or their folders. ``--stream`` names
another stream than ``glyphs``. Everything that the test runs is decided by the trials and by the
rules in this file, which was committed before the first test run.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import NamedTuple

import yaml
from pandas import DataFrame, concat
from scipy.stats import t as student

from training.config import Experiment, flat_settings
from training.report import Report, find_runs
from training.report.tables import differences, intervals, lead_texts, of_readout
from training.yaml_files import read_yaml, resolve_config

READOUTS = ("compensated", "alignment", "heads", "nearest_mean", "ridge")  # all on one training
READOUT = READOUTS[0]  # the primary one, which decides
LADDER = (0.00006, 0.0002, 0.0006, 0.002, 0.006, 0.02, 0.06, 0.18, 0.5, 1.0, 2.0, 4.0)
RATES = LADDER[4:10]
# Rungs that are added for every method, at most, where the best rate of one of them is at an edge.
FURTHER = 2
CHOOSING_SEEDS = (11, 12)
FIRST_TEST_SEED = 101
HALF_WIDTH = 1.0  # points: of one 95 % interval, not corrected, that the number of seeds aims at
METHODS = ("loda", "seq_lora", "joint", "null_lora", "o_lora", "inflora", "sd_lora", "first_task")
BASELINES = ("seq_lora", "null_lora", "o_lora", "inflora", "sd_lora")  # candidates for the rival
ONLY_HEADS = "frozen"  # its primary read-out depends on no rate; its heads have this one
ONLY_RATE = 0.5
NATIVE = ("inflora", "o_lora", "sd_lora", "ranpac_frozen")  # their authors' settings, no trials
LONG = ("loda", "inflora", "seq_lora")  # also on 20 tasks of 2 classes, with frozen

Settings = dict[str, object]
Trials = dict[str, dict[float, dict[int, float]]]  # last accuracy by method, rate and seed


class Stream(NamedTuple):
    """A stream of the comparison.

    Attributes
    ----------
    title : str
        Its images, in words.
    config : str
        The packaged configuration.
    settings, choose, test : dict
        What is set beside the configuration: always, in the trials, in the test.
    seeds : tuple of int
        Fewest and most seeds of the test.
    seconds : tuple of float
        Processor seconds of a run of LoDA, of the frozen backbone and of any other method.
    given : str
        Arguments that its commands need.
    rates : tuple of float
        The learning rates of its trials, rungs of the ladder.
    """

    title: str
    config: str
    settings: Settings
    choose: Settings
    test: Settings
    seeds: tuple[int, int]
    seconds: tuple[float, float, float]
    given: str = ""
    rates: tuple[float, ...] = RATES

    def due(self, part: str) -> Settings:
        """Settings of the data and the backbone that a run of a part must have."""
        sections = read_yaml(resolve_config(self.config))
        own = {**self.settings, **(self.choose if part == CHOOSE else self.test)}
        named: Settings = {f"{x}.name": sections[x]["name"] for x in ("data", "backbone")}
        return named | {key: own[key] for key in own if key.startswith("data.")}

    def epochs(self) -> int:
        """Epochs of a task."""
        own = read_yaml(resolve_config(self.config))["train"]["epochs"]
        return int(str(self.settings.get("train.epochs", own)))

    def hours(self, runs: list[tuple[str, float]]) -> str:
        """Hours of one processor core for methods and the multiples of their epochs."""
        loda, frozen, other = self.seconds
        each = {"loda": loda, ONLY_HEADS: frozen}
        total = sum(each.get(method, other) * times for method, times in runs)
        return f"{len(runs)} runs, about {total / 3600:.0f} hours of one processor core"


CHOOSE, TEST, CONTROLS = "choose", "test", "controls"
CANDIDATE = "candidate"  # a stream that is not in the comparison
STREAMS = {
    "glyphs": Stream(
        "the glyphs",
        "glyphs",
        {"data.images": 240, "train.epochs": 4},
        {"data.alphabet": CHOOSE},
        {"data.alphabet": TEST},
        seeds=(10, 20),
        seconds=(140.0, 60.0, 75.0),
    ),
    "caltech101-dinov2": Stream(
        "Caltech-101 with DINOv2",
        "caltech101-dinov2",
        {},
        {"data.validation": 0.2},
        {"data.validation": 0.0},
        seeds=(5, 10),
        seconds=(600.0, 230.0, 370.0),
        given=" \\\n#               --data.root IMAGES --backbone.weights FILE",
        rates=LADDER[2:8],
    ),
}
WHOLE = "glyphs"  # the stream with LoDA's parts, the controls and the long tasks
CONTROL_SEEDS = 3  # of LoDA's parts and the controls on photographs

DOUBLE = "double-epochs"  # ends the names of what is trained for twice the epochs
# A single branch has the weight that it has beside the other, half of the configured one: LoDA's
# rate was chosen with that.
SAME_GENERAL: Settings = {"method.general_weight": 0.25}
SAME_ISOLATED: Settings = {"method.isolated_weight": 0.5}
LODA_PARTS: dict[str, Settings] = {
    "general-only": {"method.branches": "general", **SAME_GENERAL},
    "isolated-only": {"method.branches": "isolated", **SAME_GENERAL, **SAME_ISOLATED},
    "isolated-null-space": {"method.isolated": "null"},
    "isolated-trace-ratio": {"method.isolated": "trace_ratio"},
    "random-directions": {"method.directions": "random"},
    "look-ahead-of-length-0": {"method.radius": 0.0},
    f"without-look-ahead-{DOUBLE}": {"method.gao": False},
    "recalibration-none": {"method.recalibration": "none"},
}
HEAD = """# {title}
#
# Command:  loda sweep {name} --out runs/{folder}{given}
# Time:     {hours}
#
# Written by docs/protocol.py; docs/protocol.md says why it is as it is.
"""
SHARED: Settings = {
    "head.readout": READOUT,
    "head.also": list(READOUTS[1:]),
    "keep": {"state": False, "figure": False},
}


def choosing_sweep(stream: str = WHOLE, trials: Trials | None = None) -> str:
    """The trials: every method at every rate, on the images to choose on.

    With the trials of the whole grid so far, it has the rates that are still to be tried as well.
    """
    rates = {*STREAMS[stream].rates, *(due_rates(trials, stream) if trials else ())}
    rates |= {rate for method in METHODS for rate in (trials or {}).get(method, {})}
    variants: dict[str, Settings] = {ONLY_HEADS: {"method.name": ONLY_HEADS, "train.lr": ONLY_RATE}}
    for rate in sorted(rates):
        for method in METHODS:
            variants[f"{method}-{rate}"] = {"method.name": method, "train.lr": rate}
    runs = [(str(v["method.name"]), 1.0) for v in variants.values() for _ in CHOOSING_SEEDS]
    return _sweep(
        stream,
        CHOOSE,
        f"Learning rates for the comparison on {STREAMS[stream].title}: equal trials for every "
        "method.",
        CHOOSING_SEEDS,
        variants,
        runs,
    )


def read_trials(
    sources: list[Path],
    stream: str = WHOLE,
    readout: str = READOUT,
    diverged: Sequence[str] = (),
    seeds: Sequence[int] = CHOOSING_SEEDS,
) -> Trials:
    """Last accuracies in per cent under a read-out, by method, rate and seed.

    Without sources there are none, and those of other seeds are left out. A trial that diverged
    leaves no record: ``diverged`` names it as its folder, joint-1.0/seed11, and it counts as 0.

    Raises
    ------
    ValueError
        If a run is not one of the trials.
    """
    trials: Trials = {}
    for run in find_runs(sources).runs if sources else []:
        if stream != CANDIDATE:
            _require(run.experiment, stream, CHOOSE, run.name)
        if run.seed not in seeds:
            continue
        by_rate = trials.setdefault(run.experiment.method.name, {})
        by_seed = by_rate.setdefault(run.experiment.train.lr, {})
        by_seed[run.seed] = 100 * run.matrices[readout].last
    for name in diverged:
        method, _, rest = name.rpartition("-")
        rate, _, seed = rest.partition("/seed")
        trials.setdefault(method, {}).setdefault(float(rate), {})[int(seed)] = 0.0
    return trials


def _require(experiment: Experiment, stream: str, part: str, name: str) -> None:
    flat, due = flat_settings(experiment), STREAMS[stream].due(part)
    strange = {key: flat.get(key) for key, value in due.items() if flat.get(key) != value}
    if strange:
        msg = f"{name} must be a run of {stream} ({part}), got {strange}; leave it out"
        raise ValueError(msg)


def best_rates(trials: Trials, stream: str = WHOLE) -> dict[str, float]:
    """The rate of each method with the best mean last accuracy; of equal ones the lower.

    Raises
    ------
    ValueError
        If methods had other trials than each other, or a best rate is at an edge of the grid that
        can still be extended.
    """
    chosen = _best(trials, stream)
    if due := due_rates(trials, stream):
        msg = (
            f"the best rate must be inside the grid, got {chosen}; run the trials of every method "
            f"at {' and '.join(map(str, due))} too"
        )
        raise ValueError(msg)
    return chosen


def due_rates(trials: Trials, stream: str = WHOLE) -> list[float]:
    """The next rate beyond each edge of the grid where a method is best, if any is left."""
    best = set(_best(trials, stream).values())
    grid = tuple(sorted(trials["loda"]))
    first, last = (LADDER.index(STREAMS[stream].rates[edge]) for edge in (0, -1))
    rungs = LADDER[max(first - FURTHER, 0) : last + FURTHER + 1]
    starts = [i for i in range(len(rungs)) if rungs[i : i + len(grid)] == grid]
    if not starts:
        msg = f"the rates of the trials must follow each other in {list(rungs)}, got {list(grid)}"
        raise ValueError(msg)
    below, above = rungs[: starts[0]], rungs[starts[0] + len(grid) :]
    return [*(below[-1:] if grid[0] in best else ()), *(above[:1] if grid[-1] in best else ())]


def _best(trials: Trials, stream: str) -> dict[str, float]:
    """The best rate of each method, in trials of one whole grid for all."""
    grids = {method: sorted(trials.get(method, {})) for method in METHODS}
    grid = grids["loda"]
    for method, rates in grids.items():
        have = {seed for rate in rates for seed in trials[method][rate]}
        whole = all(set(trials[method][rate]) == set(CHOOSING_SEEDS) for rate in rates)
        first = set(STREAMS[stream].rates)
        if rates != grid or not first <= set(rates) or not whole:
            msg = (
                f"{method} must have a trial at every rate of {sorted({*first, *grid})} with seeds "
                f"{list(CHOOSING_SEEDS)}, got rates {rates} and seeds {sorted(have)}; run the rest"
            )
            raise ValueError(msg)
    chosen = {}
    for method in METHODS:
        means = {rate: fmean(trials[method][rate].values()) for rate in grid}
        chosen[method] = max(grid, key=lambda rate: (means[rate], -rate))
    return chosen


def rival(trials: Trials, chosen: dict[str, float]) -> str:
    """The baseline with the best trials, each at its own rate."""
    return max(BASELINES, key=lambda method: fmean(trials[method][chosen[method]].values()))


def number_of_seeds(trials: Trials, chosen: dict[str, float], bounds: tuple[int, int]) -> int:
    """Seeds for which the interval of a paired difference is expected to be within a point.

    The variance of LoDA's lead over a method is pooled over the methods of the trials, whose
    orders give each of them a degree of freedom less than there are orders.
    """
    others = {m: trials[m][chosen[m]] for m in METHODS if m not in ("loda", "joint")}
    others[ONLY_HEADS] = trials[ONLY_HEADS][ONLY_RATE]
    own = trials["loda"][chosen["loda"]]
    spread = math.sqrt(
        fmean(variance([own[seed] - last[seed] for seed in own]) for last in others.values())
    )
    for count in range(*bounds):
        if student.ppf(0.975, count - 1) * spread / math.sqrt(count) <= HALF_WIDTH:
            return count
    return bounds[1]


def results_sweep(trials: Trials, stream: str, part: str = TEST) -> str:
    """What is run on the images of results.

    The test is the comparison of the methods, on one stream also LoDA's parts, the controls,
    native settings and the long stream. On another stream LoDA's parts and the controls are a sweep
    of their own, for fewer seeds; it goes to the folder of the test, where the methods are done.
    """
    chosen = best_rates(trials, stream)
    rate, epochs = chosen["loda"], 2 * STREAMS[stream].epochs()
    own: dict[str, Settings] = {
        method: {"method.name": method, "train.lr": chosen[method]} for method in METHODS
    }
    own[ONLY_HEADS] = {"method.name": ONLY_HEADS, "train.lr": ONLY_RATE}
    parts: dict[str, Settings] = {
        name: {"method.name": "loda", "train.lr": rate, **changes}
        for name, changes in LODA_PARTS.items()
    }
    equal: dict[str, Settings] = {}
    for method in (*BASELINES, "joint"):
        equal[f"{method}-aligned"] = {**own[method], "method.gao": True}
        equal[f"{method}-{DOUBLE}"] = own[method]
    # One branch as well, whose first task is LoDA's only with the weight of LoDA's.
    single = {**own["null_lora"], **SAME_GENERAL, **SAME_ISOLATED}
    equal["null_lora-same-weight-aligned"] = {**single, "method.gao": True}
    equal[f"null_lora-same-weight-{DOUBLE}"] = single
    long = {"data.init_cls": 2, "data.increment": 2, "data.tasks": 20}
    streams = {f"{m}-20-tasks": {**own[m], **long} for m in (*LONG, ONLY_HEADS)}
    # What a method's authors do not say (the rate of o_lora) is as in the trials.
    native = {f"{m}-native": {"train.lr": chosen.get(m, ONLY_RATE), **_native(m)} for m in NATIVE}
    compared = {"loda": own["loda"]}
    whole = {
        "methods": own,
        "LoDA's parts": compared | parts,
        "controls": compared | {"isolated-only": parts["isolated-only"]} | equal,
        "native settings": compared | native,
        "20 tasks": streams,
    }
    names = ["methods"] if part == TEST else ["methods", "LoDA's parts", "controls"]
    groups = {name: whole[name] for name in (whole if (stream, part) == (WHOLE, TEST) else names)}
    variants = {
        name: {**settings, **({"train.epochs": epochs} if name.endswith(DOUBLE) else {})}
        for group in groups.values()
        for name, settings in group.items()
    }
    count = number_of_seeds(trials, chosen, STREAMS[stream].seeds)
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + (count if part == TEST else CONTROL_SEEDS))
    runs = []
    for name, settings in variants.items():
        if part == CONTROLS and name in own:
            continue
        twice = name.endswith(("-aligned", f"-{DOUBLE}", "-native"))
        runs.append((str(settings["method.name"]), 2.0 if twice else 1.0))
    what = "The methods" if part == TEST else "LoDA's parts and the controls"
    title = (
        f"{what} on images of {STREAMS[stream].title} that no setting was chosen on.\n"
        f"# The rival of the second primary contrast is {rival(trials, chosen)}."
    )
    members = {name: list(group) for name, group in groups.items()}
    return _sweep(stream, part, title, seeds, variants, runs * len(seeds), members)


def contrasts(
    trials: Trials, tests: list[Path], stream: str = WHOLE, diverged: Sequence[str] = ()
) -> str:
    """Leads of LoDA in last accuracy: the two primary contrasts, then whole tables at once.

    Intervals are Student's, paired by seed, at 1 - 0.05 / k for the k rows of a table. A run of the
    test that diverged leaves no record: ``diverged`` names it as its folder, seq_lora/seed103, and
    it counts as 0.
    """
    parts: dict[str, list[str]] = {}
    report = Report.over(tests)
    for run in report.inventory.runs:
        _require(run.experiment, stream, TEST, run.name)
        parts |= run.sweep_groups
    runs = concat(
        of_readout(part.measures, READOUT).assign(section=part.title) for part in report.sections
    )
    runs = _with_diverged(runs, diverged, parts)
    tables = {}
    for section, rows in runs.groupby("section", sort=False):
        tables[str(section)] = differences(rows, _lead_of(rows), "last")
    other = rival(trials, best_rates(trials, stream))
    primary = [
        table[["frozen", other]] for table in tables.values() if {"frozen", other} <= {*table}
    ]
    if not primary:
        msg = f"tests must hold runs of loda, frozen and {other}; run more of {stream}-test"
        raise ValueError(msg)
    if bool(primary[0].isna().any(axis=None)):
        msg = f"every seed must have runs of loda, frozen and {other}; run more of {stream}-test"
        raise ValueError(msg)
    named = {"Primary contrasts": primary[0], **tables}
    return "\n\n".join(_contrast_table(title, table) for title, table in named.items())


def _lead_of(rows: DataFrame) -> str:
    return "loda-20-tasks" if "loda-20-tasks" in set(rows["group"]) else "loda"


def _with_diverged(
    runs: DataFrame, names: Sequence[str], parts: Mapping[str, Sequence[str]]
) -> DataFrame:
    """Add a row of accuracy 0 for each run that diverged, in the sections of its variant.

    If no run of the variant is left, the parts of the sweep say which these are.
    """
    added = [runs]
    for name in names:
        variant, _, seed = name.partition("/seed")
        sections = set(runs.loc[runs["group"] == variant, "section"])
        if not sections:
            own = {title for title, variants in parts.items() if variant in variants}
            every = set(runs["section"])
            sections = {x for x in every if x.rpartition(": ")[2] in own} if parts else every
        if not sections:
            msg = f"{name} must be a run of a variant of the sweep, got none of that name"
            raise ValueError(msg)
        for section, rows in runs[runs["section"].isin(sections)].groupby("section", sort=False):
            pair = rows[(rows["group"] == _lead_of(rows)) & (rows["seed"].astype(str) == seed)]
            taken = rows[(rows["group"] == variant) & (rows["seed"].astype(str) == seed)]
            if pair.empty or not taken.empty:
                msg = (
                    f"{name} must be a run that is missing beside one of {_lead_of(rows)}, got "
                    f"{len(taken)} and {len(pair)} runs in {section}; name it VARIANT/seedNUMBER"
                )
                raise ValueError(msg)
            added.append(pair.assign(group=variant, last=0.0))
    return concat(added)


def _contrast_table(title: str, table: DataFrame) -> str:
    found = intervals(table, confidence=1 - 0.05 / max(1, table.shape[1]))
    lines = [f"#### {title}", "", "| over | lead, points | seeds |", "|---|---:|---:|"]
    for name, text, pairs in zip(found.index, lead_texts(found), found["pairs"], strict=True):
        lines.append(f"| {name} | {text} | {pairs:.0f} |")
    return "\n".join(lines)


def _native(method: str) -> Settings:
    """The packaged settings of a method's authors, one setting a name."""
    sections = read_yaml(resolve_config(f"native/{method}"))
    return {
        f"{section}.{key}": value for section, own in sections.items() for key, value in own.items()
    }


def _sweep(
    stream: str,
    part: str,
    title: str,
    seeds: Sequence[int],
    variants: dict[str, Settings],
    runs: list[tuple[str, float]],
    groups: dict[str, list[str]] | None = None,
) -> str:
    own = STREAMS[stream]
    split = own.choose if part == CHOOSE else own.test
    settings = {**split, **own.settings, **SHARED}
    whole = {"configs": [own.config], "settings": settings, "seeds": list(seeds)}
    folder = f"{stream}-{TEST if part == CONTROLS else part}"
    named = {"title": title, "name": f"{stream}-{part}", "folder": folder, "given": own.given}
    lines = [HEAD.format(hours=own.hours(runs), **named).rstrip()]
    lines.append(_yaml(whole))
    lines.append("variants:")
    lines += [f"  {variant}: {_inline(changes)}" for variant, changes in variants.items()]
    if groups:
        lines.append(_yaml({"groups": groups}))
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=100)
    return text.rstrip()


def _inline(value: Settings) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10_000)
    return text.strip()


def rate_table(trials: Trials) -> str:
    """The trials as a table in Markdown: mean last accuracies, the best of a method in bold."""
    rates = sorted({rate for method in METHODS for rate in trials.get(method, {})})
    lines = [
        "| method | " + " | ".join(f"lr {rate}" for rate in rates) + " |",
        "|---|" + "---:|" * len(rates),
    ]
    for method in (m for m in METHODS if m in trials):
        means = {rate: fmean(seeds.values()) for rate, seeds in trials[method].items()}
        best = max(means, key=lambda rate: (means[rate], -rate))
        cells = ["–" if rate not in means else f"{means[rate]:.2f}" for rate in rates]
        cells = ["diverged" if cell == "0.00" else cell for cell in cells]
        cells[rates.index(best)] = f"**{cells[rates.index(best)]}**"
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if ONLY_HEADS in trials:
        mean = f"{fmean(trials[ONLY_HEADS][ONLY_RATE].values()):.2f}"
        lines.append(f"| {ONLY_HEADS} | {' | '.join([mean] * len(rates))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print one of the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=[CHOOSE, "rates", TEST, CONTROLS, "contrasts"])
    parser.add_argument("records", nargs="*", type=Path, help="the trials: a bundle or folders")
    parser.add_argument("--tests", nargs="+", type=Path, default=[], help="of contrasts: the test")
    parser.add_argument("--stream", default=WHOLE, choices=[*STREAMS, CANDIDATE])
    parser.add_argument("--diverged", nargs="+", default=[], metavar="TRIAL", help="counts as 0")
    parser.add_argument(
        "--diverged-tests", nargs="+", default=[], metavar="RUN", help="of contrasts: counts as 0"
    )
    parser.add_argument("--readout", default=READOUT, choices=READOUTS, help="of rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=CHOOSING_SEEDS, help="of rates")
    given = parser.parse_intermixed_args(arguments)
    if given.what != CHOOSE and not given.records:
        parser.error(f"{given.what} needs the records of the trials")
    if (given.what == "contrasts") != bool(given.tests):
        parser.error("--tests names the runs of the test, for contrasts only")
    if given.stream == CANDIDATE and given.what != "rates":
        parser.error(f"--stream {CANDIDATE} is for rates only, of runs that ask for room")
    if given.diverged_tests and not given.tests:
        parser.error("--diverged-tests names runs of --tests")
    if given.what != "rates" and (given.readout, given.seeds) != (READOUT, CHOOSING_SEEDS):
        parser.error(f"--readout and --seeds are for rates: {READOUT} on all decides the rest")
    try:
        trials = read_trials(
            given.records, given.stream, given.readout, given.diverged, given.seeds
        )
        text = {
            CHOOSE: lambda: choosing_sweep(given.stream, trials),
            "rates": lambda: rate_table(trials),
            TEST: lambda: results_sweep(trials, given.stream),
            CONTROLS: lambda: results_sweep(trials, given.stream, CONTROLS),
            "contrasts": lambda: contrasts(trials, given.tests, given.stream, given.diverged_tests),
        }[given.what]()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
