"""Fixtures shared by all tests: array libraries, small runs, and where recorded material lies."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import libraries
import pytest

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "thorough",
    parent=hypothesis.settings.get_profile("default"),
    max_examples=500,
    derandomize=False,
)
# The first example that fails is enough: shrinking it would take most of the time.
hypothesis.settings.register_profile(
    "mutants",
    parent=hypothesis.settings.get_profile("default"),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    report_multiple_bugs=False,
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A shell starts its background jobs with Ctrl-C ignored; so would be what tests start from there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=libraries.chosen(), scope="session")
def xp(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """An array library, as the namespace its users import; ``to_library`` knows its device.

    Absent libraries give no parameter; ``test_libraries`` says which are absent and why.
    """
    with libraries.opened(request.param) as namespace:
        yield namespace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses JAX, and what needs a GPU: they run apart (see the Makefile).

    JAX starts threads, and the loaders' worker processes are forked, which do not go together.
    """
    for item in items:
        call = getattr(item, "callspec", None)
        given = [str(value) for value in call.params.values()] if call is not None else []
        if any(value.startswith("jax") for value in given):
            item.add_marker("jax")
        if any(value == "cupy" or value.endswith("-cuda") for value in given):
            item.add_marker("gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu") is None:
        return
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fewer examples on JAX: it compiles every operation anew for every shape."""
    call = getattr(item, "callspec", None)
    test = getattr(item, "function", None)
    kept = getattr(test, "_hypothesis_internal_use_settings", None)
    if call is None or kept is None or not str(call.params.get("xp")).startswith("jax"):
        return (yield)
    fewer = hypothesis.settings(kept, max_examples=max(2, kept.max_examples // 8))
    test._hypothesis_internal_use_settings = fewer
    try:
        return (yield)
    finally:
        test._hypothesis_internal_use_settings = kept


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    if "torch" in sys.modules or "torch" in libraries.chosen():
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that all small runs are trained on."""
    from small_runs import tree

    return tree(tmp_path_factory)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder tree of five classes, with five training and two test images of each."""
    from image_folders import grow

    return grow(tmp_path / "tree", {"train": 5, "test": 2})


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run, which no test may change."""
    from small_runs import finished

    return finished(tmp_path_factory)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished small run, to be changed."""
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the recorded reference run and development data; absent for users."""
    folder = Path(os.environ.get("LODA_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "reference" / "trace.npz").is_file():
        pytest.skip(f"the recorded run is not here: no reference/trace.npz under {folder}")
    return folder


@pytest.fixture
def model() -> Any:
    """A tiny transformer, the same every time."""
    from small_runs import small_vit

    return small_vit()
