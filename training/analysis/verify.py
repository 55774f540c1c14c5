"""Every solution of a run, or of somebody's ``.npz`` file, against the exact one."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

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
from training.analysis.ranks import aligned
from training.analysis.saved_tasks import Array, natural, read_settings, saved_tasks
from training.archives import require_plausible_archive
from training.files import understanding as readable

ARRAYS = (
    "moment_new",
    "moment_old",
    "A_general_init",
    "A_general",
    "B_general",
    "A_isolated",
    "B_isolated",
    "moment_new_trained",
    "moment_old_at_merge",
    "coefficients",
    "qkv_before",
    "qkv_after",
)
"""What is known of a layer in one task; ``docs/verify.md`` has their shapes and meaning."""


class SolutionSettings(NamedTuple):
    """What a solution claims to be computed under; the published settings by default.

    The weights of the branches are those at the merge, after the halving.
    """

    down_scale: float = 3**-0.5
    general_weight: float = 0.25
    isolated_weight: float = 0.5
    gamma: float = 3.0
    form: RecalibrationForm | Literal["none"] = "direction"
    isolated: Objective = "isolated"
    ridge: float = 0.0
    energy_floor: float = 0.0
    joint: bool = False
    history_weight: float = 1.0
    accumulation_eps: float = 0.0


class Check(NamedTuple):
    """One line of the table; what does not apply is None.

    Attributes
    ----------
    task, layer, what : str
        Where, and which solution.
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
        If nothing in it can be checked, or it is damaged.
    """
    checks: list[Check] = []
    for solution in read_run(path) if path.is_dir() else read_arrays(path):
        with readable(path):
            checks += solution.checks(tolerance=tolerance)
    if not checks:
        msg = f"{path} holds nothing to check: no bases beside the moments they were chosen from"
        raise ValueError(msg)
    return checks


@dataclass(frozen=True)
class Solution:
    """What was solved for one layer in one task.

    Parameters
    ----------
    task, layer : str
        Their names.
    arrays : mapping of str to array
        Some of `ARRAYS`, ``moment_new`` among them.
    settings : SolutionSettings
        What they were computed under.
    """

    task: str
    layer: str
    arrays: Mapping[str, Array]
    settings: SolutionSettings

    @property
    def old(self) -> Array:
        """Moment of the old tasks as the directions were chosen; zeros on the first task."""
        return self.arrays.get("moment_old", np.zeros_like(self.arrays["moment_new"]))

    @property
    def recalibrated(self) -> list[str]:
        """Branches that Λ belongs to: the general one, or all of them jointly."""
        names = ("general", "isolated") if self.settings.joint else ("general",)
        return [n for n in names if f"B_{n}" in self.arrays and f"A_{n}" in self.arrays]

    def checks(self, *, tolerance: float = 1e-5) -> Iterator[Check]:
        """Every check that the arrays allow."""
        arrays, form = self.arrays, self.settings.form
        first = not self.old.any()
        general = arrays.get("A_general_init")
        if general is None and not first:  # on the first task it may have been trained
            general = arrays.get("A_general")
        if general is not None:
            yield self._check_basis("general", general, tolerance)
        if not first and "A_isolated" in arrays:
            yield self._check_basis(self.settings.isolated, arrays["A_isolated"], tolerance)
        if not self.recalibrated:
            return
        coefficients = None
        if not first and form != "none":
            coefficients = arrays.get("coefficients")
            claimed = self._implied() if coefficients is None else coefficients
            if claimed is not None and "moment_new_trained" in arrays:
                yield self._check_recalibration(form, claimed, tolerance)
                if coefficients is None:
                    # Implied coefficients would explain whatever was merged: the exact ones must.
                    coefficients = self._exact(form)
        if self._has_weights and (first or form == "none" or coefficients is not None):
            yield self._check_merge(coefficients, tolerance, first=first)

    @property
    def _has_weights(self) -> bool:
        return "qkv_before" in self.arrays and "qkv_after" in self.arrays

    def _check_basis(self, objective: Objective, down: Array, tolerance: float) -> Check:
        settings = self.settings
        report = verify_subspace(
            down.T / settings.down_scale,
            self.arrays["moment_new"],
            self.old,
            objective,
            ridge=settings.ridge,
            energy_floor=settings.energy_floor,
            accumulation_eps=settings.accumulation_eps,
            tolerance=tolerance,
        )
        return Check(
            self.task,
            self.layer,
            objective,
            passed=bool(report.passed),
            defect=float(report.orthonormality),
            residual=float(report.stationarity),
            gap=float(report.optimality_gap),
            new=float(report.energy_new),
            old=float(report.energy_old),
            directions=int(report.effective_rank),
        )

    def _check_recalibration(
        self, form: RecalibrationForm, coefficients: Array, tolerance: float
    ) -> Check:
        settings, branches = self.settings, self._at_merge()
        report = verify_recalibration(
            coefficients,
            *branches,
            settings.gamma,
            form,
            history_weight=settings.history_weight,
            tolerance=tolerance,
        )
        effect = update_effect(coefficients, *branches)
        return Check(
            self.task,
            self.layer,
            f"Λ {form}",
            passed=bool(report.passed),
            defect=None,
            residual=float(report.deviation),
            gap=float(report.optimality_gap),
            new=_share(effect.new_change - effect.new_loss, effect.new_change),
            old=_share(effect.old_change, effect.old_change_before),
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

    def _implied(self) -> Array | None:
        """Λ as the weights around the merge imply it."""
        if not self._has_weights:
            return None
        arrays = self.arrays
        change = arrays["qkv_after"].astype(np.float64) - arrays["qkv_before"]
        if "B_isolated" in arrays and not self.settings.joint:
            weight = self.settings.isolated_weight
            change -= weight * arrays["B_isolated"] @ arrays["A_isolated"]
        up, down = (factor.astype(np.float64) for factor in self._stacked(self.recalibrated))
        implied: Array = implied_coefficients(change, up, down)
        return implied

    def _exact(self, form: RecalibrationForm) -> Array:
        settings = self.settings
        exact: Array = recalibration(
            *self._at_merge(), settings.gamma, form, history_weight=settings.history_weight
        )
        return exact

    def _at_merge(self) -> tuple[Array, Array, Array, Array]:
        """What the recalibration takes: B, A and both moments at the merge."""
        old = self.arrays.get("moment_old_at_merge", self.old)
        return *self._stacked(self.recalibrated), self.arrays["moment_new_trained"], old

    def _stacked(self, branches: list[str]) -> tuple[Array, Array]:
        """B, the weights included, and A of some branches side by side."""
        weights = {
            "general": self.settings.general_weight,
            "isolated": self.settings.isolated_weight,
        }
        ups, downs = ([self.arrays[f"{kind}_{name}"] for name in branches] for kind in "BA")
        up, down = stack_branches(ups, downs, [weights[name] for name in branches])
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
    loda = read_settings(path)
    settings = SolutionSettings(
        loda.down_scale,
        loda.weight("general"),
        loda.weight("isolated"),
        loda.gamma,
        loda.recalibration,
        "isolated" if loda.isolated == "pencil" else loda.isolated,
        loda.ridge,
        loda.energy_floor or 0.0,
        loda.joint,
        accumulation_eps=rounding_unit(),
    )
    for task in saved_tasks(path, loda, branches=True):
        for name, layer in task.layers.items():
            arrays = {
                "moment_new": layer.new,
                "moment_new_trained": layer.trained,
                "coefficients": layer.coefficients,
                **{f"A_{branch}": down for branch, down in layer.downs.items()},
                **{f"B_{branch}": up for branch, up in layer.ups.items()},
            }
            weight = loda.history_weight
            if layer.history is not None:
                arrays |= dict.fromkeys(("moment_old", "moment_old_at_merge"), layer.history.total)
            if weight == "mean":
                weight = 1.0 if layer.history is None else 1 / layer.history.weight
            yield Solution(
                str(task.number),
                name,
                {name: array for name, array in arrays.items() if array is not None},
                settings._replace(history_weight=weight),
            )


def read_arrays(path: Path) -> Iterator[Solution]:
    """Solutions in an ``.npz`` file of arrays ``TASK/LAYER/NAME``, as any code can write it.

    `ARRAYS` are the names; arrays of other names are not read. What is not there is not checked. A
    string ``settings`` (JSON) may set any field of `SolutionSettings`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no ``.npz`` file, or has settings or arrays that do not make sense.
    """
    if not path.is_file():
        msg = f"no run folder and no file {path}"
        raise FileNotFoundError(msg)
    try:
        require_plausible_archive(path)
        # NumPy leaves a file that it cannot read open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            content = {
                key: archive[key]
                for key in archive.files
                if key == "settings" or key.rpartition("/")[2] in ARRAYS
            }
    except Exception as error:  # whatever a damaged or foreign archive provokes in the readers
        msg = f"cannot read {path} as .npz: {' '.join(str(error).split()) or repr(error)}"
        raise ValueError(msg) from error
    settings = _read_settings(path, str(content.pop("settings", "{}")))
    groups: dict[tuple[str, str], dict[str, Array]] = {}
    for key, array in content.items():
        if array.ndim != 2:
            msg = f"{path}: {key} must be a matrix, got the shape {array.shape}"
            raise ValueError(msg)
        place, _, name = key.rpartition("/")
        task, _, layer = place.partition("/")
        if task and layer:
            groups.setdefault((task, layer), {})[name] = array
    for task, layer in sorted(groups, key=lambda place: [natural(name) for name in place]):
        if "moment_new" in groups[task, layer]:
            yield Solution(task, layer, groups[task, layer], settings)


def _read_settings(path: Path, text: str) -> SolutionSettings:
    """The string ``settings`` of a file; its values are checked by what takes them."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        msg = f"{path}: settings is no JSON: {error}"
        raise ValueError(msg) from error
    if not isinstance(given, dict) or set(given) - set(SolutionSettings._fields):
        msg = (
            f"{path}: settings must be JSON with some of {', '.join(SolutionSettings._fields)}, "
            f"got {given}"
        )
        raise ValueError(msg)
    return SolutionSettings(**given)


def _share(part: Array, whole: Array) -> float:
    return float(part / whole) if whole > 0 else 0.0


def verification_table(checks: list[Check]) -> str:
    """Aligned plain text: a line a check, and the verdict over all below."""
    rows = [["task", "layer", "what", "defect", "residual", "gap", "new", "old", "rank", "verdict"]]
    for c in checks:
        small = ("" if x is None else f"{x:.1e}" for x in (c.defect, c.residual, c.gap))
        shares = ("" if x is None else f"{x:.4f}" for x in (c.new, c.old))
        rank = "" if c.directions is None else str(c.directions)
        verdict = "ok" if c.passed else "OFF"
        rows.append([c.task, c.layer, c.what, *small, *shares, rank, verdict])
    passed = sum(c.passed for c in checks)
    return f"{aligned(rows, left=3)}\n{passed} of {len(checks)} checks passed"
