"""Check the solutions that any code has written to an ``.npz`` file."""

import json
import re
import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from loda_math._arrays import Array
from loda_math._validation import check_scalar
from loda_math.verify.layer import LAYER_ARRAYS, Check, LayerSettings, verify_layer

# TASK/LAYER/NAME of an array; a fused layer may call its weight by what it is.
_KEY = re.compile(rf"([^/]+)/(.+)/({'|'.join(LAYER_ARRAYS)}|qkv_(?:before|after))")
# An archive may announce this many bytes, or this many times its own size, and is then believed:
# measured or trained numbers hardly compress, whereas repeated ones do a thousandfold.
_PLAUSIBLE_BYTES, _PLAUSIBLE_RATIO = 2**30, 200


class Archive(NamedTuple):
    """What an ``.npz`` file holds of a method's solutions.

    Attributes
    ----------
    layers : dict of (str, str) to dict of str to array
        Arrays by task and layer, in natural order.
    settings : LayerSettings
        Under what they were computed.
    """

    layers: dict[tuple[str, str], dict[str, Array]]
    settings: LayerSettings


def read_archive(path: str | PathLike[str]) -> Archive:
    """Read an ``.npz`` file of arrays ``TASK/LAYER/NAME``, which any code can write.

    Parameters
    ----------
    path : path
        The file. Arrays of other names are not read. A string ``settings`` (JSON) may set any
        field of :class:`LayerSettings`. Nothing in it is run (``allow_pickle=False``).

    Returns
    -------
    Archive
        Layers without ``moment_new`` are left out: nothing in them can be checked.

    Raises
    ------
    ModuleNotFoundError
        If NumPy is not installed.
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no ``.npz`` file or damaged, or its settings are invalid; the message names it.

    See Also
    --------
    verify_layer : The names and shapes of the arrays.
    """
    import numpy as np  # the format is NumPy's; the checks themselves take any library

    path = Path(path)
    if not path.is_file():
        msg = f"no file {path}"
        raise FileNotFoundError(msg)
    layers: dict[tuple[str, str], dict[str, Array]] = {}
    try:
        require_plausible_archive(path)
        # NumPy leaves a file that it cannot read open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            text = str(archive["settings"]) if "settings" in archive.files else "{}"
            for key in archive.files:
                if place := _KEY.fullmatch(key):
                    task, layer, name = place.groups()
                    name = name.replace("qkv_", "weight_")
                    layers.setdefault((task, layer), {})[name] = archive[key]
    except Exception as error:  # damaged or foreign archives raise all kinds of errors
        msg = f"cannot read {path} as .npz: {_one_line(error)}"
        raise ValueError(msg) from error
    try:
        settings = LayerSettings(**json.loads(text))
    except (ValueError, TypeError) as error:
        msg = f"{path}, settings are malformed: {_one_line(error)}"
        raise ValueError(msg) from error
    places = sorted(
        (place for place, arrays in layers.items() if "moment_new" in arrays),
        key=lambda place: [natural_sort_key(name) for name in place],
    )
    return Archive({place: layers[place] for place in places}, settings)


def verify_archive(path: str | PathLike[str], *, tolerance: float = 1e-5) -> list[Check]:
    """Check every solution in an ``.npz`` file, in float64 NumPy.

    ``python -m loda_math.verify FILE.npz`` prints the result.

    Parameters
    ----------
    path : path
        As in :func:`read_archive`.
    tolerance : float, default 1e-5
        As in :func:`verify_layer`.

    Returns
    -------
    list of Check
        By task and layer.

    Raises
    ------
    ModuleNotFoundError, FileNotFoundError
        As in :func:`read_archive`.
    ValueError
        If the file is damaged, arrays in it do not fit together, nothing in it can be checked, or
        the tolerance is not positive.

    See Also
    --------
    verify_layer : The same for the arrays of one layer, of any library.
    verification_table : The checks as text.
    """
    tolerance = check_scalar("tolerance", tolerance, positive=True)
    archive = read_archive(path)
    checks: list[Check] = []
    for (task, layer), arrays in archive.layers.items():
        try:
            results = verify_layer(arrays, archive.settings, tolerance=tolerance)
        except (ValueError, TypeError, ArithmeticError) as error:
            msg = f"{path}, task {task}, layer {layer} cannot be checked: {_one_line(error)}"
            raise ValueError(msg) from error
        checks += [check._replace(task=task, layer=layer) for check in results]
    if not checks:
        msg = (
            f"{path} holds nothing to check: bases must come with the moments they were chosen from"
        )
        raise ValueError(msg)
    return checks


def verification_table(checks: Sequence[Check]) -> str:
    """Aligned plain text: one line per check, and the overall verdict below.

    Parameters
    ----------
    checks : sequence of Check
        As :func:`verify_archive` or :func:`verify_layer` returns them.

    Returns
    -------
    str

    See Also
    --------
    verify_archive : The checks of a file.

    Examples
    --------
    >>> print(verification_table([Check("merge", True, None, 1e-8, None, task="1", layer="a.b")]))
    task  layer  what   defect  residual  gap  new  old  rank  verdict
    1     a.b    merge           1.0e-08                            ok
    1 of 1 checks passed
    """
    rows = [["task", "layer", "what", "defect", "residual", "gap", "new", "old", "rank", "verdict"]]
    for c in checks:
        small = ("" if x is None else f"{x:.1e}" for x in (c.defect, c.residual, c.gap))
        shares = ("" if x is None else f"{x:.4f}" for x in (c.new, c.old))
        rank = "" if c.directions is None else str(c.directions)
        named = (printable(c.task), printable(c.layer), c.what)
        rows.append([*named, *small, *shares, rank, "ok" if c.passed else "OFF"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [c.ljust(w) if k < 3 else c.rjust(w) for k, (c, w) in enumerate(cells)]
        lines.append("  ".join(padded).rstrip())
    passed = sum(c.passed for c in checks)
    return "\n".join([*lines, f"{passed} of {len(checks)} checks passed"])


def require_plausible_archive(path: Path) -> None:
    """Refuse a zip archive, such as an ``.npz`` file, that unpacks to far more than its size.

    Raises
    ------
    ValueError
        If it announces more than 1 GiB and more than 200 times its own size, or is no zip archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError) as error:
        msg = f"it is not a zip archive: {error}"
        raise ValueError(msg) from error
    size = path.stat().st_size
    if unpacked > max(_PLAUSIBLE_BYTES, _PLAUSIBLE_RATIO * size):
        msg = f"an archive of {size} bytes must not unpack to {unpacked}"
        raise ValueError(msg)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)


def printable(name: str) -> str:
    """A name from somebody's file, without what moves the cursor or hides and reorders text."""
    shown = (x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in name)
    return "".join(shown)


def natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    """Sorting key under which layer 10 comes after layer 2.

    Examples
    --------
    >>> sorted(["blocks.10.qkv", "blocks.2.qkv"], key=natural_sort_key)
    ['blocks.2.qkv', 'blocks.10.qkv']
    """
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
