"""Every layer and task of a finished run solved again, from the moments that it saved."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loda_math import RecalibrationForm, recalibration, stack_branches, update_effect
from loda_math.verify import (
    Objective,
    implied_coefficients,
    verify_merge,
    verify_recalibration,
    verify_subspace,
)
from training.finished.claims import Array, Case, read_arrays, read_run
from training.run_dir import readable


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
    """Check what a run folder or an ``.npz`` file claims, in float64 NumPy.

    Parameters
    ----------
    path : Path
        A run trained with ``keep.moments`` and ``keep.branches``, or a file as
        :func:`training.finished.claims.read_arrays` takes.
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
        If nothing in it can be checked.
    """
    cases = read_run(path) if path.is_dir() else read_arrays(path)
    checks: list[Check] = []
    for case in cases:
        with readable(path):
            checks += check_case(case, tolerance=tolerance)
    if not checks:
        msg = f"{path} holds nothing to check: no bases beside the moments they were chosen from"
        raise ValueError(msg)
    return checks


def check_case(case: Case, *, tolerance: float = 1e-5) -> Iterator[Check]:
    """Every check that the arrays of a case allow."""
    arrays, claims = case.arrays, case.claims
    new = arrays["moment_new"]
    old = arrays.get("moment_old", np.zeros_like(new))
    first = not old.any()
    general = arrays.get("A_general_init")
    if general is None and not first:  # on the first task it may have been trained
        general = arrays.get("A_general")
    bases: list[tuple[Objective, Array | None]] = [("general", general)]
    if not first:
        bases.append((claims.isolated, arrays.get("A_isolated")))
    for objective, down in bases:
        if down is not None:
            yield _basis(case, objective, down, new, old, tolerance)
    if not _recalibrated(case):
        return
    coefficients = None
    if not first and claims.form != "none":
        coefficients = _coefficients(case)
        if coefficients is not None and "moment_new_trained" in arrays:
            yield _recalibration(case, claims.form, coefficients, tolerance)
    if "qkv_before" in arrays and "qkv_after" in arrays:
        if coefficients is not None and "coefficients" not in arrays:
            # Implied coefficients would explain whatever was merged: the exact ones must.
            coefficients = _exact(case)
        if first or claims.form == "none" or coefficients is not None:
            yield _merge(case, coefficients, first, tolerance)


def _basis(
    case: Case, objective: Objective, down: Array, new: Array, old: Array, tolerance: float
) -> Check:
    claims = case.claims
    report = verify_subspace(
        down.T / claims.down_scale,
        new,
        old,
        objective,
        ridge=claims.ridge,
        energy_floor=claims.energy_floor,
        accumulation_eps=claims.accumulation_eps,
        tolerance=tolerance,
    )
    return Check(
        case.task,
        case.layer,
        objective,
        bool(report.passed),
        float(report.orthonormality),
        float(report.stationarity),
        float(report.optimality_gap),
        float(report.energy_new),
        float(report.energy_old),
        int(report.effective_rank),
    )


def _coefficients(case: Case) -> Array | None:
    """Λ as given, or as the weights around the merge imply."""
    arrays, claims = case.arrays, case.claims
    if "coefficients" in arrays:
        return arrays["coefficients"]
    if "qkv_before" not in arrays or "qkv_after" not in arrays:
        return None
    change = arrays["qkv_after"].astype(np.float64) - arrays["qkv_before"]
    if "B_isolated" in arrays and not claims.joint:
        change -= claims.isolated_weight * arrays["B_isolated"] @ arrays["A_isolated"]
    up, down = (factor.astype(np.float64) for factor in _stack(case, _recalibrated(case)))
    found: Array = implied_coefficients(change, up, down)
    return found


def _exact(case: Case) -> Array | None:
    arrays, form = case.arrays, case.claims.form
    if form == "none" or "moment_new_trained" not in arrays:
        return None
    found: Array = recalibration(
        *_branch(case), case.claims.gamma, form, history_weight=case.claims.history_weight
    )
    return found


def _recalibrated(case: Case) -> list[str]:
    """Branches that Λ belongs to: the general one, or all of them jointly."""
    names = ("general", "isolated") if case.claims.joint else ("general",)
    return [n for n in names if f"B_{n}" in case.arrays and f"A_{n}" in case.arrays]


def _stack(case: Case, names: list[str]) -> tuple[Array, Array]:
    """B, the weights included, and A of some branches side by side."""
    weights = {"general": case.claims.general_weight, "isolated": case.claims.isolated_weight}
    ups, downs = ([case.arrays[f"{kind}_{name}"] for name in names] for kind in "BA")
    up, down = stack_branches(ups, downs, [weights[name] for name in names])
    return up, down


def _branch(case: Case) -> tuple[Array, Array, Array, Array]:
    """What the recalibration takes: B, A and both moments at the merge."""
    arrays = case.arrays
    old = arrays.get("moment_old_at_merge", arrays.get("moment_old"))
    if old is None:
        old = np.zeros_like(arrays["moment_new"])
    return *_stack(case, _recalibrated(case)), arrays["moment_new_trained"], old


def _recalibration(
    case: Case, form: RecalibrationForm, coefficients: Array, tolerance: float
) -> Check:
    branch = _branch(case)
    report = verify_recalibration(
        coefficients,
        *branch,
        case.claims.gamma,
        form,
        history_weight=case.claims.history_weight,
        tolerance=tolerance,
    )
    effect = update_effect(coefficients, *branch)
    return Check(
        case.task,
        case.layer,
        f"Λ {form}",
        bool(report.passed),
        None,
        float(report.deviation),
        float(report.optimality_gap),
        _share(effect.new_change - effect.new_loss, effect.new_change),
        _share(effect.old_change, effect.old_change_before),
    )


def _merge(case: Case, coefficients: Array | None, first: bool, tolerance: float) -> Check:
    arrays, names = case.arrays, _recalibrated(case)
    up, down = _stack(case, names)
    if coefficients is not None:
        up = up @ coefficients.astype(up.dtype)
    if not first and "B_isolated" in arrays and "isolated" not in names:
        other_up, other_down = _stack(case, ["isolated"])
        up, down = stack_branches([up, other_up], [down, other_down])
    report = verify_merge(arrays["qkv_before"], arrays["qkv_after"], up, down, tolerance=tolerance)
    passed, error = bool(report.passed), float(report.error)
    return Check(case.task, case.layer, "merge", passed, None, error, None)


def _share(part: Array, whole: Array) -> float:
    return float(part / whole) if whole > 0 else 0.0


def verification_table(checks: list[Check]) -> str:
    """Aligned plain text: a line a check, and the verdict over all below."""
    header = ("task", "layer", "what", "defect", "residual", "gap", "new", "old", "rank", "verdict")
    rows: list[tuple[str, ...]] = [header]
    for c in checks:
        small = ("" if x is None else f"{x:.1e}" for x in (c.defect, c.residual, c.gap))
        shares = ("" if x is None else f"{x:.4f}" for x in (c.new, c.old))
        rank = "" if c.directions is None else str(c.directions)
        verdict = "ok" if c.passed else "OFF"
        rows.append((c.task, c.layer, c.what, *small, *shares, rank, verdict))
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    lines = [
        "  ".join(
            x.ljust(w) if k < 3 else x.rjust(w)
            for k, (x, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]
    right = sum(c.passed for c in checks)
    return "\n".join([*lines, f"{right} of {len(checks)} checks passed"])
