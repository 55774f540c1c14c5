"""Tables of a report: accuracies, leads over other methods, controls and costs."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from math import isnan, nan
from typing import NamedTuple

import numpy as np
import pandas as pd

from training.config import flat_settings
from training.report.runs import Section
from training.spelling import visible

DASH = "–"
METRIC_TITLES = {
    name: name.replace("_", " ") for name in ("last", "average", "forgetting", "task_given")
}
"""Columns of the measures, and their names in the tables."""

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---", "·": r"$\cdot$", "×": r"$\times$",
    "≤": r"$\leq$", "≥": r"$\geq$",
}  # fmt: skip
_GREEK = (
    "αalpha βbeta γgamma δdelta εepsilon ζzeta ηeta θtheta ιiota κkappa λlambda μmu νnu ξxi πpi "
    "ρrho σsigma τtau υupsilon φphi χchi ψpsi ωomega ΓGamma ΔDelta ΘTheta ΛLambda ΞXi ΠPi ΣSigma "
    "ΦPhi ΨPsi ΩOmega"
)
_LATEX |= {name[0]: rf"$\{name[1:]}$" for name in _GREEK.split()}


class Table(NamedTuple):
    """A table of a report.

    Attributes
    ----------
    title : str
        Heading.
    cells : DataFrame
        Cell texts. The index holds the names of the rows, and its own name is their column header.
    note : str
        How to read it; may be empty.
    best : collection of (str, str)
        Row and column of the cells that are set in bold.
    """

    title: str
    cells: pd.DataFrame
    note: str = ""
    best: Collection[tuple[str, str]] = ()

    @property
    def header(self) -> list[str]:
        """Names of the columns, that of the row names first."""
        return [str(self.cells.index.name), *map(str, self.cells.columns)]


def markdown(table: Table, *, level: int = 3) -> str:
    r"""The table under a heading of a level.

    Examples
    --------
    >>> cells = pd.DataFrame({"x": ["1"]}, index=pd.Index(["a|b"], name="m"))
    >>> print(markdown(Table("T", cells, "Note.", [("a|b", "x")])))
    ### T
    <BLANKLINE>
    | m | x |
    |---|---:|
    | a\|b | **1** |
    <BLANKLINE>
    Note.
    """
    lines = [_markdown_row(table.header), f"|---|{'---:|' * len(table.cells.columns)}"]
    for row, cells in table.cells.iterrows():
        texts = (f"**{x}**" if (row, name) in table.best else x for name, x in cells.items())
        lines.append(_markdown_row([row, *texts]))
    title, note = map(escape_markdown, (table.title, table.note))
    parts = [f"{'#' * level} {title}", "\n".join(lines), note]
    return "\n\n".join(part for part in parts if part)


def latex(table: Table) -> str:
    r"""The table as a float with the rules of booktabs; every character is escaped.

    Examples
    --------
    >>> cells = pd.DataFrame({"x": ["1 ± 2"]}, index=pd.Index(["a_b"], name="m"))
    >>> print(latex(Table("T", cells, best=[("a_b", "x")])))
    \begin{table}
    \centering
    \caption{T}
    \begin{tabular}{lr}
    \toprule
    m & x \\
    \midrule
    a\_b & \textbf{1 $\pm$ 2} \\
    \bottomrule
    \end{tabular}
    \end{table}
    """
    texts = table.cells.map(escape_latex)
    for row, name in table.best:
        texts.loc[row, name] = rf"\textbf{{{texts.loc[row, name]}}}"
    # The command that ends the line above would read these as its argument.
    guards = ["{}" if name.lstrip().startswith(("[", "*")) else "" for name in texts.index]
    names = [guard + escape_latex(name) for guard, name in zip(guards, texts.index, strict=True)]
    texts.insert(0, table.cells.index.name, names)
    styled = texts.rename(columns=escape_latex).style.hide(axis="index")
    caption = escape_latex(f"{table.title}. {table.note}" if table.note else table.title)
    columns = "l" + "r" * len(table.cells.columns)
    text: str = styled.to_latex(
        hrules=True, position_float="centering", caption=caption, column_format=columns
    )
    return text.rstrip()


def escape_markdown(text: str) -> str:
    r"""Text without the beginning of HTML, of a link, an image or another cell.

    Examples
    --------
    >>> print(escape_markdown("a|b <img src=x> [c](d) s_e ± 1"))
    a\|b \<img src=x> [c]\(d) s_e ± 1
    """
    escaped = visible(text).replace("\\", r"\\").replace("](", r"]\(")
    return escaped.replace("<", r"\<").replace("|", r"\|")


def escape_latex(text: str) -> str:
    r"""Text with the characters escaped that are special in LaTeX.

    Examples
    --------
    >>> print(escape_latex("100 % of a_b"))
    100 \% of a\_b
    """
    return "".join(_LATEX.get(letter, letter) for letter in visible(text))


def report_tables(section: Section, lead_of: str | None = None) -> list[Table]:
    """Accuracy and lead by read-out, controls, and costs.

    Parameters
    ----------
    section : Section
        What is compared.
    lead_of : str, optional
        The label whose lead over the others is shown; by default ``loda`` or else the first.
    """
    chosen = reference(section, lead_of)
    by_readout = [
        table
        for readout in section.readouts
        for table in (accuracy_table(section, readout), lead_table(section, readout, chosen))
        if len(table.cells)
    ]
    return [*by_readout, controls_table(section), cost_table(section)]


def reference(section: Section, lead_of: str | None) -> str | None:
    """Label of the method whose lead is shown; None where the section lacks the named one."""
    if lead_of is not None:
        return lead_of if lead_of in section.groups else None
    return "loda" if "loda" in section.groups else next(iter(section.groups))


def accuracy_table(section: Section, readout: str) -> Table:
    """One row per method: mean and spread over seeds of every metric, for one read-out."""
    measures = of_readout(section.measures, readout)
    # Groups in which some run lacks the read-out have no row.
    by_group = (
        measures.groupby("group", sort=False)
        .filter(lambda rows: len(rows) == len(section.groups[rows.name]))
        .groupby("group", sort=False)
    )
    mean, deviation = by_group[[*METRIC_TITLES]].mean(), by_group[[*METRIC_TITLES]].std()
    # Ranked as shown, so that what looks equal is equally bold.
    several = by_group["tasks"].first() > 1
    rivals = mean[several | ~several.any()].map(lambda x: round(x, 2))
    best = rivals.max()
    best["forgetting"] = rivals["forgetting"].min()
    cells = pd.DataFrame(
        {
            **{METRIC_TITLES[c]: map(spread_text, mean[c], deviation[c]) for c in METRIC_TITLES},
            "seeds": by_group["seed"].agg(lambda seeds: seeds_text([*seeds])),
        },
        index=mean.index.rename("method"),
    )
    note = "The best of a column in bold."
    if deviation.notna().any(axis=None):
        note = f"Mean ± sample standard deviation over the seeds. {note}"
    if len(rivals) < len(mean):
        note += (
            " A method that learns all tasks at once has only the last accuracy and is not ranked."
        )
    bold = [
        (row, METRIC_TITLES[c]) for c in METRIC_TITLES for row in rivals.index[rivals[c] == best[c]]
    ]
    title = f"Accuracy, read-out {readout} (%)"
    return Table(title, cells, note, bold if len(rivals) > 1 else ())


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in words: ``101 to 110`` where they follow each other, all of them otherwise."""
    first, last = min(seeds), max(seeds)
    if len(seeds) > 2 and sorted(seeds) == [*range(first, last + 1)]:
        return f"{first} to {last}"
    return ", ".join(map(str, seeds))


def lead_table(section: Section, readout: str, lead_of: str | None) -> Table:
    """Paired differences between a method and each of the others, if there are pairs."""
    measures = of_readout(section.measures, readout)
    by_metric = {name: leads(measures, lead_of, name) for name in METRIC_TITLES}
    labels = by_metric["last"].index
    pairs = pd.DataFrame({name: ahead["pairs"] for name, ahead in by_metric.items()})
    counts = [dict.fromkeys((x.min(), x.max())) for _, x in pairs.loc[labels].iterrows()]
    cells = pd.DataFrame(
        {
            **{METRIC_TITLES[c]: lead_texts(x.reindex(labels)) for c, x in by_metric.items()},
            "pairs": [" to ".join(f"{count:.0f}" for count in ends) for ends in counts],
        },
        index=labels.rename("over"),
    )
    note = f"{lead_of} minus the method, over the seeds that both have."
    if by_metric["last"]["low"].notna().any():
        note += " In brackets the 95 % interval of Student's t."
    note += " Higher is better, except for forgetting."
    return Table(f"Lead of {lead_of}, read-out {readout} (points)", cells, note)


def verdict(section: Section, lead_of: str | None = None) -> list[str]:
    """Who ends highest under the first read-out, by how much, and whether that is significant.

    A difference is called significant where the 95 % interval of the paired differences leaves out
    0. Every pair is judged by itself; nothing corrects for their number.
    """
    readout = section.readouts[0]
    measures = of_readout(section.measures, readout)
    several = measures["tasks"].max() > 1
    ranked = measures[measures["tasks"] > 1] if several else measures
    means = ranked.groupby("group", sort=False)["last"].mean().sort_values(ascending=False)
    if means.empty:
        return []
    best, chosen = str(means.index[0]), reference(section, lead_of)
    seeds = measures["seed"].nunique()
    many = "one seed" if seeds == 1 else f"{seeds} seeds"
    texts = [
        f"{best} ends highest: {means[best]:.1f} % of the test images of all classes after the "
        f"last task (read-out {readout}, {many})."
    ]
    if several:
        for name, rows in measures[measures["tasks"] == 1].groupby("group", sort=False):
            at_once = (
                f"{name}, which learns all tasks at once, reaches {rows['last'].mean():.1f} %."
            )
            texts.append(at_once)
    if chosen not in means or len(means) == 1:
        return texts
    ahead = leads(ranked, chosen, "last")
    if ahead.empty:
        return [*texts, f"No seed of {chosen} is one of another method, so they are not compared."]
    nearest = next(name for name in means.index if name != chosen and name in ahead.index)
    text = f"{chosen} less {nearest}: {lead_texts(ahead.loc[[nearest]])[0]} points"
    if ahead["low"].isna().all():
        return [*texts, f"{text}. One seed is not enough to say whether that is by chance."]
    texts.append(f"{text} (95 % interval, paired over {ahead['pairs'][nearest]:.0f} seeds).")
    judged = {
        "significantly above": ahead[ahead["low"] > 0],
        "significantly below": ahead[ahead["high"] < 0],
        "not significantly different from": ahead[(ahead["low"] <= 0) & (ahead["high"] >= 0)],
    }
    parts = [f"{words} {', '.join(rows.index)}" for words, rows in judged.items() if len(rows)]
    return [*texts, f"{chosen} is {'; '.join(parts)}. Each pair is judged by itself at 95 %."]


def settings_tables(section: Section) -> list[Table]:
    """The settings in which the methods differ, those they share, and the versions."""
    settings = {
        label: {k: v for k, v in flat_settings(runs[0].experiment).items() if k != "seed"}
        for label, runs in section.groups.items()
    }
    names = list(dict.fromkeys(name for own in settings.values() for name in own))
    texts = {
        name: [str(own[name]) if name in own else DASH for own in settings.values()]
        for name in names
    }
    differ = {name: column for name, column in texts.items() if len(set(column)) > 1}
    shared = {name: column[0] for name, column in texts.items() if name not in differ}
    versions: dict[str, dict[str, None]] = {}
    for run in (run for runs in section.groups.values() for run in runs):
        for package, version in run.content["environment"].get("packages", {}).items():
            versions.setdefault(package, {})[str(version)] = None
    own = pd.DataFrame(differ, index=pd.Index([*settings], name="method"))
    tables = [Table("Settings that differ", own)] if differ else []
    tables.append(Table("Settings of all runs", _two_columns("setting", "value", shared)))
    if versions:
        shown = {package: ", ".join(found) for package, found in versions.items()}
        tables.append(Table("Versions", _two_columns("package", "version", shown)))
    return tables


def _two_columns(index: str, column: str, values: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame({column: [*values.values()]}, index=pd.Index([*values], name=index))


def controls_table(section: Section) -> Table:
    """What each method trains, keeps and spends; means over seeds."""
    by_group = section.measures.drop_duplicates("run").groupby("group", sort=False)
    columns = {
        "trained parameters": ("trained_parameters", ",.0f"),
        "kept by the method (bytes)": ("method_bytes", ",.0f"),
        "kept by the read-outs (bytes)": ("readout_bytes", ",.0f"),
        "training (s)": ("training_seconds", ",.1f"),
        "optimiser steps": ("steps", ",.0f"),
        "image passes": ("image_passes", ",.0f"),
    }
    values = by_group[[column for column, _ in columns.values()]].mean()
    values["trained_parameters"] = by_group["trained_parameters"].max()
    note = (
        "Trained parameters: the largest number in any task, its head included. Kept: what is "
        "carried from task to task besides the model and the heads, at the end. Steps and passes: "
        "totals over the stream; a pass is one image forward, and backward as far as something is "
        "trained. A gradient-aligned mini-batch takes two steps and passes each of its images "
        "twice. Means over the seeds."
    )
    return Table("Controls", _formatted(values, columns), note)


def cost_table(section: Section) -> Table:
    """Time and memory of a task by method; the time is the mean over tasks and seeds."""
    runs = section.measures.drop_duplicates("run")
    each = runs[["seconds", "training_seconds"]].div(runs["tasks"], axis=0)
    time = each.groupby(runs["group"], sort=False).mean()
    memory = runs.groupby("group", sort=False)[["memory_mib", "gpu_memory_mib"]].max()
    columns = {
        "time per task (s)": ("seconds", ",.1f"),
        "training only (s)": ("training_seconds", ",.1f"),
        "peak memory (MiB)": ("memory_mib", ".0f"),
        "peak GPU memory (MiB)": ("gpu_memory_mib", ".0f"),
    }
    cells = _formatted(time.join(memory), columns)
    return Table("Costs", cells, "Peak memory: the largest of all tasks.")


def _formatted(values: pd.DataFrame, columns: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """Texts of numbers: by title, a column and its format; a dash for NaN."""
    texts = {
        title: [DASH if isnan(x) else format(x, form) for x in values[column]]
        for title, (column, form) in columns.items()
    }
    return pd.DataFrame(texts, index=values.index.rename("method"))


def side_by_side(sections: Sequence[Section], lead_of: str | None = None) -> list[Table]:
    """Last accuracy by method, and the lead of one method, with one column per section.

    A part of one sweep is compared with the same part of the others; if some sweep has no parts,
    whole sweeps are compared. Differences are paired only within a section.
    """
    tables = []
    for part, columns in shared_parts(sections).items():
        labels = in_several(section.groups for section in columns.values())
        for readout in shared_readouts(columns.values()):
            texts = {}
            for name, section in columns.items():
                last = of_readout(section.measures, readout).groupby("group")["last"]
                spread = last.agg(["mean", "std"]).reindex(labels)
                texts[name] = [*map(spread_text, spread["mean"], spread["std"])]
            title = f"Side by side{_of(part)}: last accuracy, read-out {readout} (%)"
            cells = pd.DataFrame(texts, index=pd.Index(labels, name="method"))
            note = "Mean ± sample standard deviation over the seeds."
            tables += [Table(title, cells, note), *_side_leads(part, columns, readout, lead_of)]
    return tables


def _side_leads(
    part: str, columns: dict[str, Section], readout: str, lead_of: str | None
) -> Iterator[Table]:
    """The table of leads, if there is a lead in any column."""
    chosen = {name: reference(section, lead_of) for name, section in columns.items()}
    gains = {
        name: differences(of_readout(section.measures, readout), chosen[name], "last")
        for name, section in columns.items()
    }
    by_column = {name: intervals(gain) for name, gain in gains.items()}
    labels = in_several(section.groups for section in columns.values())
    labels = [label for label in labels if any(label in x.index for x in by_column.values())]
    if not labels:
        return
    names = list(dict.fromkeys(name for name in chosen.values() if name is not None))
    headers = [c if len(names) == 1 else f"{c}: {chosen[c] or ''}" for c in columns]
    note = (
        "Last accuracy less that of the method, paired over the seeds that both have on the same "
        "data and backbone; in brackets the 95 % interval of Student's t, and the number of pairs."
    )
    if len(columns) == 2 and len(names) == 1:
        # Over the seeds and class orders that both methods have in both columns.
        one, other = gains.values()
        change = intervals(other - one)
        if any(label in change.index for label in labels):
            by_column["change"] = change
            first, second = headers
            note += f" Change: the lead with {second} less that with {first}, seed by seed."
            headers.append("change")
    texts = [lead_texts(x.reindex(labels), pairs=True) for x in by_column.values()]
    texts_by_header = dict(zip(headers, texts, strict=True))
    cells = pd.DataFrame(texts_by_header, index=pd.Index(labels, name="over"))
    title = f"Side by side{_of(part)}: lead of {' or '.join(names)}, read-out {readout} (points)"
    yield Table(title, cells, note)


def shared_parts(sections: Sequence[Section]) -> dict[str, dict[str, Section]]:
    """Sections by part and the name of their column; parts in which two share a method."""
    words = [section.base.split(", ") for section in sections]
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    common = min(len(list(alike)), *(len(own) - 1 for own in words))
    titled = all(section.part for section in sections)
    parts: dict[str, dict[str, Section]] = {}
    for section in sections:
        name = ", ".join(section.base.split(", ")[common:])
        columns = parts.setdefault(section.part if titled else "", {})
        earlier = columns[name].groups if name in columns else {}
        columns[name] = replace(section, groups={**earlier, **section.groups})
    return {k: part for k, part in parts.items() if in_several(s.groups for s in part.values())}


def shared_readouts(sections: Iterable[Section]) -> list[str]:
    """Read-outs that at least two of the sections have, in their order; else the first one."""
    kinds = [section.readouts for section in sections]
    return in_several(kinds) or kinds[0][:1]


def in_several(columns: Iterable[Iterable[str]]) -> list[str]:
    """Names that occur in at least two of the columns, in order of first appearance."""
    names = [name for column in columns for name in column]
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def of_readout(measures: pd.DataFrame, readout: str) -> pd.DataFrame:
    """The rows of one read-out."""
    return measures[measures["readout"] == readout]


def leads(measures: pd.DataFrame, lead_of: str | None, column: str) -> pd.DataFrame:
    """How far one group is ahead of each of the others: paired differences with their intervals.

    Parameters
    ----------
    measures : DataFrame
        Rows of :func:`training.report.load`, of one section and read-out.
    lead_of : str or None
        The group whose lead is computed.
    column : str
        What is compared, such as ``last``.

    Returns
    -------
    DataFrame
        As :func:`intervals` gives it, one row per group that shares a seed and class order.
    """
    return intervals(differences(measures, lead_of, column))


def differences(measures: pd.DataFrame, lead_of: str | None, column: str) -> pd.DataFrame:
    """One group minus each of the others: rows are seeds and class orders, columns groups."""
    values = measures.pivot(index=["seed", "order"], columns="group", values=column)
    if lead_of not in values:
        return pd.DataFrame()
    # A pivot sorts its columns; those of a report are in the order of its groups.
    others = [label for label in dict.fromkeys(measures["group"]) if label != lead_of]
    return values[others].rsub(values[lead_of], axis=0)


def intervals(differences: pd.DataFrame, *, confidence: float = 0.95) -> pd.DataFrame:
    r"""Mean of paired differences, column by column, with Student's interval.

    .. math:: \bar d \pm t_{n-1,\,(1+c)/2} \; s_d / \sqrt n

    for the n differences d of one seed each, with sample standard deviation s. The interval
    assumes that the differences are independent and nearly normal.

    Parameters
    ----------
    differences : DataFrame
        One row per seed, or whatever else makes a pair; NaN where there is no pair.
    confidence : float
        c, between 0 and 1.

    Returns
    -------
    DataFrame
        One row per column with at least one pair: ``lead``, ``low``, ``high``, ``pairs``. A single
        pair has no interval (NaN).

    Examples
    --------
    >>> intervals(pd.DataFrame({"frozen": [1.0, 2.0], "joint": [float("nan"), 3.0]})).round(2)
            lead   low  high  pairs
    frozen   1.5 -4.85  7.85      2
    joint    3.0   NaN   NaN      1
    """
    from scipy.stats import t  # slow to import, and only needed here

    pairs = differences.count()
    pairs = pairs[pairs > 0]
    mean, deviation = differences[pairs.index].mean(), differences[pairs.index].std()
    half = t.ppf((1 + confidence) / 2, pairs - 1) * deviation / np.sqrt(pairs)
    return pd.DataFrame({"lead": mean, "low": mean - half, "high": mean + half, "pairs": pairs})


def lead_texts(leads: pd.DataFrame, *, pairs: bool = False) -> list[str]:
    """Leads with their intervals, and the number of pairs if asked for.

    Examples
    --------
    >>> lead_texts(pd.DataFrame({"lead": [1.5], "low": -4.853, "high": 7.853, "pairs": 2}))
    ['+1.50 [−4.85, +7.85]']
    """
    texts = []
    for lead, low, high, count in leads.itertuples(index=False):
        text = DASH if isnan(lead) else signed(lead)
        text += "" if isnan(low) else f" [{signed(low)}, {signed(high)}]"
        texts.append(f"{text} ({count:.0f})" if pairs and not isnan(lead) else text)
    return texts


def spread_text(mean: float, deviation: float = nan) -> str:
    """Mean and standard deviation with two decimals; a dash where there is none."""
    if isnan(mean):
        return DASH
    centre = f"{mean:z.2f}".replace("-", "−")
    return centre if isnan(deviation) else f"{centre} ± {deviation:.2f}"


def signed(value: float) -> str:
    """A number with two decimals and its sign."""
    return f"{value:+z.2f}".replace("-", "−")  # z: turns -0.0 into 0.0


def _of(part: str) -> str:
    return f" ({part})" if part else ""


def _markdown_row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, texts))} |"
