"""The names of the methods: those of the package, and those that other packages add."""

from importlib.metadata import entry_points

BUILT_IN = (
    "loda",
    "seq_lora",
    "joint",
    "frozen",
    "ncm",
    "ranpac_frozen",
    "null_lora",
    "o_lora",
    "inflora",
    "sd_lora",
)
UNTRAINED = ("frozen", "ncm", "ranpac_frozen")
"""Those that train no tensor of the backbone."""

GROUP = "loda.methods"
"""Entry-point group in which another package names its methods."""


def method_names() -> list[str]:
    """Names that ``method.name`` may have; nothing is imported to find them.

    Examples
    --------
    >>> method_names()[:2]
    ['loda', 'seq_lora']
    """
    added = sorted({entry.name for entry in entry_points(group=GROUP)} - set(BUILT_IN))
    return [*BUILT_IN, *added]
