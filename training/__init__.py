"""Class-incremental experiments with LoDA: data, methods, the training loop and the command line.

Importing this package loads nothing heavy; the parts that need torch are imported when used.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.analysis.predict import Classifier

__all__ = ["load"]


def load(run: str | Path, *, device: str = "cpu") -> "Classifier":
    """Load the trained classifier of a finished run.

    Parameters
    ----------
    run : str or Path
        A run folder.
    device : str, default "cpu"
        Where the model and its read-outs go, ``"cuda"`` say.

    Returns
    -------
    Classifier
        With ``classes``, ``predict(images)`` and ``logits(batch)``.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If there is no such device here, or files of the run are damaged.

    Examples
    --------
    >>> load("no/such/run")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no run folder no/such/run
    """
    from training.analysis.predict import load_classifier

    return load_classifier(Path(run)).to(device)
