"""Components: found by name, entry point or import path; their options read, checked and built."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pytest

from training.components import (
    Component,
    Registry,
    at_least,
    check_seed,
    is_import_path,
    not_negative,
    positive,
    refuse_null,
    summary,
)

SHAPES = '''
"""Shapes of a package that nobody has installed."""

class Square:
    """A square.

    Parameters
    ----------
    side
        Length of a side.
    """

    def __init__(self, side: float = 1.0, *, colour: str | None = None) -> None:
        if side <= 0:
            raise ValueError(f"side must be positive, got {side}")
        self.side, self.colour = side, colour

    def area(self):
        return self.side**2

class Box:
    """A box, whose further options are those of a square."""

    def __init__(self, name: str, height: float, **square) -> None:
        self.name, self.base, self.height = name, Square(**square), height

    def area(self):
        return self.base.area()

class Untyped:
    """A shape whose options have no types."""

    def __init__(self, corners, size: float = 1.0) -> None:
        pass

    def area(self):
        return 0

class Point:
    """Without the function that makes a shape."""

length = 3
'''


@pytest.fixture(autouse=True)
def _shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module in the working directory, which is not on the path of imports."""
    (tmp_path / "shapes_of_mine.py").write_text(SHAPES, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("shapes_of_mine", None)


REGISTRY = Registry(
    "shape",
    {"square": "shapes_of_mine.Square", "box": "shapes_of_mine.Box"},
    requires=("area",),
    group="loda.shapes_of_tests",
    other=lambda name: "shapes_of_mine.Box" if name.startswith("box:") else None,
)


@dataclass
class Shape(Component):
    """A shape.

    Parameters
    ----------
    name
        square or box.
    layer
        What lies above.
    """

    registry = REGISTRY
    section = "shape"

    name: str = "square"
    layer: int = 0
    tags: list[str] = field(default_factory=list)


def test_options_are_completed_and_built() -> None:
    shape = Shape("square", {"side": 2}, layer=3)
    assert shape.options == {"side": 2.0, "colour": None}
    built = shape.build()
    assert (built.side, built.colour) == (2.0, None)
    assert shape.build() is not built
    assert shape.kind is type(built)
    assert replace(shape, options={**shape.options, "side": 4}).build().area() == 16
    assert shape == Shape("square", {"side": 2.0, "colour": None}, layer=3)


def test_options_that_a_constructor_hands_on_are_its_options() -> None:
    assert REGISTRY.options("box") == {"height": None, "side": 1.0, "colour": None}
    shape = Shape("box", {"height": 2.0, "side": 3.0})
    assert shape.build().area() == 9
    # The chosen name is handed over, and no option.
    assert shape.build().name == "box"
    assert Shape("box:blue", {"height": 1.0}).build().name == "box:blue"
    assert "name" not in shape.options


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("square", {"sides": 3}, "sides.*did you mean shape.side"),
        ("square", {"side": "long"}, "side"),
        ("square", {"side": None}, "shape.side"),
        ("square", {"side": -1.0}, "side must be positive, got -1"),
        ("box", {}, "shape.height must be given"),
        ("square", {"height": 1.0}, "another shape: box"),
        ("shapes_of_yours.Square", {"sides": 1}, "shapes_of_yours"),
        ("box", {"height": 1.0, "side": -1.0}, "side"),
        ("circle", {}, "circle"),
        ("shapes_of_mine.Circle", {}, "Circle"),
        ("shapes_of_mine.Point", {}, "area"),
        ("shapes_of_mine.Untyped", {"corners": 3}, "corners.*annotate"),
        ("shapes_of_mine.length", {}, "class"),
        ("shapes_of_yours.Square", {}, "shapes_of_yours"),
        ("subprocess.Popen", {"args": "touch made"}, "area"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, options: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        Shape(name, options)
    assert not (tmp_path / "made").exists()


def test_a_class_is_found_by_its_import_path() -> None:
    shape = Shape("shapes_of_mine.Square", {"side": 3})
    assert shape.build().area() == 9
    assert not REGISTRY.is_packaged(shape.name)
    assert REGISTRY.is_packaged("square")


def test_a_class_of_the_script_that_runs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ModuleType("script_of_mine")  # without a spec, as __main__ is
    script.__dict__["Square"] = Shape("square").kind
    monkeypatch.setitem(sys.modules, script.__name__, script)
    assert is_import_path("script_of_mine.Square")
    assert Shape("script_of_mine.Square", {"side": 3}).build().area() == 9


def test_the_working_directory_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "fractions.py").write_text("raise AssertionError('run')", "utf-8")
    _ = Shape("shapes_of_mine.Square")  # the directory is on the path from here on
    found = Registry("number", {}, ("limit_denominator",)).find("fractions.Fraction")
    assert found(1, 2) == 0.5


def test_an_installed_package_names_its_own(tmp_path: Path) -> None:
    info = tmp_path / "shapes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shapes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[loda.shapes_of_tests]\ntile = shapes_of_mine:Square\npoint = shapes_of_mine:Point\n"
        "box:tile = shapes_of_mine:Square\n"
    )
    sys.path.insert(0, str(tmp_path))
    assert REGISTRY.names() == ["square", "box", "box:tile", "point", "tile"]
    assert "shapes_of_mine" not in sys.modules  # a list of names imports nothing
    assert Shape("tile", {"side": 2}).build().area() == 4
    with pytest.raises(ValueError, match="area"):
        Shape("point")
    # It goes before what the package makes of any name, and its code is not the package's.
    assert Shape("box:tile").kind is Shape("tile").kind
    assert not Shape("box:tile", trusted=False).is_known
    assert Shape("box:blue", {"height": 1.0}, trusted=False).is_known


def test_what_a_file_names_is_not_imported_unasked() -> None:
    shape = Shape("shapes_of_mine.Square", {"side": "any", "more": 1}, trusted=False)
    assert shape.options == {"side": "any", "more": 1}
    assert not shape.is_known
    for use in (shape.build, lambda: shape.kind):
        with pytest.raises(ValueError, match=r"--allow shapes_of_mine\.Square"):
            use()
    assert "shapes_of_mine" not in sys.modules
    assert Shape("square", trusted=False).is_known  # our own are always known
    with pytest.raises(ValueError, match="sides"):
        Shape("square", {"sides": 3}, trusted=False)


def test_import_paths_begin_with_a_module(tmp_path: Path) -> None:
    (tmp_path / "vit_base_patch16_224").mkdir()  # the runs of a model, say
    (tmp_path / "package_of_mine" / "shapes").mkdir(parents=True)
    assert not is_import_path("package_of_mine.shapes.Square")
    (tmp_path / "package_of_mine" / "shapes" / "square.py").touch()
    assert is_import_path("package_of_mine.shapes.square.Square")
    assert is_import_path("shapes_of_mine.Square")
    assert is_import_path("training.components.Registry")
    for name in ("digits", "vit_base_patch16_224.dino", "hf:some/model.Model", "..Square", "a."):
        assert not is_import_path(name)


@dataclass
class _Settings:
    """Some settings. And more about them."""

    count: int = 1
    size: float | None = None


def test_null_is_refused_where_the_type_has_none() -> None:
    refuse_null({"count": 2, "size": None}, _Settings, "it.")
    with pytest.raises(ValueError, match="count"):
        refuse_null({"count": None, "size": None}, _Settings, "it.")
    assert summary(_Settings) == "Some settings. And more about them"


@pytest.mark.parametrize(
    "refused",
    [
        lambda: at_least("key", 0, 1),
        lambda: positive("key", 0.0),
        lambda: positive("key", float("inf")),
        lambda: not_negative("key", -0.1),
        lambda: not_negative("key", float("nan")),
        lambda: check_seed("key", -1),
        lambda: check_seed("key", 2**32),
    ],
)
def test_range_checks_name_the_setting(refused: object) -> None:
    with pytest.raises(ValueError, match="key must be"):
        refused()  # type: ignore[operator]
    at_least("key", None, 1)
    check_seed("key", None)


def test_options_of_all_packaged_components_are_read_without_torch() -> None:
    code = (
        "import sys\n"
        "from training.config import READOUTS, BackboneConfig, DataConfig, MethodConfig\n"
        "kinds = (BackboneConfig, DataConfig, MethodConfig)\n"
        "for registry in (READOUTS, *(kind.registry for kind in kinds)):\n"
        "    for name in registry.paths:\n"
        "        registry.options(name)\n"
        "print(*sorted({'torch', 'timm', 'sklearn', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
