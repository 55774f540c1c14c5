"""Imports point one way, and the mathematics imports no array library."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARRAY_LIBRARIES = {"numpy", "torch", "jax", "cupy", "dask", "scipy", "array_api_strict"}
# The files of the mathematics that may import more, inside functions, for host arrays.
FAST = {"_eigh.py", "archive.py"}
HOST_LIBRARIES = {"numpy", "scipy", "threadpoolctl"}
# The file of the backend that writes adapters, and what it imports inside functions.
ADAPTERS, FILE_LIBRARIES = "peft.py", {"safetensors"}
# What each package may import beside the standard library.
ALLOWED = {
    "loda_math": {"loda_math", "array_api_compat", "array_api_extra"},
    "backends": {"loda_math", "backends", "torch"},
}
# The floors of `training`, the lowest first: a unit, which is a module or a sub-package, imports
# from its own floor and from below. Settings are declared beside the component that they belong
# to, so the configuration of an experiment stands above data, backbones and methods.
FLOORS = (
    {
        "calibration",
        "components",
        "seeds",
        "metrics",
        "loss",
        "run_dir",
        "distributed",
        "spelling",
        "updates",
        "yaml_files",
    },
    {"logging", "plots"},
    {"backbones", "data", "methods", "state"},
    {"config"},
    {"checkpoint", "overview"},
    {"train", "sweep"},
    {"analysis", "report", "extension"},
    {"cli"},
)
MOST_FLOORS = 8


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported anywhere in the tree, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    files = sources(package)
    assert files
    for path in files:
        packages = {name.partition(".")[0] for name in imports(ast.parse(path.read_text("utf-8")))}
        allowed = ALLOWED[package] | (HOST_LIBRARIES if path.name in FAST else set())
        allowed |= FILE_LIBRARIES if path.name == ADAPTERS else set()
        strangers = packages - allowed - set(sys.stdlib_module_names)
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


def test_one_file_knows_the_array_libraries() -> None:
    doors = {
        path.name
        for path in sources("loda_math")
        if any(
            name.startswith(("array_api_compat", "array_api_extra"))
            for name in imports(ast.parse(path.read_text("utf-8")))
        )
    }
    assert doors == {"_arrays.py"}


def test_host_libraries_are_imported_inside_functions_only() -> None:
    files = [path for path in sources("loda_math") if path.name in FAST]
    for path in [*files, *(path for path in sources("backends") if path.name == ADAPTERS)]:
        body = ast.parse(path.read_text("utf-8")).body
        top = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        packages = {n.partition(".")[0] for n in imports(ast.Module(top, []))}
        assert not packages & (HOST_LIBRARIES | FILE_LIBRARIES)


def test_training_decomposes_no_matrix_and_uses_public_names_only() -> None:
    decompositions = {"eigh", "eig", "eigvalsh", "svd", "svdvals", "qr", "cholesky", "lstsq", "inv"}
    for path in sources("training"):
        tree = ast.parse(path.read_text("utf-8"))
        private = {
            name
            for name in imports(tree)
            if name.startswith(("loda_math", "backends"))
            and any(part.startswith("_") for part in name.split("."))
        }
        assert not private, f"{path.relative_to(ROOT)} imports {private}"
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if path.name == "inflora.py":  # DualGPM is part of that baseline alone
            continue
        assert not used & decompositions, f"{path.relative_to(ROOT)}: {used & decompositions}"


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running the code."""
    code = f"{code}\nimport sys; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(done.stdout.split())


def test_the_mathematics_brings_no_array_library() -> None:
    assert not modules_after("import loda_math") & ARRAY_LIBRARIES


def test_one_library_does_not_bring_another() -> None:
    code = (
        "import numpy as np, loda_math as lm\n"
        "m = lm.second_moment(np.eye(3)).mean\n"
        "u = lm.isolated_subspace(m, m, 2)\n"
        "lm.recalibration(u, u.T, m, m, 1.0)"
    )
    assert not modules_after(code) & (ARRAY_LIBRARIES - {"numpy"})


def test_the_backend_brings_no_training_library() -> None:
    loaded = modules_after("import backends.torch")
    assert not loaded & {"timm", "torchvision", "training", "PIL", "sklearn", "accelerate", "rich"}


def test_no_package_shadows_torch() -> None:
    assert not (ROOT / "tests" / "backends").exists()
    assert (ROOT / "backends" / "__init__.py").is_file()


def units() -> dict[str, set[str]]:
    """The units of `training`, and those that each imports, inside functions too."""
    arrows: dict[str, set[str]] = {}
    for path in sources("training"):
        names = [*path.relative_to(ROOT).with_suffix("").parts]
        if names[1:] == ["__init__"]:
            continue  # the package itself stands for no unit
        own = unit(".".join(names))
        used = {unit(name) for name in imports(without_types(ast.parse(path.read_text("utf-8"))))}
        arrows.setdefault(own, set()).update(used - {own, ""})
    return {own: used & arrows.keys() for own, used in arrows.items()}


def unit(module: str) -> str:
    """The unit of `training` that a dotted name belongs to; empty if it is none of `training`."""
    first, unit, *_ = f"{module}..".split(".")
    return unit if first == "training" else ""


def without_types(tree: ast.Module) -> ast.Module:
    """A module without what only type checkers read."""

    class Remover(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            if ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING":
                return node.orelse
            return self.generic_visit(node)

    return Remover().visit(tree)


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """How high each unit stands above those that import nothing of the package."""
    heights: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        heights[name] = 1 + max((heights[used] for used in graph[name]), default=0)
    return heights


def test_no_circle_in_training() -> None:
    graph = units()
    try:
        heights = floors(graph)
    except CycleError as error:
        pytest.fail(f"units import each other in a circle: {' <- '.join(error.args[1])}")
    assert max(heights.values()) <= MOST_FLOORS, heights


def test_no_file_is_in_a_circle() -> None:
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in ("loda_math", "backends", "training")
        for path in sources(package)
        if path.name != "__init__.py"  # they hand on names, most of them when they are asked for
    }
    graph = {
        name: {
            module
            for used in imports(without_types(ast.parse(path.read_text("utf-8"))))
            for module in (used, used.rpartition(".")[0])
            if module in files and module != name
        }
        for name, path in files.items()
    }
    TopologicalSorter(graph).prepare()


def test_no_arrow_points_up_in_training() -> None:
    place = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    graph = units()
    assert graph.keys() <= place.keys(), "every unit has its floor"
    up = [f"{a} -> {b}" for a, used in graph.items() for b in used if place[b] > place[a]]
    assert not up
