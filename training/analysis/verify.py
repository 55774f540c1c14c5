"""Compare every solution of a run, or of an ``.npz`` file, with the exact one."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from backends.torch.settings import LoDASettings
from loda_math import (
    RecalibrationForm,
    recalibration,
    rounding_unit,
    stack_branches,
    update_effect,
)
from loda_math.verify import (
    Objective,
    implied_coefficients,
    verify_merge,
    verify_recalibration,
    verify_subspace,
)
from training.analysis.saved_tasks import Array, Layer, natural_sort_key, read_settings, saved_tasks
from training.logging import aligned
from training.run_dir import readable, require_plausible_archive

# TASK/LAYER/NAME of an array in an .npz file.
_KEY = re.compile(
    r"([^/]+)/(.+)/(moment_(?:new|old|new_trained|old_at_merge)|coefficients|qkv_(?:before|after)"
    r"|A_general_init|[AB]_(?:general|isolated))"
)
# The published settings, which hold for a file unless it says otherwise.
_PUBLISHED: dict[str, Any] = {"recalibration": "direction", "gamma": 3.0, "ridge": 0.0}


class Check(NamedTuple):
    """One line of the table; None stands for what does not apply.

    Attributes
    ----------
    task, layer, what : str
        Task, layer and name of the solution.
    passed : bool
        The verdict.
    defect : float or None
        Departure of the basis from orthonormality.
    residual : float
        Of the stationarity equation; for Λ the distance to the exact one, for a merge the part of
        the update that is unexplained.
    gap : float or None
        Share of the optimum that is missed (for Λ: the optimum of the full form).
    new, old : float or None
        Relative energies of a basis; for Λ, how much of the update it keeps on new inputs and how
        much of its interference on old ones.
    directions : int or None
        Directions with new-task energy above rounding.
    """

    task: str
    layer: str
    what: str
    passed: bool
    defect: float | None
    residual: float
    gap: float | None
    new: float | None = None
    old: float | None = None
    directions: int | None = None


def verify(path: Path, *, tolerance: float = 1e-5) -> list[Check]:
    """Check every solution in a run folder or an ``.npz`` file, in float64 NumPy.

    Parameters
    ----------
    path : Path
        A run trained with ``keep.moments`` and ``keep.branches``, or a file as
        :func:`read_arrays` takes.
    tolerance : float
        As in :func:`loda_math.verify.verify_subspace`.

    Returns
    -------
    list of Check
        In the order of tasks and layers.

    Raises
    ------
    FileNotFoundError
        If there is no such run or file.
    ValueError
        If nothing in it can be checked, it is damaged, or the tolerance is not positive.
    """
    # Refused here: below, a ValueError is taken for damage of the files.
    if not (math.isfinite(tolerance) and tolerance > 0):
        msg = f"tolerance must be finite and positive, got {tolerance}; lower or raise it"
        raise ValueError(msg)
    checks: list[Check] = []
    for solution in read_run(path) if path.is_dir() else read_arrays(path):
        with readable(path, f"task {solution.task}, layer {solution.layer}"):
            checks += solution.checks(tolerance=tolerance)
    if not checks:
        msg = (
            f"{path} holds nothing to check: bases must come with the moments they were chosen from"
        )
        raise ValueError(msg)
    return checks


@dataclass(frozen=True)
class Solution:
    """What was computed for one layer in one task.

    Parameters
    ----------
    task, layer : str
        Their names.
    arrays : mapping of str to array
        Arrays of the layer, at least ``moment_new``; ``docs/verify.md`` has the names and shapes.
    settings : LoDASettings
        Settings under which it was computed.
    history_weight : float
        Weight of the old moment in the recalibration, a number.
    accumulation_eps : float
        As in :func:`loda_math.isolated_subspace`.
    """

    task: str
    layer: str
    arrays: Layer
    settings: LoDASettings
    history_weight: float = 1.0
    accumulation_eps: float = 0.0

    @property
    def old(self) -> Array:
        """Moment of the old tasks as the directions were chosen; zeros on the first task."""
        return self.arrays.get("moment_old", np.zeros_like(self.arrays["moment_new"]))

    @property
    def recalibrated(self) -> list[str]:
        """Branches that Λ belongs to: the general one, or all of them jointly."""
        names = ("general", "isolated") if self.settings.joint else ("general",)
        return [name for name in names if {f"A_{name}", f"B_{name}"} <= self.arrays.keys()]

    def checks(self, *, tolerance: float = 1e-5) -> Iterator[Check]:
        """Every check that the arrays allow."""
        arrays, first = self.arrays, not self.old.any()
        form = self.settings.form(first)
        general = arrays.get("A_general_init")
        if general is None and not first:  # on the first task it may have been trained
            general = arrays.get("A_general")
        if general is not None:
            yield self._check_basis("general", general, tolerance)
        if not first and "A_isolated" in arrays:
            rule = self.settings.isolated
            objective: Objective = "isolated" if rule == "quotient" else rule
            yield self._check_basis(objective, arrays["A_isolated"], tolerance)
        if not self.recalibrated:
            return
        weights = {"qkv_before", "qkv_after"} <= arrays.keys()
        coefficients = None if form is None else arrays.get("coefficients")
        if form is not None and "moment_new_trained" in arrays:
            if coefficients is not None:
                yield self._check_recalibration(form, coefficients, tolerance)
            elif weights:
                yield self._check_recalibration(form, self._implied(), tolerance)
                # Implied coefficients would explain whatever was merged: the exact ones must.
                coefficients = recalibration(
                    *self._at_merge(), self.settings.gamma, form, history_weight=self.history_weight
                )
        if weights and (form is None or coefficients is not None):
            yield self._check_merge(coefficients, tolerance, first=first)

    def _check_basis(self, objective: Objective, down: Array, tolerance: float) -> Check:
        report = verify_subspace(
            down.T / self.settings.down_scale,
            self.arrays["moment_new"],
            self.old,
            objective,
            ridge=self.settings.ridge,
            ridge_scale=self.settings.ridge_scale,
            energy_floor=self.settings.energy_floor,
            accumulation_eps=self.accumulation_eps,
            tolerance=tolerance,
        )
        return Check(
            self.task,
            self.layer,
            objective,
            bool(report.passed),
            float(report.orthonormality),
            float(report.stationarity),
            float(report.optimality_gap),
            float(report.energy_new),
            float(report.energy_old),
            int(report.effective_rank),
        )

    def _check_recalibration(
        self, form: RecalibrationForm, coefficients: Array, tolerance: float
    ) -> Check:
        report = verify_recalibration(
            coefficients,
            *self._at_merge(),
            self.settings.gamma,
            form,
            history_weight=self.history_weight,
            tolerance=tolerance,
        )
        effect = update_effect(coefficients, *self._at_merge())
        return Check(
            self.task,
            self.layer,
            f"Λ {form}",
            bool(report.passed),
            None,
            float(report.deviation),
            float(report.optimality_gap),
            _share(effect.new_change - effect.new_loss, effect.new_change),
            _share(effect.old_change, effect.old_change_before),
        )

    def _check_merge(self, coefficients: Array | None, tolerance: float, *, first: bool) -> Check:
        up, down = self._stacked(self.recalibrated)
        if coefficients is not None:
            up = up @ coefficients.astype(up.dtype)
        if not first and "B_isolated" in self.arrays and "isolated" not in self.recalibrated:
            isolated_up, isolated_down = self._stacked(["isolated"])
            up, down = stack_branches([up, isolated_up], [down, isolated_down])
        before, after = self.arrays["qkv_before"], self.arrays["qkv_after"]
        report = verify_merge(before, after, up, down, tolerance=tolerance)
        passed, error = bool(report.passed), float(report.error)
        return Check(self.task, self.layer, "merge", passed, None, error, None)

    def _implied(self) -> Array:
        """Λ implied by the weights before and after the merge."""
        arrays = self.arrays
        change = arrays["qkv_after"].astype(np.float64) - arrays["qkv_before"]
        if "B_isolated" in arrays and not self.settings.joint:
            weight = self.settings.weight("isolated")
            change -= weight * arrays["B_isolated"] @ arrays["A_isolated"]
        up, down = (factor.astype(np.float64) for factor in self._stacked(self.recalibrated))
        implied: Array = implied_coefficients(change, up, down)
        return implied

    def _at_merge(self) -> tuple[Array, Array, Array, Array]:
        """Inputs of the recalibration: B, A and both moments at the merge."""
        old = self.arrays.get("moment_old_at_merge", self.old)
        return *self._stacked(self.recalibrated), self.arrays["moment_new_trained"], old

    def _stacked(self, branches: list[str]) -> tuple[Array, Array]:
        """B, times the branch weights, and A of some branches, stacked."""
        ups, downs = ([self.arrays[f"{kind}_{name}"] for name in branches] for kind in "BA")
        up, down = stack_branches(ups, downs, [self.settings.weight(name) for name in branches])
        return up, down


def read_run(path: Path) -> Iterator[Solution]:
    """Solutions of a run, by task and layer; the history is summed up from the saved moments.

    Raises
    ------
    FileNotFoundError
        If the folder is no run, or kept no moments and branches.
    ValueError
        If the run used a method without subspaces, or a file is damaged.
    """
    settings = read_settings(path)
    for task in saved_tasks(path, settings, branches=True):
        for name, layer in task.layers.items():
            arrays, weight = dict(layer), settings.history_weight
            history = task.history.get(name)
            if history is not None:
                arrays["moment_old"] = history.total
            if weight == "mean":
                weight = 1.0 if history is None else 1 / history.weight
            yield Solution(str(task.number), name, arrays, settings, weight, rounding_unit())


def read_arrays(path: Path) -> Iterator[Solution]:
    """Solutions in an ``.npz`` file of arrays ``TASK/LAYER/NAME``, which any code can write.

    Arrays of other names are not read, and missing ones are not checked. A string ``settings``
    (JSON) may set any field of `LoDASettings` and `accumulation_eps`; the defaults are the
    published ones.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not an ``.npz`` file, or its settings are invalid.
    """
    if not path.is_file():
        msg = f"no run folder or file {path}"
        raise FileNotFoundError(msg)
    layers: dict[tuple[str, str], dict[str, Array]] = {}
    try:
        require_plausible_archive(path)
        # NumPy leaves a file that it cannot read open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            text = str(archive["settings"]) if "settings" in archive.files else "{}"
            for key in archive.files:
                if place := _KEY.fullmatch(key):
                    task, layer, name = place.groups()
                    layers.setdefault((task, layer), {})[name] = archive[key]
    except Exception as error:  # damaged or foreign archives raise all kinds of errors
        msg = f"cannot read {path} as .npz: {' '.join(str(error).split()) or repr(error)}"
        raise ValueError(msg) from error
    with readable(path, "settings"):
        given = {"accumulation_eps": 0.0, **json.loads(text)}
        eps = given.pop("accumulation_eps")
        settings = LoDASettings(**{**_PUBLISHED, **given})
        if settings.history_weight == "mean":
            msg = "history_weight must be a number in an .npz file, got 'mean'"
            raise ValueError(msg)
    for task, layer in sorted(layers, key=lambda place: [natural_sort_key(name) for name in place]):
        arrays = layers[task, layer]
        if "moment_new" in arrays:
            yield Solution(task, layer, arrays, settings, settings.history_weight, eps)


def _share(part: Array, whole: Array) -> float:
    return float(part / whole) if whole > 0 else 0.0


def verification_table(checks: list[Check]) -> str:
    """Aligned plain text: one line per check, and the overall verdict below."""
    rows = [["task", "layer", "what", "defect", "residual", "gap", "new", "old", "rank", "verdict"]]
    for c in checks:
        small = ("" if x is None else f"{x:.1e}" for x in (c.defect, c.residual, c.gap))
        shares = ("" if x is None else f"{x:.4f}" for x in (c.new, c.old))
        rank = "" if c.directions is None else str(c.directions)
        verdict = "ok" if c.passed else "OFF"
        rows.append([c.task, c.layer, c.what, *small, *shares, rank, verdict])
    passed = sum(c.passed for c in checks)
    return f"{aligned(rows, left=3)}\n{passed} of {len(checks)} checks passed"
