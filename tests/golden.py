"""Whether two commits compute the same, bit for bit, on this machine.

``python tests/golden.py OLD NEW`` runs the code of both on the same cases and compares what comes
out: tensors of models, histories, heads, read-outs and checkpoints, summaries, logs, tables of
reports. OLD and NEW are commits or folders of checkouts. Times, memory and paths are left out.
What a checkout has computed is stored under ``--cache`` by the content of its code, so that the
same code is not run twice.

Layout and names may differ between the two: names are brought to one form by the tables below
(`SPELLINGS`, `ALIASES`), what then still has another name is matched by its content, and what one
side alone has must be named in `ONE_SIDED` with a reason. Exit status: 0 if all is equal.
"""

import argparse
import fnmatch
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("loda_math", "backends", "training")
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "accelerate")
READOUTS = ("alignment", "heads", "nearest_mean", "ridge")
Settings = dict[str, Any]

# --- what may be spelled in another way -----------------------------------------------------------

# Settings of loda train: spellings in the order of preference; the first that ``loda train --help``
# of a checkout names is taken, and the last if it names none.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "method.name": ("method.name", "method"),
    "head.alignment_epochs": ("head.alignment_epochs", "head.alignment.epochs"),
    "head.ridge_features": ("head.ridge_features", "head.ridge.features"),
}
# Settings of one method alone: one mapping for all of them, or each for itself.
OWN, OWN_MAPPING = "method.own.", "method.options"

# Names of tensors and of entries in records, brought to one form on both sides: (pattern, form).
ALIASES: tuple[tuple[str, str], ...] = (
    (r"^(checkpoint \d+)/run/aligned/", r"\1/readouts/fitted/alignment/"),
    (r"^(checkpoint \d+)/run/(ridge|statistics)/", r"\1/readouts/gathered/\2/"),
    (r"^(checkpoint \d+)/run/", r"\1/"),
    (r"^(checkpoint \d+)/open/(torch|cuda/\d+)$", r"\1/open/generators/\2"),
    # The upper bound was the only one.
    (r"(first_order_update)\.bound$", r"\1.upper"),
    # A history was its sum alone.
    (r"^(arrays/task\d+\.history\..*)\.total$", r"\1"),
)

# Entries of records that say nothing about results: times, memory, places.
DROPPED = re.compile(r"(^|\.|/)(seconds|memory|sha256|started|folder|path|out)(\.|$)")
# The log as a checkpoint holds it, with its times; the log of the run itself is compared.
LOG = re.compile(r"^(checkpoint \d+|state)/metrics$")

# What one side alone may have: (side, pattern of case, pattern of name, reason).
ONE_SIDED: tuple[tuple[str, str, str, str], ...] = (
    ("new", "", r"^state/", "what a later task would start from; it was not written"),
    ("new", "^report/", r"^runs\.csv:", "a table of all runs was not written"),
    ("new", "", r"^classes\.json:(fingerprint|test)", "a fingerprint of the data was not written"),
    (
        *("old", "converged$", r"^checkpoint \d+/readouts/fitted/alignment/"),
        "the alignment to convergence does not start from the last one",
    ),
    ("new", "^report/", r"^runs\.csv:", "the table of all numbers was not written"),
    ("new", "^library/", r"\.first_order_update\.lower$", "the lower bound was not computed"),
    ("new", "^library/", r"\.(second_moment|combine|remember)\.unit$", "moments had no unit"),
    ("new", "^replay/", r"\.history\..*\.(squares|weight)$", "a history was its sum alone"),
)

# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One thing to compute."""

    part: str
    name: str
    kind: str
    settings: Settings = field(default_factory=dict)
    more: Settings = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.part}/{self.name}"

    def key(self) -> str:
        """What a result is stored under: the case, and the code here that computes it."""
        code = [getattr(Worker, f"_{self.kind}"), *COMPUTING.get(self.kind, ())]
        content = [asdict(self), *(inspect.getsource(function) for function in code)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


KEPT: Settings = {f"keep.{what}": True for what in ("branches", "moments", "heads", "statistics")}
QUIET: Settings = {"device": "cpu", "threads": 1, "checkpoint.minutes": 1000}
DIGITS: Settings = {
    **QUIET,
    **KEPT,
    "data.name": "digits",
    "data.tasks": 3,
    "train.epochs": 1,
    "train.lr": 0.05,
    "head.readout": "alignment",
    "head.also": ["heads", "nearest_mean", "ridge"],
    "head.alignment_epochs": 1,
    "head.ridge_features": 128,
    "checkpoint.steps": 4,
}
SQUARES: Settings = {
    **QUIET,
    **KEPT,
    "data.name": "folder",
    "data.root": "{data}/squares",
    "data.image_size": 16,
    "data.resize": 16,
    "data.train_crop": "pad",
    "data.pad": 2,
    "data.flip": True,
    "data.mean": 0.0,
    "data.std": 1.0,
    "backbone.name": "vit_tiny_patch16_224",
    "backbone.options": {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
    },
    "backbone.pretrained": False,
    "method.rank": 4,
    "train.epochs": 2,
    "train.batch_size": 5,
    "train.lr": 0.05,
    "train.eval_batch_size": 16,
    "head.readout": "nearest_mean",
    "head.also": ["heads", "alignment", "ridge"],
    "head.alignment_epochs": 1,
    "head.ridge_features": 32,
    "checkpoint.steps": 4,
}
METHODS = ("loda", "seq_lora", "joint", "frozen", "ncm", "ranpac_frozen", "null_lora", "o_lora")
METHODS += ("inflora", "sd_lora")
WITHOUT_RANK = ("frozen", "ncm", "ranpac_frozen")

# Settings beside SQUARES; None takes one of those away.
VARIANTS: dict[str, Settings] = {
    "general": {"method.branches": "general"},
    "isolated": {"method.branches": "isolated"},
    "trace-ratio": {"method.isolated": "trace_ratio"},
    "trace-ratio-floor": {"method.isolated": "trace_ratio", "method.energy_floor": 0.6},
    "null": {"method.isolated": "null"},
    **{
        f"recalibration-{form}": {"method.recalibration": form}
        for form in ("diagonal", "box", "direction", "scalar", "none")
    },
    **{
        f"joint-{form}": {"method.joint": True, "method.recalibration": form}
        for form in ("full", "box")
    },
    "history-both": {"method.history": "both", "method.gamma": 3.0},
    "history-trained": {"method.history": "trained"},
    "history-mean-decay": {"method.history_weight": "mean", "method.history_decay": 0.7},
    "weights": {
        "method.general_weight": 0.7,
        "method.isolated_weight": 0.4,
        "method.ridge": 0.1,
        "method.down_scale": 0.3,
        "method.history_weight": 2.5,
        "method.radius": 0.1,
    },
    "target": {"method.target": "*.mlp.fc1", "method.heldout": False},
    "random": {f"{OWN}directions": "random"},
    "plain-steps": {"method.gao": False},
    "seq-lora-gao": {"method.name": "seq_lora", "method.gao": True},
    "o-lora-qv": {"method.name": "o_lora", f"{OWN}penalty": 0.3, f"{OWN}parts": "qv"},
    "o-lora-alpha-gao": {"method.name": "o_lora", f"{OWN}alpha": 8.0, "method.gao": True},
    "inflora-kv": {"method.name": "inflora", f"{OWN}parts": "kv", f"{OWN}lamb": 0.9},
    "sd-lora-qv": {"method.name": "sd_lora", f"{OWN}start": 0.5, f"{OWN}parts": "qv"},
    "adam": {"train.optimizer": "adam", "train.lr": 0.005, "train.schedule": "constant"},
    "heads": {"head.start": "random", "head.margin": 0.1, "head.scale": 15.0, "train.momentum": 0},
    "bf16": {"precision": "bf16", "data.tasks": 2},
    "dropout": {
        "backbone.options": {**SQUARES["backbone.options"], "proj_drop_rate": 0.3},
        "data.tasks": 2,
    },
    "alignment-5": {"head.readout": "alignment", "head.alignment_epochs": 5, "head.also": []},
    "alignment-converged": {"head.alignment_epochs": None, "head.also": ["alignment"]},
    "heads-alone": {"head.readout": "heads", "head.also": []},
    "ridge-alone": {"head.readout": "ridge", "head.also": [], "keep.statistics": False},
    "batches": {"train.batch_size": 1, "train.epochs": 1, "train.eval_batch_size": 3},
    "validation": {"data.validation": 0.34, "data.task_sizes": [3, 2], "data.order_seed": 5},
    "crop-worker": {
        "data.train_crop": "random_resized",
        "data.crop_scale": [0.3, 1.0],
        "data.pad": None,
        "data.resize": None,
        "data.test_crop": "center",
        "data.test_resize": 18,
        "data.workers": 1,
        "data.mean": 0.5,
        "data.std": 0.25,
        "data.tasks": 2,
    },
    "cifar-vit": {
        "backbone.name": "cifar_vit",
        "backbone.options": None,
        "backbone.pretrained": None,
        "data.image_size": 32,
        "data.resize": 32,
        "data.tasks": 2,
        "train.epochs": 1,
        "train.lr": 0.01,
    },
}


def all_cases() -> Iterator[Case]:
    """All cases, part by part."""
    for method in METHODS:
        for seed in (1, 1993):
            own = {"method.name": method, "seed": seed}
            own |= {} if method in WITHOUT_RANK else {"method.rank": 8}
            yield Case("methods", f"{method}-{seed}", "train", {**DIGITS, **own})
    for name, changes in VARIANTS.items():
        yield Case("variants", name, "train", {**SQUARES, **changes})
    cuts = {"loda": ("kill", 4), "o_lora": ("term", 4), "sd_lora": ("kill", 3)}
    cuts |= {"inflora": ("kill", 4), "seq_lora": ("term", 2), "frozen": ("kill", 4)}
    for method, (how, after) in cuts.items():
        own = {"method.name": method, "method.rank": None if method == "frozen" else 4}
        more = {"signal": how, "after": after}
        yield Case("resume", f"{method}-{how}", "resume", {**SQUARES, **own}, more)
    own = {"head.alignment_epochs": None, "head.also": ["alignment"]}
    yield Case("resume", "converged", "resume", {**SQUARES, **own}, {"signal": "kill", "after": 4})
    for method in ("loda", "o_lora", "inflora"):
        yield Case("processes", method, "processes", {**SQUARES, "method.name": method})
    yield Case("replay", "recorded-run", "replay")
    yield Case("library", "mathematics", "library")
    tables = {"methods": ["loda", "seq_lora", "ncm"], "seeds": [1, 2]}
    yield Case("report", "small-runs", "report", SQUARES, tables)
    yield Case("report", "records", "records")
    yield Case("tools", "finished-run", "tools", SQUARES)


# --- checkouts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkout:
    """The code to run, and what its results are stored under."""

    name: str
    path: Path
    key: str


@contextmanager
def checkout(name: str) -> Iterator[Checkout]:
    """A folder as it is, or a commit in a temporary work tree."""
    if Path(name, "training").is_dir():
        path = Path(name).resolve()
        yield Checkout(name, path, content_key(path))
        return
    here = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(here)]
    path = Path(tempfile.mkdtemp(prefix="golden-")) / "checkout"
    subprocess.run([*git, "worktree", "add", "-q", "--detach", str(path), name], check=True)
    try:
        yield Checkout(name, path, content_key(path))
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(path)], check=True)
        path.parent.rmdir()


def content_key(path: Path) -> str:
    """Hash of the code, the records, and the versions of the libraries beneath."""
    total = hashlib.sha256()
    total.update(repr([sys.version, *(f"{x} {version(x)}" for x in LIBRARIES)]).encode())
    for package in (*PACKAGES, "docs/records"):
        for file in sorted((path / package).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(f"{file.relative_to(path)}\0".encode())
                total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]


def results(code: Checkout, cases: list[Case], cache: Path, jobs: int) -> dict[str, Any]:
    """What a checkout computes in the cases, from the cache where it is there."""
    folder = cache / code.key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name.txt").write_text(f"{code.name}\n")
    missing = [case for case in cases if not (folder / f"{case.key()}.json").is_file()]
    if missing:
        with tempfile.TemporaryDirectory(prefix="golden-") as work:
            order = {
                "cases": [asdict(case) for case in missing],
                "checkout": str(code.path),
                "cache": str(cache.resolve()),
                "results": str(folder.resolve()),
                "work": work,
                "jobs": jobs,
                "shared": str(shared_folder()),
            }
            threads = {f"{x}_NUM_THREADS": "1" for x in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
            environment = {**os.environ, **threads, "PYTHONPATH": str(code.path), "COLUMNS": "200"}
            # -P: the tests beside this file are nothing that the code under test could import.
            command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker"]
            subprocess.run(
                command, input=json.dumps(order), text=True, env=environment, cwd=work, check=True
            )
    found = {}
    for case in cases:
        path = folder / f"{case.key()}.json"
        found[case.label] = json.loads(path.read_text())
        if found[case.label]["failed"]:
            path.unlink()  # to be tried again
    return found


def shared_folder() -> Path:
    """Where the recorded run is: beside the checkout, or beside a folder of checkouts."""
    above = (folder / "shared" for folder in Path(__file__).resolve().parents)
    given = os.environ.get("LODA_SHARED")
    return Path(
        given or next((x for x in above if (x / "reference").is_dir()), "shared")
    ).absolute()


# --- the worker: runs cases with one checkout -----------------------------------------------------


class Failed(Exception):  # noqa: N818 - an outcome, not a mistake of this script
    """A command of a case did not end as it should."""


class Worker:
    """Forks a process a command, from one that has imported the libraries for all."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self.order = order
        self.cache, self.work = Path(order["cache"]), Path(order["work"])
        self.results, self.checkout = Path(order["results"]), Path(order["checkout"])
        self._help: str | None = None

    def run(self) -> None:
        """All cases, some at a time."""
        import_libraries()
        images(self.cache / "squares")
        waiting = [Case(**case) for case in self.order["cases"]]
        running: dict[int, tuple[Case, float]] = {}
        while waiting or running:
            while waiting and len(running) < self.order["jobs"]:
                case = waiting.pop(0)
                pid = os.fork()
                if not pid:
                    end_with(lambda case=case: self.case(case))
                running[pid] = case, time.monotonic()
            pid, _ = os.wait()
            case, begun = running.pop(pid)
            print(f"  {case.label}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)

    def case(self, case: Case) -> None:
        """Run one case and write its result."""
        folder = self.work / case.label
        folder.mkdir(parents=True)
        os.chdir(folder)
        output: dict[str, Any] = {"failed": None, "runs": {}}
        begun = time.monotonic()
        try:
            for label, place in getattr(self, f"_{case.kind}")(case):
                output["runs"][label] = collect(Path(place), self.cache / "objects")
        except Failed as error:
            output["failed"] = str(error)
        except Exception:  # noqa: BLE001 - whatever it is, it is the outcome of this case
            output["failed"] = traceback.format_exc()
        output["seconds"] = time.monotonic() - begun
        path = self.results / f"{case.key()}.json"
        path.with_suffix(".new").write_text(json.dumps(output))
        path.with_suffix(".new").replace(path)
        os.chdir(self.work)
        shutil.rmtree(folder)

    # Each kind yields labels and folders whose content counts.

    def _train(self, case: Case) -> Iterator[tuple[str, str]]:
        self.loda(self.train(case.settings, "run"), snapshots="checkpoints")
        yield "run", "run"
        yield "checkpoints", "checkpoints"

    def _resume(self, case: Case) -> Iterator[tuple[str, str]]:
        how, after = case.more["signal"], case.more["after"]
        expected = -signal.SIGKILL if how == "kill" else 128 + signal.SIGTERM
        self.loda(self.train(case.settings, "run"), snapshots="whole-checkpoints")
        Path("run").rename("whole")
        command = self.train(case.settings, "run")
        self.loda(command, snapshots="cut-checkpoints", cut=(how, after), expected=expected)
        self.loda(["train", "--resume", "run"], snapshots="resumed-checkpoints")
        yield "whole", "whole"
        yield "resumed", "run"
        for name in ("whole", "cut", "resumed"):
            yield f"{name}-checkpoints", f"{name}-checkpoints"

    def _processes(self, case: Case) -> Iterator[tuple[str, str]]:
        command = self.train(case.settings, "run")
        receivers, senders = os.pipe()
        pids = []
        for rank in range(2):
            pid = os.fork()
            if not pid:
                end_with(lambda rank=rank: together(rank, receivers, senders, command))
            pids.append(pid)
        os.close(receivers)
        os.close(senders)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(statuses):
            logs = [Path(f"{rank}.log").read_text()[-1500:] for rank in range(2)]
            msg = f"two processes ended with {statuses}:\n" + "\n".join(logs)
            raise Failed(msg)
        yield "run", "run"
        yield "checkpoints", "checkpoints"

    def _report(self, case: Case) -> Iterator[tuple[str, str]]:
        for method in case.more["methods"]:
            for seed in case.more["seeds"]:
                own = {"method.name": method, "seed": seed}
                own |= {"method.rank": None} if method in WITHOUT_RANK else {}
                self.loda(self.train({**case.settings, **own}, f"runs/{method}/seed{seed}"))
        self.loda(["report", "runs", "--out", "report"])
        yield "report", "report"

    def _records(self, case: Case) -> Iterator[tuple[str, str]]:
        shutil.copytree(self.checkout / "docs" / "records", "records")
        files = [f"records/caltech101{x}.jsonl" for x in ("", "-cifar_vit")]
        report = Path("report")
        report.mkdir()
        (report / "tables.md").write_text(self.loda(["report", *files]))  # and draws no figure
        yield "report", "report"

    def _tools(self, case: Case) -> Iterator[tuple[str, str]]:
        self.loda(self.train(case.settings, "run"))
        image = self.cache / "squares" / "test" / "red" / "0.png"
        spoken = Path("spoken")
        spoken.mkdir()
        for name, arguments in {
            "verify": ["run"],
            "ranks": ["run"],
            "eval": ["run"],
            "predict": ["run", str(image)],
            "analyse": ["run", "--points", "4"],
        }.items():
            (spoken / f"{name}.txt").write_text(self.loda([name, *arguments]))
        yield "run", "run"
        yield "spoken", "spoken"

    def _replay(self, case: Case) -> Iterator[tuple[str, str]]:
        trace = Path(self.order["shared"]) / "reference" / "trace.npz"
        self.forked(lambda: write_tensors(Path("replay"), replay(trace)))
        yield "replay", "replay"

    def _library(self, case: Case) -> Iterator[tuple[str, str]]:
        self.forked(lambda: write_tensors(Path("library"), mathematics()))
        yield "library", "library"

    def train(self, settings: Settings, out: str) -> list[str]:
        """The command line of a run, in the spelling of the checkout."""
        if self._help is None:
            self._help = self.loda(["train", "--help"])
        given = {key: value for key, value in settings.items() if value is not None}
        # Settings of a read-out that is not asked for may be refused.
        asked = {given.get("head.readout", "alignment"), *given.get("head.also", [])}
        given = {k: v for k, v in given.items() if _readout(k) in {None, *asked}}
        own = {k.removeprefix(OWN): given.pop(k) for k in [*given] if k.startswith(OWN)}
        if own and f"--{OWN_MAPPING}" in self._help:
            given[OWN_MAPPING] = own
        else:
            given |= {f"method.{key}": value for key, value in own.items()}
        # The method itself first: what follows are settings of it.
        names = sorted(given, key=lambda name: name != "method.name")
        return [
            "train",
            f"--out={out}",
            *(
                f"--{self._spelled(name)}={_written(given[name]).format(data=self.cache)}"
                if isinstance(given[name], str)
                else f"--{self._spelled(name)}={_written(given[name])}"
                for name in names
            ),
        ]

    def _spelled(self, name: str) -> str:
        candidates = SPELLINGS.get(name, (name,))
        there = [x for x in candidates if re.search(rf"--{re.escape(x)}\b(?!\.)", self._help or "")]
        return (there or [candidates[-1]])[0]

    def loda(
        self,
        arguments: list[str],
        *,
        snapshots: str | None = None,
        cut: tuple[str, int] | None = None,
        expected: int = 0,
    ) -> str:
        """Run a command of loda; what it said on its standard output."""

        def command() -> None:
            if snapshots is not None:
                watch_checkpoints(Path(snapshots).absolute(), cut)
            run_loda(arguments, self.checkout)

        return self.forked(command, expected=expected, what=f"loda {' '.join(arguments)}")

    def forked(
        self, act: Callable[[], object], *, expected: int = 0, what: str = "a function"
    ) -> str:
        """Do something in a process of its own; its standard output."""
        with tempfile.TemporaryDirectory(dir=self.work) as logs:
            out, err = Path(logs, "out"), Path(logs, "err")
            pid = os.fork()
            if not pid:
                write_to(out, err)
                end_with(act)
            _, status = os.waitpid(pid, 0)
            if os.waitstatus_to_exitcode(status) != expected:
                said = (out.read_text() + err.read_text())[-3000:]
                msg = f"{what} ended with {os.waitstatus_to_exitcode(status)}:\n{said}"
                raise Failed(msg)
            return out.read_text()


def _readout(setting: str) -> str | None:
    """The read-out that a setting is one of."""
    found = re.match(r"head\.(alignment|ridge)[._]", setting)
    return found and found[1]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def import_libraries() -> None:
    """Import what takes seconds, but nothing of the checkout."""
    for name in (
        *("accelerate", "jsonargparse", "matplotlib.pyplot", "safetensors.torch", "scipy.linalg"),
        *("sklearn.datasets", "timm", "torchvision"),
    ):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def run_loda(arguments: list[str], checkout: Path) -> None:
    """The command line of the checkout, in this process."""
    from training import cli

    if not Path(cli.__file__).is_relative_to(checkout):
        msg = f"{cli.__file__} is not in {checkout}"
        raise RuntimeError(msg)
    sys.exit(cli.main(arguments))


def end_with(act: Callable[[], object]) -> None:
    """Do something and end this process, which was forked for it."""
    status = 1
    try:
        act()
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - this process must not go on
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def write_to(out: Path, err: Path) -> None:
    """Send the output of this process to files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))


def watch_checkpoints(folder: Path, cut: tuple[str, int] | None) -> None:
    """Copy every checkpoint as it is put in place; end the process at one of them.

    A checkpoint, be it a file or a folder, gets its name by a rename. With ``cut`` ("kill", n) the
    process is killed before the one after the n-th is in place, with ("term", n) it is asked to
    end when the n-th is.
    """
    number = 0

    def audit(event: str, values: tuple[Any, ...]) -> None:
        nonlocal number
        if event != "os.rename":
            return
        source, target = (Path(os.fsdecode(value)) for value in values[:2])
        named = "checkpoint" in target.parent.name or "checkpoint" in target.name
        if not named or target.name.startswith(".") or "." in target.parent.name:
            return
        number += 1
        if cut == ("kill", number - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        place = folder / f"{number:03d}"
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            place.mkdir(parents=True)
            shutil.copy(source, place / target.name)
        if cut == ("term", number):
            os.kill(os.getpid(), signal.SIGTERM)

    sys.addaudithook(audit)


def together(rank: int, receivers: int, senders: int, command: list[str]) -> None:
    """One of two processes that train together; the first serves the place where they meet."""
    from torch.distributed import TCPStore

    write_to(Path(f"{rank}.log"), Path(f"{rank}.log"))
    store = None
    if rank:
        port = int(os.read(receivers, 16))
    else:  # no port is chosen before it is in use
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
        os.write(senders, str(port).encode())
        watch_checkpoints(Path("checkpoints").absolute(), None)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LODA_TIMEOUT": 120}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as with torchrun, which serves it
    from training import cli

    sys.exit(cli.main(command))


def images(root: Path) -> None:
    """Noisy coloured squares: six classes."""
    import numpy as np
    from PIL import Image

    if root.is_dir():
        return
    rng = np.random.default_rng(0)
    colours = {"blue": (30, 40, 220), "green": (20, 200, 60), "grey": (128, 128, 128)}
    colours |= {"pink": (240, 120, 180), "red": (220, 30, 20), "white": (250, 250, 250)}
    new = Path(tempfile.mkdtemp(dir=root.parent))
    for split, count in (("train", 6), ("test", 3)):
        for name, colour in colours.items():
            (new / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + rng.integers(-40, 40, size=(16, 16, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(new / split / name / f"{number}.png")
    new.rename(root)


# --- what a case leaves ---------------------------------------------------------------------------


def collect(folder: Path, objects: Path) -> dict[str, Any]:
    """Every tensor below a folder (type, shape, hash) and every text, by path."""
    tensors: dict[str, list[Any]] = {}
    texts: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            for key, (kind, shape, content) in read_tensors(path).items():
                digest = hashlib.sha256(content).hexdigest()
                tensors[f"{name}:{key}"] = [kind, shape, digest]
                store = objects / digest[:2] / digest
                if not store.is_file():
                    store.parent.mkdir(parents=True, exist_ok=True)
                    new = store.with_suffix(f".{os.getpid()}")
                    new.write_bytes(content)
                    new.replace(store)
        elif path.suffix in (".json", ".jsonl", ".md", ".tex", ".csv", ".txt"):
            texts[name] = path.read_text("utf-8")
    return {"tensors": tensors, "texts": texts}


def read_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), memoryview(content)[8 + size :]
    return {
        name: (x["dtype"], x["shape"], bytes(data[slice(*x["data_offsets"])]))
        for name, x in header.items()
        if name != "__metadata__"
    }


def write_tensors(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Write arrays and tensors to a file in a new folder."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    ready = {k: torch.as_tensor(v).detach().clone().contiguous() for k, v in tensors.items()}
    save_file(ready, folder / "arrays.safetensors")


# --- computations through the public names of the libraries ---------------------------------------


def flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays and numbers in nested tuples, lists and mappings, under dotted names."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(f"{name}.{key}", inner)
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            yield from flat(f"{name}.{index}", inner)
    elif value is not None and not callable(value) and not isinstance(value, str):
        yield name, value


def mathematics() -> dict[str, Any]:
    """The public functions of ``loda_math``: NumPy and torch, both precisions, small and big."""
    import numpy as np
    import torch

    found: dict[str, Any] = {}
    for size, rank, batch in ((24, 5, (2,)), (300, 8, ())):
        rng = np.random.default_rng(size)
        spectrum = np.geomspace(1.0, 1e-3, size)
        tokens = [rng.normal(size=(*batch, 2 * size, size)) * spectrum for _ in range(2)]
        turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
        tokens[1] = tokens[1] @ turn
        up = rng.normal(size=(*batch, 2 * size, rank))
        down = rng.normal(size=(*batch, rank, size))
        labels, order = rng.integers(0, 5, size=12), np.arange(5)[::-1].copy()
        for kind in ("float32", "float64"):
            as_numpy = [np.asarray(x, dtype=kind) for x in (*tokens, up, down)]
            as_torch = [torch.from_numpy(x) for x in as_numpy]
            integers = (labels, order)
            for library, arrays, whole in (
                ("numpy", as_numpy, integers),
                ("torch", as_torch, tuple(torch.from_numpy(x) for x in integers)),
            ):
                for name, value in _calls(arrays, whole, rank):
                    found |= dict(flat(f"{library}.{kind}.{size}.{name}", value))
    return found


def _calls(arrays: list[Any], integers: tuple[Any, Any], rank: int) -> Iterator[tuple[str, Any]]:
    import loda_math as lm

    first, second, up, down = arrays
    a, b = lm.second_moment(first), lm.second_moment(second)
    yield "second_moment", a
    yield "combine", lm.combine(a, b)
    history = lm.remember(lm.remember(None, b.mean), a.mean, weight=2.0, decay=0.5)
    yield "remember", history
    new, old = a.mean, b.mean
    yield "general_subspace", lm.general_subspace(new, old, rank)
    yield "general_solution", lm.general_solution(new, old, rank)
    for ridge in (1e-2, 0.3):
        yield f"isolated_subspace.{ridge}", lm.isolated_subspace(new, old, rank, ridge=ridge)
    yield "isolated_subspace.alone", lm.isolated_subspace(new, None, rank)
    yield "isolated_solution", lm.isolated_solution(new, old, rank)
    # Before the objective was an argument, a floor chose it.
    named = "objective" in inspect.signature(lm.isolated_solution).parameters
    floor = {"energy_floor": 0.5} | ({"objective": "trace_ratio"} if named else {})
    yield "isolated_solution.floor", lm.isolated_solution(new, old, rank, **floor)
    yield "null_subspace", lm.null_subspace(old, rank)
    yield "null_solution", lm.null_solution(old, rank)
    yield "trace_ratio_subspace", lm.trace_ratio_subspace(new, old, rank)
    yield "trace_ratio_solution", lm.trace_ratio_solution(new, old, rank, energy_floor=0.3)
    yield "rank_for.energy", lm.rank_for(new, old, 0.9)
    yield "rank_for.ratio", lm.rank_for(new, old, 0.9, of="ratio")
    basis = lm.isolated_subspace(new, old, rank)
    yield "projection_energy", lm.projection_energy(basis, new)
    yield "relative_energy", lm.relative_energy(basis, new)
    yield "energy_ratio", lm.energy_ratio(basis, new, old)
    outputs = first[..., : up.shape[-2] // 2]
    yield "first_order_update", lm.first_order_update(first, down, outputs, 0.1)
    yield (
        "heldout_ratio",
        lm.heldout_ratio(lambda n, o: lm.isolated_subspace(n, o, rank), new, old, history.total),
    )
    for form in ("full", "diagonal", "box", "direction", "scalar"):
        for weight in (1.0, 0.4):
            settings: dict[str, Any] = {"form": form, "history_weight": weight}
            coefficients = lm.recalibration(up, down, new, old, 1.5, **settings)
            yield f"recalibration.{form}.{weight}", coefficients
            joint = lm.joint_recalibration(
                [up, up[..., ::-1, :] if hasattr(up, "ctypes") else up.flip(-2)],
                [down, 0.5 * down],
                [0.3, 0.7],
                *(new, old, 1.5),
                **settings,
            )
            yield f"joint_recalibration.{form}.{weight}", joint
        yield (
            f"recalibration_loss.{form}",
            lm.recalibration_loss(coefficients, up, down, new, old, 1.5),
        )
        yield f"update_effect.{form}", lm.update_effect(coefficients, up, down, new, old)
        yield (
            f"verify_recalibration.{form}",
            lm.verify.verify_recalibration(
                coefficients, up, down, new, old, 1.5, form, history_weight=0.4
            ),
        )
    yield "stack_branches", lm.stack_branches([up, 2 * up], [down, down], [0.5, 2.0])
    for objective, span in (
        ("general", lm.general_subspace(new, old, rank)),
        ("isolated", basis),
        ("trace_ratio", lm.trace_ratio_subspace(new, old, rank)),
        ("null", lm.null_subspace(old, rank)),
    ):
        yield f"verify_subspace.{objective}", lm.verify.verify_subspace(span, new, old, objective)
    change = up @ down
    yield "implied_coefficients", lm.verify.implied_coefficients(change, up, down)
    yield "verify_merge", lm.verify.verify_merge(change, 2 * change, up, down)
    yield "verify_perturbation", lm.verify.verify_perturbation(up, 0.99 * up, up, 0.1)
    if up.ndim == 2:
        groups = [up, down], [up[::1] * 0.5 - 1.0, down + 0.1]
        yield "lookahead", lm.lookahead(*groups, 0.3)
        yield "gradient_alignment", lm.gradient_alignment(*groups)
        yield "project_conflict", lm.project_conflict(groups[0], [-x for x in groups[1]])
    yield "class_split", lm.class_split(*integers)


def replay(path: Path) -> dict[str, Any]:
    """Arrays of the recorded run, computed anew through the public names of the backend.

    The head and its loss are spelled out here: they are not under test.
    """
    import numpy as np
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from torch.nn import functional

    from backends.torch import LoDA, LoDASettings

    with np.load(path) as file:
        trace = dict(file)
    c = json.loads(str(trace["config"]))
    model = VisionTransformer(
        img_size=c["img"],
        patch_size=c["patch"],
        embed_dim=c["dim"],
        depth=c["depth"],
        num_heads=c["heads"],
        num_classes=0,
    )
    start = {k.removeprefix("init/"): v for k, v in trace.items() if k.startswith("init/")}
    model.load_state_dict(
        {k: torch.from_numpy(v) for k, v in start.items() if not k.startswith("head.")}
    )
    settings = LoDASettings(rank=c["rank"], recalibration="direction", gamma=3.0, history="both")
    loda = LoDA(model, settings, record_moments=True)
    images, classes = (torch.from_numpy(trace[f"train_{name}"]) for name in "xy")
    layers = [f"blocks.{i}.attn.qkv" for i in range(2)]
    found: dict[str, Any] = {}
    heads = []
    for task in range(c["tasks"]):
        rows = (classes // c["inc"] == task).nonzero().flatten()
        x, y = images[rows], classes[rows] - task * c["inc"]
        branches = {"general": "A_general_init"} | ({"isolated": "A_isolated"} if task else {})
        bases = {
            name: {
                branch: torch.from_numpy(trace[f"task{task}/layer{i}/{key}"]).mT * math.sqrt(3)
                for branch, key in branches.items()
            }
            for i, name in enumerate(layers)
        }
        loda.begin_task([(x, y)], bases=bases)
        head = torch.nn.Parameter(torch.from_numpy(trace[f"init/head.{task}"]).clone())
        heads.append(head)
        optimizer = torch.optim.SGD(
            [*loda.trainable_parameters(), head],
            lr=c["lr"],
            momentum=0.9,
            weight_decay=c["wd"],
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, c["epochs"])
        an_epoch, step = math.ceil(len(x) / c["batch"]), 0
        model.train()
        while f"task{task}/step{step}/batch" in trace:
            key = f"task{task}/step{step}"
            batch = torch.from_numpy(trace[f"{key}/batch"])
            labels = y[batch]

            def loss(
                rows: Any, pixels: Any = x[batch], labels: Any = labels, head: Any = head
            ) -> Any:
                unit = functional.normalize(model(pixels[rows]), dim=-1)
                cosines = unit @ functional.normalize(head, dim=-1).mT
                margin = c["margin"] * functional.one_hot(labels[rows], len(head))
                return functional.cross_entropy(20.0 * (cosines - margin), labels[rows])

            order = torch.from_numpy(trace[f"{key}/class_perm"])
            loda.step(
                loss,
                labels,
                optimizer,
                radius=c["rho"],
                draw=float(trace[f"{key}/u"]),
                permutation=labels.unique()[order],
            )
            step += 1
            if step % an_epoch == 0:
                schedule.step()
        record = loda.end_task([(x, y)])
        modules = dict(model.named_modules())
        groups = {"new": record.new, "trained": record.trained, "merged": record.merged}
        groups |= {"downs": record.downs, "ups": record.ups, "lambda": record.coefficients}
        groups |= {"effects": record.effects, "history": {n: loda.history[n] for n in layers}}
        groups |= {"weights": {name: modules[name].weight for name in layers}, "head": [head]}
        found |= dict(flat(f"task{task}", groups))
        model.eval()
        with torch.no_grad():
            unit = functional.normalize(model(torch.from_numpy(trace["test_x"])), dim=-1)
            logits = [unit @ functional.normalize(head, dim=-1).mT for head in heads]
        found[f"task{task}.logits"] = torch.cat(logits, dim=1)
    return found


COMPUTING: dict[str, tuple[Callable[..., Any], ...]] = {
    "library": (mathematics, _calls),
    "replay": (replay,),
}

# --- comparing ------------------------------------------------------------------------------------

Content = tuple[str, ...]


def normalised(run: Mapping[str, Any]) -> dict[str, Content]:
    """Contents of a run by names that do not depend on where they are stored."""
    found: dict[str, Content] = {}
    paths = list(run["tensors"])
    for path, (kind, shape, digest) in run["tensors"].items():
        file, _, tensor = path.partition(":")
        place = _from_one(r"\b(tasks?/)(\d+)", file, paths)
        # A branch of SD-LoRA has the name of its task.
        tensor = _from_one(r"(/task)(\d+)(?=_)", tensor, paths)
        # A checkpoint is a folder of its own among the copies: how its file is called is no matter.
        place = re.sub(r"^(\d{3})/.*$", r"checkpoint \1", place.removesuffix(".safetensors"))
        name = _aliased(f"{place}/{tensor}")
        # A tensor without elements holds nothing: it may as well not be there.
        if 0 not in shape and not LOG.match(name):
            found[name] = (kind, "x".join(map(str, shape)), digest)
    for path, text in run["texts"].items():
        # The log within a checkpoint is that of the run so far, which the resumed run shows.
        if re.match(r"\d{3}/", path):
            continue
        for name, value in entries(path, text):
            if not DROPPED.search(name):
                found[_aliased(f"{path}:{name}")] = ("value", value)
    return found


def _from_one(pattern: str, name: str, names: list[str]) -> str:
    """The name with its task counted from 1; the lowest number among all names is the first."""
    counted = [int(number) for x in names for _, number in re.findall(pattern, x)]
    first = min(counted, default=1)
    return re.sub(pattern, lambda m: f"{m[1]}{int(m[2]) - first + 1}", name)


def _aliased(name: str) -> str:
    for pattern, form in ALIASES:
        name = re.sub(pattern, form, name)
    return name


def entries(path: str, text: str) -> Iterator[tuple[str, str]]:
    """The values in a text, by name."""
    name = Path(path).name
    if name in ("environment.json", "checkpoint.json", "manifest.json"):
        return  # of places and times; what a checkpoint says is in what is made of it
    if path.endswith(".jsonl"):
        yield from _events(text)
    elif path.endswith(".json"):
        content = json.loads(text)
        if name == "analysis.json":
            for part in ("subspaces", "losses"):
                _count_from_one(content.get(part, []), "task")
        yield from _leaves("", content)
    elif path.endswith((".md", ".tex", ".csv")):
        yield from _tables(path, text)
    elif path.endswith(".txt"):
        # Of what a command says only its numbers are compared, in no order: words may change.
        for index, number in enumerate(sorted(re.findall(r"\d+\.\d+(?:e[-+]?\d+)?", text))):
            yield f"number {index}", number


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name}.{index}", inner)
    else:
        yield name, json.dumps(value)


def _events(text: str) -> Iterator[tuple[str, str]]:
    """Lines of a log; tasks and epochs may be counted from 0 or from 1."""
    lines = [json.loads(line) for line in text.splitlines()]
    for key in ("task", "epoch"):
        _count_from_one(lines, key)
    seen: Counter[str] = Counter()
    for line in lines:
        seen[line["event"]] += 1
        yield from _leaves(f"{line['event']} {seen[line['event']]}", line)


def _count_from_one(entries: list[dict[str, Any]], key: str) -> None:
    """Shift the numbers of tasks or epochs so that the first of them is one."""
    first = min((entry[key] for entry in entries if key in entry), default=0)
    for entry in entries:
        if key in entry:
            entry[key] -= first - 1


def _tables(path: str, text: str) -> Iterator[tuple[str, str]]:
    """Cells of the tables in a text, but no times and no memory."""
    mark = "&" if path.endswith(".tex") else "|" if path.endswith(".md") else ","
    title, header, number = "", [], 0
    seen: Counter[str] = Counter()
    for line in text.splitlines():
        if mark not in line or (mark == "&" and not line.rstrip().endswith("\\\\")):
            title = line.strip("# ") if line.startswith("#") else title
            # The rules of a LaTeX table stand between its rows.
            header = header if mark == "&" and "toprule" not in line else []
            continue
        cells = [
            cell.strip()
            for cell in line.rstrip("\\ ").strip(mark if mark == "|" else "").split(mark)
        ]
        if not header:
            header, number = cells, number + 1
            yield f"table {number} columns", repr([x for x in header if not _measured(x)])
            yield f"table {number} title", title
            continue
        if all(set(cell) <= {"-", ":"} for cell in cells):
            continue
        for column, cell in zip(header[1:], cells[1:], strict=False):
            name = f"table {number} / {cells[0]} / {column}"
            seen[name] += 1
            if not _measured(column):
                yield f"{name} {seen[name]}", cell


def _measured(column: str) -> bool:
    return bool(re.search(r"\(s\)|MiB|memory", column))


@dataclass
class Difference:
    """What is not the same in two runs."""

    name: str
    what: str


def compare(
    case: str, old: Mapping[str, Content], new: Mapping[str, Content], objects: Path
) -> tuple[list[Difference], list[str], int]:
    """Differences, entries that have another name but the same content, and how much was equal."""
    equal = [name for name in old if old[name] == new.get(name)]
    found = [
        Difference(name, _apart(old[name], new[name], objects))
        for name in old
        if name in new and old[name] != new[name]
    ]
    mine = {name: x for name, x in old.items() if name not in new}
    yours = {name: x for name, x in new.items() if name not in old}
    moved = []
    for alike in (_within, _anywhere):  # first within one file, then wherever it is
        places: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, content in yours.items():
            places[alike(name), content].append(name)
        for name, content in [*mine.items()]:
            if places[alike(name), content]:
                other = places[alike(name), content].pop(0)
                moved.append(f"{name} -> {other}")
                del mine[name], yours[other]
    for side, rest in (("old", mine), ("new", yours)):
        found += [
            Difference(name, f"only in {side}: {' '.join(content)[:60]}")
            for name, content in rest.items()
            if not _allowed(side, case, name)
        ]
    return found, moved, len(equal) + len(moved)


def _within(name: str) -> str:
    return re.split(r"[:/]", name)[0]


def _anywhere(name: str) -> str:
    return ""


def _allowed(side: str, case: str, name: str) -> bool:
    return any(
        side == its_side and re.search(cases, case) and re.search(names, name)
        for its_side, cases, names, _ in ONE_SIDED
    )


def _apart(old: Content, new: Content, objects: Path) -> str:
    """How far two contents are apart."""
    if old[0] == "value" or old[:2] != new[:2]:
        return f"{' '.join(old)[:60]} -> {' '.join(new)[:60]}"
    a, b = (_numbers(x[0], objects / x[2][:2] / x[2]) for x in (old, new))
    import numpy as np

    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b)
    count = int((a != b).sum())
    largest, scale = float(np.nanmax(apart)), float(np.nanmax(np.abs(a)))
    what = f"{old[0]} {old[1]}: {count} of {a.size} differ, by at most {largest:.3g}"
    return f"{what} (largest value {scale:.3g})"


def _numbers(kind: str, path: Path) -> Any:
    import numpy as np

    content = path.read_bytes()
    if kind == "BF16":  # the upper half of a float32
        wide = np.frombuffer(content, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).astype(np.float64)
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "U8": "u1"}
    return np.frombuffer(content, kinds.get(kind, "u1")).astype(np.float64)


def compare_case(
    case: Case, old: Mapping[str, Any], new: Mapping[str, Any], cache: Path, shown: int
) -> tuple[bool, int, io.StringIO]:
    """Whether a case is equal, how many entries are, and what there is to say."""
    said = io.StringIO()
    for side, outcome in (("OLD", old), ("NEW", new)):
        if outcome["failed"]:
            print(f"{case.label}: {side} failed: {outcome['failed']}", file=said)
    if old["failed"] or new["failed"]:
        return False, 0, said
    pairs = [(label, old["runs"][label], new["runs"].get(label)) for label in old["runs"]]
    if case.kind == "resume":
        pairs.append(("resumed as left alone (new)", new["runs"]["whole"], new["runs"]["resumed"]))
    count, same = 0, old["runs"].keys() == new["runs"].keys()
    # Asked to end while it writes a checkpoint, a run may leave then, or after one more step.
    last = case.more["after"] if case.more.get("signal") == "term" else None
    for label, *runs in pairs:
        ours, theirs = (normalised(run) for run in runs)
        if label == "cut-checkpoints" and last is not None:
            ours, theirs = (
                {k: v for k, v in x.items() if int(re.findall(r"\d+", k)[0]) <= last}
                for x in (ours, theirs)
            )
        differences, moved, equal = compare(case.label, ours, theirs, cache / "objects")
        count += equal
        same = same and not differences and bool(equal or not ours)
        if differences:
            print(f"{case.label}, {label}: {len(differences)} differ, {equal} equal", file=said)
            for difference in differences[:shown]:
                print(f"    {difference.name}: {difference.what}", file=said)
        if moved:
            names = "; ".join(moved[: max(shown // 4, 1)])
            print(f"{case.label}, {label}: {len(moved)} under another name: {names}", file=said)
    return same, count, said


def main() -> int:
    parser = argparse.ArgumentParser(prog="golden", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("old", nargs="?", help="a commit, or the folder of a checkout")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PART[/CASE]")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "golden-cache"))
    parser.add_argument("--shown", type=int, default=8, help="differences shown of a run")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        Worker(json.load(sys.stdin)).run()
        return 0
    cases = [case for case in all_cases() if _chosen(case, given.only)]
    if not cases:
        parser.error(f"no case is called {given.only}")
    if given.list:
        print("\n".join(case.label for case in cases))
        return 0
    if given.old is None:
        parser.error("give at least one commit or folder; with two they are compared")
    given.cache.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in (given.old, given.new or given.old):
        begun = time.monotonic()
        with checkout(name) as code:
            print(f"{name} ({code.key})", file=sys.stderr, flush=True)
            outcomes.append(results(code, cases, given.cache, given.jobs))
        print(f"  {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return report(cases, outcomes[0], outcomes[1], given.cache, given.shown)


def report(
    cases: Iterable[Case], old: Mapping[str, Any], new: Mapping[str, Any], cache: Path, shown: int
) -> int:
    """Print what differs and the table of the parts; the exit status."""
    table: dict[str, list[int]] = {}
    for case in cases:
        same, count, said = compare_case(case, old[case.label], new[case.label], cache, shown)
        print(said.getvalue(), end="")
        row = table.setdefault(case.part, [0, 0, 0])
        row[0] += 1
        row[1] += same
        row[2] += count
    print(f"\n{'part':<12}{'cases':>8}{'equal':>8}{'entries':>10}")
    for part, (number, same_number, count) in table.items():
        print(f"{part:<12}{number:>8}{same_number:>8}{count:>10}")
    equal = all(row[0] == row[1] for row in table.values())
    print("all equal" if equal else "NOT EQUAL")
    return 0 if equal else 1


def _chosen(case: Case, only: list[str]) -> bool:
    return any(fnmatch.fnmatch(x, pattern) for pattern in only for x in (case.part, case.label))


if __name__ == "__main__":
    sys.exit(main())
