"""Compare what every packaged configuration sets, before and after a change of the settings.

    python tests/golden_configs.py OLD NEW

OLD and NEW are checkouts. In both, ``--print-config`` is taken of every packaged configuration,
of every one of the paper with every method, and of every variant of the packaged sweeps. The
tables below say which settings have another name now, which are new, and which a component
dropped because it never read them. All differences are printed, those that these tables explain
once each. Run by hand; exits with 1 if one has no explanation.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Prints every configuration of a checkout, as one JSON object by name. It runs in OLD and in NEW.
PRINT = """
import contextlib, io, json, yaml
from training.config import load_experiment, packaged_configs
try:
    from training.sweep import packaged_sweeps, plan, read_sweep
except ImportError:
    from training.sweeps import plan, read_sweep
    from training.sweeps.files import packaged_sweeps
from training.config import dump_experiment
from pathlib import Path
METHODS = "loda seq_lora joint frozen ncm ranpac_frozen null_lora o_lora inflora sd_lora".split()
found = {}
def printed(*argv):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        load_experiment([*argv, "--print-config"])
    found[" ".join(argv)] = yaml.safe_load(out.getvalue())
printed()
for name in packaged_configs():
    below = ["--config=paper/cifar100"] if name.startswith("native/") else []
    printed(*below, f"--config={name}")
    for method in METHODS if name.startswith("paper/") or name == "digits" else ():
        printed(f"--config={name}", f"--method.name={method}")
for sweep in packaged_sweeps():
    extra = [] if sweep == "digits" else ["--data.root=x"]
    if sweep in ("caltech101", "caltech101-trials"):
        extra.append("--backbone.weights=w.pth")
    for job in plan(read_sweep(sweep), Path("out"), extra):
        found[f"sweep {sweep}: {job.name}"] = yaml.safe_load(dump_experiment(job.experiment))
print(json.dumps(found))
"""

RENAMED = {
    **{
        f"head.alignment_{key}": f"head.alignment.{key}"
        for key in ("epochs", "shrinkage", "lr", "temperature", "covariance")
    },
    "head.ridge_features": "head.ridge.features",
    **{
        f"method.options.{key}": f"method.{key}"
        for key in ("directions", "penalty", "alpha", "parts", "lamb", "lame", "start")
    },
}
"""Settings that have another name now."""

_BRANCH = {"name", "rank", "target", "gao", "radius"}
_NULL = {"general_weight", "isolated_weight", "down_scale", "history", "history_decay", "heldout"}
READ = {
    "seq_lora": _BRANCH,
    "joint": _BRANCH,
    "frozen": {"name"},
    "ncm": {"name"},
    "ranpac_frozen": {"name"},
    "null_lora": {*_BRANCH, *_NULL, "directions"},
    "o_lora": {*_BRANCH, "penalty", "alpha", "parts"},
    "inflora": {*_BRANCH, "lamb", "lame", "parts", "down_scale"},
    "sd_lora": {*_BRANCH, "start", "parts"},
}
"""Settings of ``method`` that a method reads; the others are gone. LoDA reads all of them."""

ADDED = {
    "method.directions": "solved",
    "method.penalty": 0.5,
    "method.alpha": None,
    "method.parts": "all",
    "method.lamb": 0.95,
    "method.lame": 1.0,
    "method.start": 0.8,
    "keep.state": True,
    "keep.figure": True,
    "head.alignment.relative": False,
    "head.alignment.momentum": 0.9,
    "head.alignment.weight_decay": 5e-4,
    "head.alignment.tolerance": 0.01,
    "head.alignment.max_steps": 3000,
}
"""Settings that were not printed before, with the value that had been in force."""


def configurations(checkout: Path) -> dict[str, dict[str, Any]]:
    """Every configuration of a checkout by name, under dotted names."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PRINT],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {name: dict(flat(found)) for name, found in json.loads(done.stdout).items()}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings under dotted names; options of timm stay together."""
    for key, value in values.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "backbone.options":
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unread(key: str, old: Mapping[str, Any]) -> bool:
    """Whether nothing has ever read a setting that is gone."""
    section, _, setting = key.partition(".")
    method = old["method.name"]
    readouts = {old["head.readout"], *old["head.also"]}
    if method in ("ncm", "ranpac_frozen"):
        readouts.add({"ncm": "nearest_mean", "ranpac_frozen": "ridge"}[method])
    if section == "method":
        return setting not in READ.get(method, {setting})
    if key.startswith(("head.alignment.", "head.ridge.")):
        return setting.partition(".")[0] not in readouts
    if section == "data":  # what other data sets are made with
        return old[key] in (None, False, "train", "validation")
    if section == "backbone":  # what packaged ones refused
        return old[key] in (None, {})
    return key == "overwrite"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Differences, and whether the tables explain them."""
    yield from ((True, f"{key} is {RENAMED[key]}") for key in old if key in RENAMED)
    before = {RENAMED.get(key, key): value for key, value in old.items() if key != "method.options"}
    if before["method.gao"] is None:  # as the method is published
        before["method.gao"] = before["method.name"] == "loda"
    if before["head.readout"] != new["head.readout"]:  # those of sweeps are printed as they run
        own = {"ncm": "nearest_mean", "ranpac_frozen": "ridge"}[before["method.name"]]
        asked = [before["head.readout"], *before["head.also"]]
        before |= {"head.readout": own, "head.also": [x for x in asked if x != own]}
        before["train.epochs"] = 0
    for key, value in before.items():
        if key not in new:
            explained = unread(key, before)
            of = f" of {new['method.name']}" if key.startswith("method.") else ""
            yield explained, f"{key}{of} is gone" + ("" if explained else f", was {value!r}")
        elif new[key] != value:
            yield False, f"{key} is {new[key]!r}, was {value!r}"
    for key, value in new.items():
        if key not in before:
            yield key in ADDED and ADDED[key] == value, f"{key} is new, {value!r}"


def main(old: str, new: str) -> int:
    """Compare two checkouts; the exit status."""
    before, after = (configurations(Path(path).resolve()) for path in (old, new))
    wrong = [f"{name}: only in {old}" for name in before if name not in after]
    wrong += [f"{name}: only in {new}" for name in after if name not in before]
    counts: Counter[str] = Counter()
    for name in before.keys() & after.keys():
        for explained, what in compare(before[name], after[name]):
            counts.update([what] if explained else [])
            wrong += [] if explained else [f"{name}: {what}"]
    print("\n".join(f"{what} ({counts[what]} configurations)" for what in sorted(counts)))
    print("\n".join(sorted(wrong)))
    print(f"{len(before)} configurations, {len(wrong)} differences without an explanation")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
