"""The frozen backbone: only the heads are trained. What every adaptation has to beat."""

from training.methods.base import Method


class Frozen(Method):
    """No adaptation at all: plain steps of the head."""

    saves_open_task = True
    sums_over_processes = True
    keeps = ()


class NearestClassMean(Frozen):
    """Nothing is trained: nearest class means decide (SimpleCIL, arXiv:2303.07338)."""

    readout = "nearest_mean"


class RanPACFrozen(Frozen):
    """Nothing is trained: ridge regression on random features (RanPAC, arXiv:2307.02251).

    Without the adapter that RanPAC trains on its first task.
    """

    readout = "ridge"
