"""The pages of the reference that are written from the code: every command, setting and name.

A Sphinx extension (docs/conf.py): `write` fills docs/reference/generated before a build, and
`write_reports` the folder of reports, which the site holds as they are.
"""

import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
import tempfile
import textwrap
from collections import _tuplegetter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest import mock

import jsonargparse

from training import cli, config, yaml_files
from training.components import Registry, summary

HERE = Path(__file__).parent
GENERATED = HERE / "generated"
RECORDS = HERE.parent / "records"
# The reports that the site holds, and what they are made of.
REPORTS = {
    "glyphs": ("glyphs-test.jsonl",),
    "photographs": ("caltech101-dinov2-test.jsonl",),
    "caltech101": ("caltech101.jsonl", "caltech101-cifar_vit.jsonl"),
}
# Packages whose public names are documented: those of their `__all__`.
PACKAGES = (
    "loda_math",
    "loda_math.verify",
    "backends.torch",
    "backends.torch.readouts",
    "backends.torch.peft",
    "training",
    "training.analysis.predict",
    "training.analysis.export",
    "training.config",
    "training.train",
    "training.methods",
    "training.data",
    "training.backbones",
    "training.report",
)
# Of modules without `__all__`, what users call; the rest of them serves the command line.
NAMES = {
    "backends.torch.peft": ["save_adapter", "lora_options", "initialise_lora"],
    "training.analysis.predict": ["Classifier", "Prediction", "write_table"],
    "training.analysis.export": ["export", "Export"],
    "training.config": ["Experiment", "load_experiment", "experiment_from", "read_experiment"],
    "training.train": ["train", "resume"],
}


def help_of(*command: str) -> str:
    """What a command prints with ``--help``."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.suppress(SystemExit),
        mock.patch.dict(os.environ, COLUMNS="80"),
    ):
        cli.main([*command, "--help"])
    return printed.getvalue()


def commands_page() -> str:
    """The help of every command."""
    parts = [
        "# Commands\n",
        "Written by the commands themselves: `loda COMMAND --help` prints the same.\n",
        f"```text\n{help_of()}```\n",
    ]
    for name in cli._COMMANDS:
        words = [name, "check"] if name == "data" else [name]
        parts.append(f"## loda {' '.join(words)}\n\n```text\n{help_of(*words)}```\n")
    return "\n".join(parts)


def settings_page() -> str:
    """Every setting with its type, default and meaning, component by component."""
    parts = [
        "# Settings\n",
        "Every setting of `loda train`, written from its declaration in the code. A setting is "
        "given on the command line, `--train.lr 0.05`, or in a YAML file, `train: {lr: 0.05}`. The "
        "defaults are those of the class. A packaged configuration may set others: `loda train "
        "--print-config` prints the values that a run would use.\n",
        "## The run\n",
        _table(_arguments(config.Experiment, "", skip={*config._SECTIONS})),
    ]
    for section, kind in config._SECTIONS.items():
        parts.append(f"## {section}\n\n{summary(kind)}.\n")
        parts.append(_table(_arguments(kind, section, skip={"options", "trusted"})))
        if section in config._COMPONENTS:
            parts += _components(kind.registry, section, "###")
        if section == "head":
            parts += _components(config.READOUTS, "head.{}", "###")
    return "\n".join(parts)


def _components(registry: Registry, prefix: str, level: str) -> Iterator[str]:
    families = {known: label for label, known in registry.families.items()}
    for name in [*registry.paths, *families]:
        kind = registry.find(name)
        title = families.get(name, f"`{name}`")
        section = prefix.format(name)
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        registry.add_options(parser, name, section)
        table = _table(_actions(parser))
        yield f"{level} {registry.kind} {title}\n\n{summary(kind)}.\n"
        yield table or "It has no options.\n"


def _arguments(kind: type, section: str, skip: set[str]) -> list[Any]:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, section or None, as_group=False, skip=skip)
    return _actions(parser)


def _actions(parser: jsonargparse.ArgumentParser) -> list[Any]:
    return [action for action in parser._actions if getattr(action, "_typehint", None)]


def _table(actions: list[Any]) -> str:
    if not actions:
        return ""
    rows = [
        f"| `{action.dest}` | {_type(action._typehint)} | {_value(action.default)} "
        f"| {_cell(action.help)} |"
        for action in actions
    ]
    return "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *rows, ""])


_TYPES = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    type(None): "null",
}


def _type(hint: Any) -> str:
    """A type in words."""
    if hint in _TYPES:
        return _TYPES[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin in (list, tuple):
        what = " and ".join(dict.fromkeys(_type(part) for part in inner if part is not ...))
        return f"list of {what}"
    if origin is dict:
        return "mapping"
    if inner:  # a union
        return ", ".join(_type(part) for part in inner)
    return f"`{getattr(hint, '__name__', hint)}`"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").replace("%%", "%").replace("|", r"\|").split())


def configurations_page() -> str:
    """The packaged configurations, with what their heads say."""
    parts = [
        "# Configurations in the package\n",
        "`loda train --config NAME` uses one; a file of yours may build on it with `base: NAME`.\n",
    ]
    for name in yaml_files.packaged_configs():
        text = yaml_files.resolve_config(name).read_text(encoding="utf-8")
        parts.append(f"## {name}\n\n```yaml\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def public_names(package: str) -> dict[str, list[str]]:
    """The public names of a package, by the module that defines them."""
    module = importlib.import_module(package)
    names = NAMES.get(package) or module.__all__
    result: dict[str, list[str]] = {}
    for name in names:
        thing = getattr(module, name)
        if inspect.ismodule(thing):
            continue
        home = getattr(thing, "__module__", package)
        # Constants and types have no module of their own that tells where they are.
        result.setdefault(home if home.startswith(package) else package, []).append(name)
    return result


def package_page(package: str) -> str:
    """A table of the public names of a package, which leads to a page for each."""
    module = importlib.import_module(package)
    summary_line = inspect.cleandoc(module.__doc__ or "").splitlines()[0]
    parts = [f"# {package}\n\n{summary_line}\n"]
    for home, names in public_names(package).items():
        if home != package:
            doc = inspect.cleandoc(importlib.import_module(home).__doc__ or "").splitlines()[0]
            parts.append(f"## {home.removeprefix(package + '.')}\n\n{doc}\n")
        listed = textwrap.indent("\n".join(f"{package}.{name}" for name in names), "   ")
        table = f".. autosummary::\n   :toctree: names\n   :nosignatures:\n\n{listed}"
        parts.append(f"```{{eval-rst}}\n{table}\n```\n")
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """The generated pages, by file name."""
    return {
        "commands.md": commands_page(),
        "settings.md": settings_page(),
        "configurations.md": configurations_page(),
        **{f"{package}.md": package_page(package) for package in PACKAGES},
    }


def write(folder: Path) -> None:
    """Write all pages; Sphinx reads those again that have changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        page = folder / name
        text = re.sub(r"(?m)[ \t]+$", "", text)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def write_reports(folder: Path) -> None:
    """Write the page of `loda report` for every comparison of docs/records that a page links to."""
    from training import report

    sources = [*RECORDS.glob("*.jsonl"), *Path(report.__file__).parent.iterdir()]
    newest = max(source.stat().st_mtime for source in sources)
    for name, records in REPORTS.items():
        page = folder / name / "report.html"
        if page.exists() and page.stat().st_mtime > newest:
            continue
        page.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as out:
            written = report.write_report(
                report.Report.over([RECORDS / record for record in records]), Path(out)
            )
            shutil.copy(written, page)


@cache
def link_targets() -> dict[str, str]:
    """Public names as pages write them, in full or, where that is distinctive, alone."""
    result: dict[str, str] = {}
    for package in PACKAGES:
        for names in public_names(package).values():
            for name in names:
                full = f"{package}.{name}"
                result[full] = full
                if "_" in name or sum(letter.isupper() for letter in name) > 1:
                    result.setdefault(name, full)
    return result


def link_names(app: Any, doctree: Any) -> None:
    """Lead from a public name in a page, in code type, to its entry in the reference."""
    from docutils import nodes
    from sphinx.addnodes import pending_xref

    linked = nodes.reference | nodes.title | pending_xref
    for literal in list(doctree.findall(nodes.literal)):
        target = link_targets().get(literal.astext())
        if target is None or isinstance(literal.parent, linked):
            continue
        place = {"refdomain": "py", "reftype": "obj", "refdoc": app.env.docname}
        link = pending_xref("", refexplicit=True, refwarn=False, reftarget=target, **place)
        literal.replace_self(link)
        link += literal


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this: the pages are written before it looks for pages."""

    def write_generated(_: Any, settings: Any) -> None:
        write(GENERATED)
        settings.autosummary_generate = [str(page) for page in GENERATED.glob("*.md")]

    app.connect("config-inited", write_generated, priority=1)
    reports = HERE.parents[1] / "build" / "reports"
    app.connect("config-inited", lambda *_: write_reports(reports), priority=1)
    app.connect("doctree-read", link_names)
    # Fields of named tuples: the section of attributes documents them.
    app.connect("autodoc-skip-member", lambda *given: isinstance(given[3], _tuplegetter) or None)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
