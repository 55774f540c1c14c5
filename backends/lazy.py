"""Public names of a package that are loaded when they are first used (PEP 562)."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def load_on_use(
    package: str, names: Sequence[str], modules: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose modules are slow to import.

    Parameters
    ----------
    package : str
        Its ``__name__``.
    names : sequence of str
        Its ``__all__``.
    modules : sequence of str
        Modules of the package that are searched for a name, those that load fast first. None of
        them may have the name of a public object: the import of a submodule sets an attribute.

    Examples
    --------
    >>> find, listed = load_on_use("backends.torch", ["LoDASettings"], ["settings"])
    >>> find("LoDASettings").__name__, listed()
    ('LoDASettings', ['LoDASettings'])
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in names:
            for module in modules:
                public = vars(import_module(f"{package}.{module}")).get(name)
                if public is not None:
                    # Kept as an attribute, so that the next use does not come here.
                    setattr(sys.modules[package], name, public)
                    return public
        msg = f"module {package!r} has no attribute {name!r}"
        raise AttributeError(msg)

    return __getattr__, lambda: sorted(names)
