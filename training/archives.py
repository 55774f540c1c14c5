"""Zip archives of strangers (``.npz`` files), looked at before they are unpacked."""

import zipfile
from pathlib import Path

_MUCH = 2**30
_RATIO = 200
"""Numbers that were measured or trained hardly compress, repeated ones a thousandfold."""


def require_plausible_archive(path: Path) -> None:
    """Refuse an archive that would unpack to far more than it is.

    Raises
    ------
    ValueError
        If it claims more than 1 GiB and more than 200 times its own size, or is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError) as error:
        msg = f"it is no archive: {error}"
        raise ValueError(msg) from error
    if claimed > max(_MUCH, _RATIO * path.stat().st_size):
        msg = f"its {path.stat().st_size} bytes claim to be {claimed} unpacked"
        raise ValueError(msg)
