"""Class-incremental experiments with LoDA: data, methods, the training loop and the command line.

Importing this package loads nothing heavy; the parts that need torch are imported when used.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.inference import Classifier

__all__ = ["load"]


def load(run: str | Path) -> "Classifier":
    """Load the trained classifier of a finished run.

    Parameters
    ----------
    run : str or Path
        A run folder.

    Returns
    -------
    Classifier
        With ``classes``, ``predict(images)`` and ``logits(batch)``.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.

    Examples
    --------
    >>> load("no/such/run")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no run folder no/such/run
    """
    from training.inference import load_classifier

    return load_classifier(Path(run))
