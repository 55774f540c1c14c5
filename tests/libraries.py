"""The array libraries that the tests run over: how each is opened, and the way in and out.

JAX counts twice, with and without float64. Where a library has a second device the tests use it:
an array that is created on the default one then shows.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

NAMES = ("numpy", "torch", "torch-cuda", "array_api_strict", "jax", "jax-x32", "cupy", "mlx")


@dataclass
class Opened:
    """The library under test."""

    namespace: ModuleType = np
    device: Any = None
    float64: bool = True


_current = Opened()


def absent(name: str) -> str:
    """Why the library cannot run here; empty where it can."""
    module, _, variant = name.partition("-")
    if find_spec(module) is None:
        return f"{module} is not installed"
    if (module == "cupy" or variant == "cuda") and not import_module(module).cuda.is_available():
        return f"no CUDA device for {module}"
    return ""


def present() -> list[str]:
    """The libraries that can run here."""
    return [name for name in NAMES if not absent(name)]


def chosen() -> list[str]:
    """The libraries that the property tests run over.

    JAX compiles every operation anew for every shape, which takes longer than all the others
    together, so only ``test_libraries`` (agreement, ``jit``, ``vmap``) runs over it by default.
    ``LODA_LIBRARIES=jax,jax-x32`` with ``-m jax`` runs every property over it.
    """
    wanted = os.environ.get("LODA_LIBRARIES", "")
    if wanted:
        return wanted.split(",")
    return [name for name in present() if not name.startswith("jax")]


@contextmanager
def opened(name: str) -> Iterator[ModuleType]:
    """Make a library the one under test; skips, with the reason, where it cannot run."""
    if reason := absent(name):
        pytest.skip(reason)
    module, _, variant = name.partition("-")
    library = import_module(module)
    context: Any = nullcontext()
    device = None
    if module == "jax":
        device, context = _jax(library, float64=variant != "x32")
        library = library.numpy
    elif module == "mlx":
        library = import_module("mlx.core")
    elif module == "array_api_strict":
        device = library.Device("device1")
    elif variant == "cuda":
        device = library.device("cuda", library.cuda.device_count() - 1)
    with context:
        settings = Opened(library, device, variant != "x32")
        before = dict(vars(_current))
        vars(_current).update(vars(settings))
        try:
            yield library
        finally:
            vars(_current).update(before)


def _jax(jax: ModuleType, *, float64: bool) -> tuple[Any, Any]:
    """The last device (on a host: one of two), and the context that sets the precision."""
    with suppress(AttributeError, RuntimeError):  # an older JAX, or its backend runs already
        jax.config.update("jax_num_cpu_devices", 2)
    home = jax if hasattr(jax, "enable_x64") else jax.experimental
    return jax.devices()[-1], home.enable_x64(float64)


def has_dtype(dtype: str) -> bool:
    """Whether the library under test has this dtype."""
    return dtype != "float64" or _current.float64


def needs_float64(xp: ModuleType) -> None:
    """Skip what only holds where the library solves in float64."""
    if widest_dtype(xp) != "float64":
        pytest.skip(f"{xp.__name__} runs without float64 here")


def widest_dtype(xp: ModuleType) -> str:
    """Name of the widest real dtype of the library."""
    return "float64" if xp is not _current.namespace or _current.float64 else "float32"


def from_numpy(xp: ModuleType, x: NDArray[Any]) -> Any:
    """An array of the library, on the device under test."""
    mine = xp is _current.namespace
    if x.dtype == np.float64:
        needs_float64(xp)
    device = _current.device if mine else None
    if xp.__name__ == "torch":
        return xp.from_numpy(x).to(device)
    if xp.__name__ == "jax.numpy":
        import jax

        return jax.device_put(xp.asarray(x), device)
    if xp.__name__ == "array_api_strict":
        return xp.asarray(x, device=device)
    if xp.__name__ == "mlx.core":  # which makes float32 of float64 unless told
        return xp.array(x, dtype=getattr(xp, "bool_" if x.dtype == bool else x.dtype.name))
    return xp.asarray(x)


def to_host(x: Any) -> NDArray[Any]:
    """A NumPy array of the same values (half precision of torch as float64)."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        return np.asarray((x.double() if x.is_floating_point() else x).numpy())
    if type(x).__module__.startswith("cupy"):
        return np.asarray(x.get())
    if type(x).__module__.startswith("array_api_strict"):
        import array_api_strict

        return np.asarray(x.to_device(array_api_strict.Device("CPU_DEVICE")))
    return np.asarray(x)
