"""The frozen backbone, which every adaptation has to beat: at most the heads are trained."""

from training.methods.base import Method


class Frozen(Method):
    """The backbone stays as it is: only the heads are trained."""

    saves_open_task = True
    sums_over_processes = True
    keeps = ()


class NearestClassMean(Frozen):
    """Nothing is trained: nearest class means decide (SimpleCIL, arXiv:2303.07338)."""

    readout = "nearest_mean"


class RanPACFrozen(Frozen):
    """Nothing is trained: ridge regression on random features (RanPAC, arXiv:2307.02251).

    The adapter that RanPAC trains on its first task is left out.
    """

    readout = "ridge"
