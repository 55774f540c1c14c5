"""The accuracy matrix as a table: for the terminal and as Markdown."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from training.metrics import AccuracyMatrix

__all__ = ["accuracy_table", "markdown_table", "plain_table"]


def _cells(matrix: "AccuracyMatrix") -> list[list[str]]:
    """Header and rows in per cent: task learned, accuracy on each task, accuracy on all seen."""
    tasks = len(matrix)
    rows = [["after task", *(f"task {j + 1}" for j in range(tasks)), "all seen"]]
    for i, (row, seen) in enumerate(zip(matrix.matrix, matrix.curve, strict=True)):
        blanks = [""] * (tasks - len(row))
        rows.append([str(i + 1), *(f"{100 * a:.1f}" for a in row), *blanks, f"{100 * seen:.1f}"])
    return rows


def _caption(matrix: "AccuracyMatrix") -> str:
    return (
        f"last {100 * matrix.last:.2f} · average {100 * matrix.average:.2f} · "
        f"forgetting {100 * matrix.forgetting:.2f} · "
        f"backward transfer {100 * matrix.backward_transfer:+.2f}"
    )


def accuracy_table(matrix: "AccuracyMatrix", *, title: str = "Accuracy (%)") -> "Table":
    """A `rich` table: a row a task learned, a column a task, the metrics below.

    Examples
    --------
    >>> from training.metrics import AccuracyMatrix
    >>> accuracy_table(AccuracyMatrix((1,), ((9,),), ((10,),))).row_count
    1
    """
    from rich.table import Table

    header, *rows = _cells(matrix)
    table = Table(title=title, caption=_caption(matrix), header_style="bold")
    table.add_column(header[0], justify="right", no_wrap=True)
    for name in header[1:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(header[-1], justify="right", style="bold", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def plain_table(matrix: "AccuracyMatrix") -> str:
    """The same as aligned plain text, for logs and pipes.

    Examples
    --------
    >>> from training.metrics import AccuracyMatrix
    >>> print(plain_table(AccuracyMatrix((1, 1), ((9,), (6, 4)), ((10,), (10, 5)))))
    after task  task 1  task 2  all seen
             1    90.0              90.0
             2    60.0    80.0      66.7
    last 66.67 · average 78.33 · forgetting 30.00 · backward transfer -30.00
    """
    rows = _cells(matrix)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, _caption(matrix)])


def markdown_table(matrix: "AccuracyMatrix") -> str:
    """The same as a Markdown table with the metrics in a line below.

    Examples
    --------
    >>> from training.metrics import AccuracyMatrix
    >>> print(markdown_table(AccuracyMatrix((1,), ((9,),), ((10,),))).splitlines()[2])
    | 1 | 90.0 | 90.0 |
    """
    header, *rows = _cells(matrix)
    rule = ["---:"] * len(header)
    lines = ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]
    return "\n".join([*lines, "", _caption(matrix)])
