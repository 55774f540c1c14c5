"""Check everything that was computed for one layer in one task, from its arrays."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from loda_math._arrays import Array, Namespace, namespace, safe_divide, widen
from loda_math._subspaces import RidgeScale
from loda_math._validation import check_eps, check_scalar, check_share
from loda_math.recalibration import RecalibrationForm, recalibration, stack_branches, update_effect
from loda_math.verify.merge import implied_coefficients, verify_merge
from loda_math.verify.recalibration import verify_recalibration
from loda_math.verify.subspaces import Objective, verify_subspace

IsolatedRule = Literal["quotient", "trace_ratio", "null"]

LAYER_ARRAYS = (
    "moment_new",
    "moment_old",
    "moment_new_trained",
    "moment_old_at_merge",
    "A_general_init",
    "A_general",
    "B_general",
    "A_isolated",
    "B_isolated",
    "coefficients",
    "weight_before",
    "weight_after",
)
"""Names under which :func:`verify_layer` looks for the arrays of a layer."""


@dataclass(frozen=True)
class LayerSettings:
    r"""Under what the solutions of a layer were computed; as published by default.

    Parameters
    ----------
    down_scale : float
        c in :math:`A = c U^\top`.
    general_weight, isolated_weight : float
        Weights of the branches as they are merged: halved already if there are both.
    isolated : {"quotient", "trace_ratio", "null"}
        What the directions of the isolated branch optimise.
    ridge, ridge_scale, energy_floor
        As in :func:`loda_math.isolated_subspace`.
    form : {"full", "diagonal", "box", "direction", "scalar"} or None
        Form of Λ from the second task on; ``None`` if branches are merged as trained.
    joint : bool
        Whether Λ belongs to both branches, stacked.
    gamma, history_weight : float
        As in :func:`loda_math.recalibration`.
    accumulation_eps : float, optional
        As in :func:`loda_math.general_subspace`, for the directions and for Λ.

    Raises
    ------
    TypeError, ValueError
        If a setting is out of range, or none of its choices.

    See Also
    --------
    verify_layer : Uses them.

    Examples
    --------
    >>> LayerSettings(form="full", gamma=1.5).general_weight
    0.25
    """

    down_scale: float = 3**-0.5
    general_weight: float = 0.25
    isolated_weight: float = 0.5
    isolated: IsolatedRule = "quotient"
    ridge: float = 0.0
    ridge_scale: RidgeScale = "mean"
    energy_floor: float = 0.0
    form: RecalibrationForm | None = "direction"
    joint: bool = False
    gamma: float = 3.0
    history_weight: float = 1.0
    accumulation_eps: float | None = None

    def __post_init__(self) -> None:
        check_scalar("down_scale", self.down_scale, positive=True)
        for name in ("general_weight", "isolated_weight", "ridge", "gamma", "history_weight"):
            check_scalar(name, getattr(self, name))
        check_share("energy_floor", self.energy_floor)
        check_eps("accumulation_eps", self.accumulation_eps)
        forms = (*get_args(RecalibrationForm), None)
        for name, known in (
            ("isolated", get_args(IsolatedRule)),
            ("ridge_scale", get_args(RidgeScale)),
            ("form", forms),
            ("joint", (True, False)),
        ):
            if getattr(self, name) not in known:
                msg = f"{name} must be one of {known}, got {getattr(self, name)!r}"
                raise ValueError(msg)
        if self.energy_floor != 0 and self.isolated != "trace_ratio":
            msg = (
                f"energy_floor must be 0 unless isolated is 'trace_ratio', got {self.energy_floor} "
                f"with {self.isolated!r}"
            )
            raise ValueError(msg)


class Check(NamedTuple):
    """The verdict on one solution; None stands for what does not apply.

    Attributes
    ----------
    what : str
        Name of the solution.
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
    task, layer : str
        Where the solution belongs, if it is one of many.
    """

    what: str
    passed: bool
    defect: float | None
    residual: float
    gap: float | None
    new: float | None = None
    old: float | None = None
    directions: int | None = None
    task: str = ""
    layer: str = ""


def verify_layer(
    arrays: Mapping[str, Array],
    settings: LayerSettings | None = None,
    *,
    tolerance: float = 1e-5,
) -> list[Check]:
    r"""Check the subspaces, the recalibration and the merge of a layer, whatever is given of them.

    Parameters
    ----------
    arrays : mapping of str to array
        Arrays of one library under names of :data:`LAYER_ARRAYS`. ``moment_new`` is needed; what
        needs an array that is missing is not checked.

        =========================== ======== =======================================================
        ``moment_new``              (D, D)   the moment that the directions were chosen from
        ``moment_old``              (D, D)   the history then; absent or zero on the first task
        ``A_general_init``          (r, D)   the general down-projection as chosen, scale included;
                                             from the second task on, ``A_general`` if absent
        ``A_isolated``              (r, D)   the isolated down-projection, scale included
        ``A_general``               (r, D)   the general down-projection at the merge
        ``B_general, B_isolated``   (O, r)   the up-projections at the merge
        ``moment_new_trained``      (D, D)   the moment of the recalibration, through the trained
                                             model
        ``moment_old_at_merge``     (D, D)   the history of the recalibration; ``moment_old`` if
                                             absent
        ``coefficients``            (r, r)   Λ; if absent, it is recovered from the weights
        ``weight_before``           (O, D)   the weight before the merge
        ``weight_after``            (O, D)   the weight after it
        =========================== ======== =======================================================
    settings : LayerSettings, optional
        Under what the arrays were computed; as published by default.
    tolerance : float, default 1e-5
        As in :func:`verify_subspace`, :func:`verify_recalibration` and :func:`verify_merge`.

    Returns
    -------
    list of Check
        ``general`` and the isolated objective, ``Λ`` with its form, and ``merge``.

    Raises
    ------
    TypeError
        If an array is not a real floating-point array.
    ValueError
        If ``moment_new`` or the down-projection of an up-projection is missing, shapes do not
        match, or values are not finite.

    See Also
    --------
    verify_archive : The same for all layers in an ``.npz`` file.

    Examples
    --------
    >>> import numpy as np
    >>> from loda_math import general_subspace
    >>> new, old = np.diag([4.0, 2.0, 1.0]), np.diag([0.0, 3.0, 1.0])
    >>> arrays = {"moment_new": new, "moment_old": old}
    >>> arrays["A_general"] = general_subspace(new, old, 2).T
    >>> [(c.what, c.passed) for c in verify_layer(arrays, LayerSettings(down_scale=1.0))]
    [('general', True)]
    """
    settings = LayerSettings() if settings is None else settings
    tolerance = check_scalar("tolerance", tolerance, positive=True)
    arrays = {name: arrays[name] for name in LAYER_ARRAYS if name in arrays}
    if "moment_new" not in arrays:
        msg = f"moment_new is missing, got {sorted(arrays)}; every check needs it"
        raise ValueError(msg)
    for name in ("general", "isolated"):
        if f"B_{name}" in arrays and f"A_{name}" not in arrays:
            msg = f"A_{name} is missing, got B_{name} without it"
            raise ValueError(msg)
    return list(_Layer(namespace(**arrays), arrays, settings, tolerance).checks())


class _Layer(NamedTuple):
    """The arrays of a layer, and the checks that they allow."""

    xp: Namespace
    arrays: Mapping[str, Array]
    settings: LayerSettings
    tolerance: float

    @property
    def first(self) -> bool:
        """Whether it is the first task: there is no history, or nothing in it."""
        old = self.arrays.get("moment_old")
        return old is None or not bool(self.xp.any(old != 0))

    @property
    def recalibrated(self) -> list[str]:
        """Branches that Λ belongs to: the general one, or all of them jointly."""
        names = ("general", "isolated") if self.settings.joint else ("general",)
        return [name for name in names if {f"A_{name}", f"B_{name}"} <= self.arrays.keys()]

    def checks(self) -> Iterator[Check]:
        arrays, first = self.arrays, self.first
        form = None if first else self.settings.form
        general = arrays.get("A_general_init")
        if general is None and not first:  # on the first task it may have been trained
            general = arrays.get("A_general")
        if general is not None:
            yield self._basis("general", general)
        if not first and "A_isolated" in arrays:
            rule = self.settings.isolated
            yield self._basis("isolated" if rule == "quotient" else rule, arrays["A_isolated"])
        if not self.recalibrated:
            return
        has_weights = {"weight_before", "weight_after"} <= arrays.keys()
        coefficients = None if form is None else arrays.get("coefficients")
        if form is not None and "moment_new_trained" in arrays:
            if coefficients is not None:
                yield self._recalibration(form, coefficients)
            elif has_weights:
                yield self._recalibration(form, self._implied())
                # Implied coefficients would explain whatever was merged: the exact ones must.
                coefficients = recalibration(*self._at_merge(), **self._rule(form))
        if has_weights and (form is None or coefficients is not None):
            yield self._merge(coefficients)

    def _basis(self, objective: Objective, down: Array) -> Check:
        settings = self.settings
        report = verify_subspace(
            down.mT / settings.down_scale,
            self.arrays["moment_new"],
            self.arrays.get("moment_old"),
            objective,
            ridge=settings.ridge,
            ridge_scale=settings.ridge_scale,
            energy_floor=settings.energy_floor,
            accumulation_eps=settings.accumulation_eps,
            tolerance=self.tolerance,
        )
        return Check(
            objective,
            bool(report.passed),
            float(report.orthonormality),
            float(report.stationarity),
            float(report.optimality_gap),
            float(report.energy_new),
            float(report.energy_old),
            int(report.effective_rank),
        )

    def _recalibration(self, form: RecalibrationForm, coefficients: Array) -> Check:
        report = verify_recalibration(
            coefficients,
            *self._at_merge(),
            **self._rule(form),
            tolerance=self.tolerance,
        )
        effect = update_effect(coefficients, *self._at_merge())
        kept = safe_divide(self.xp, effect.new_change - effect.new_loss, effect.new_change)
        interference = safe_divide(self.xp, effect.old_change, effect.old_change_before)
        return Check(
            f"Λ {form}",
            bool(report.passed),
            None,
            float(report.deviation),
            float(report.optimality_gap),
            float(kept),
            float(interference),
        )

    def _rule(self, form: RecalibrationForm) -> dict[str, Any]:
        names = ("gamma", "history_weight", "accumulation_eps")
        return {"form": form, **{name: getattr(self.settings, name) for name in names}}

    def _merge(self, coefficients: Array | None) -> Check:
        up, down = self._stacked(self.recalibrated)
        if coefficients is not None:
            up, c = widen(self.xp, up, coefficients)
            up = up @ c
        if not self.first and "B_isolated" in self.arrays and "isolated" not in self.recalibrated:
            isolated_up, isolated_down = self._stacked(["isolated"])
            up, down = stack_branches([up, isolated_up], [down, isolated_down])
        before, after = self.arrays["weight_before"], self.arrays["weight_after"]
        report = verify_merge(before, after, up, down, tolerance=self.tolerance)
        return Check("merge", bool(report.passed), None, float(report.error), None)

    def _implied(self) -> Array:
        """Λ implied by the weights before and after the merge."""
        before, after = widen(self.xp, self.arrays["weight_before"], self.arrays["weight_after"])
        change = after - before
        if "B_isolated" in self.arrays and not self.settings.joint:
            up, down = widen(self.xp, *self._stacked(["isolated"]))
            change = change - up @ down
        up, down = widen(self.xp, *self._stacked(self.recalibrated))
        return implied_coefficients(change, up, down)

    def _at_merge(self) -> tuple[Array, Array, Array, Array]:
        """Inputs of the recalibration: B, A and both moments at the merge."""
        old = self.arrays.get("moment_old_at_merge", self.arrays.get("moment_old"))
        return *self._stacked(self.recalibrated), self.arrays["moment_new_trained"], old

    def _stacked(self, branches: list[str]) -> tuple[Array, Array]:
        """B, times the branch weights, and A of some branches, stacked."""
        ups, downs = ([self.arrays[f"{kind}_{name}"] for name in branches] for kind in "BA")
        weights = [getattr(self.settings, f"{name}_weight") for name in branches]
        return stack_branches(ups, downs, weights)
