"""Tables as data, and their text as Markdown and LaTeX."""

from collections.abc import Sequence
from typing import NamedTuple

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "|": r"\textbar{}",
    "\n": " ",
}
_GREEK = (
    "αalpha βbeta γgamma δdelta εepsilon ζzeta ηeta θtheta ιiota κkappa λlambda μmu νnu ξxi πpi "
    "ρrho σsigma τtau υupsilon φphi χchi ψpsi ωomega ΓGamma ΔDelta ΘTheta ΛLambda ΞXi ΠPi ΣSigma "
    "ΦPhi ΨPsi ΩOmega"
)
_LATEX |= {name[0]: rf"$\{name[1:]}$" for name in _GREEK.split()}


class Cell(NamedTuple):
    """A cell; the best of its column is set in bold."""

    text: str
    best: bool = False


class Table(NamedTuple):
    """A table of a report.

    Attributes
    ----------
    title : str
        A line above.
    header : sequence of str
        Names of the columns; the first one is text, the others are numbers.
    rows : sequence of sequences of Cell
        As wide as the header.
    note : str
        How to read it; may be empty.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def markdown(table: Table, *, level: int = 3) -> str:
    r"""The table under a heading of a level.

    Examples
    --------
    >>> print(markdown(Table("T", ["m", "x"], [[Cell("a|b"), Cell("1", best=True)]], "Note.")))
    ### T
    <BLANKLINE>
    | m | x |
    |---|---:|
    | a\|b | **1** |
    <BLANKLINE>
    Note.
    """
    lines = [_row(table.header), f"|---|{'---:|' * (len(table.header) - 1)}"]
    lines += [_row([f"**{c.text}**" if c.best else c.text for c in row]) for row in table.rows]
    parts = [f"{'#' * level} {table.title}", "\n".join(lines), table.note]
    return "\n\n".join(part for part in parts if part)


def latex(table: Table) -> str:
    r"""The table as a float with the rules of booktabs; every character is escaped.

    Examples
    --------
    >>> print(latex(Table("T", ["m", "x"], [[Cell("a_b"), Cell("1 ± 2", best=True)]])))
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
    rows = [_latex_row([escape_latex(name) for name in table.header]), r"\midrule"]
    for row in table.rows:
        texts = [(escape_latex(cell.text), cell.best) for cell in row]
        rows.append(_latex_row([rf"\textbf{{{t}}}" if best else t for t, best in texts]))
    caption = escape_latex(f"{table.title}. {table.note}" if table.note else table.title)
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{caption}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        *(f"    {line}" for line in (r"\toprule", *rows, r"\bottomrule")),
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def escape_latex(text: str) -> str:
    r"""Text without letters that LaTeX takes for commands.

    Examples
    --------
    >>> print(escape_latex("100 % of a_b"))
    100 \% of a\_b
    """
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(text) for text in texts) + " |"


def _escape(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _latex_row(texts: Sequence[str]) -> str:
    # The command that ends the line above would take these for an argument of its own.
    guard = "{}" if texts[0].lstrip().startswith(("[", "*")) else ""
    return guard + " & ".join(texts) + r" \\"
