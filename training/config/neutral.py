"""Settings that do not decide what a run learns."""

NEUTRAL = (
    "data.workers",
    "data.cache",
    "data.root",
    "data.download",
    "data.verify",
    "method.heldout",
    "train.eval_batch_size",
    "train.compile",
    "checkpoint.steps",
    "checkpoint.minutes",
    "checkpoint.keep",
)
"""They decide where data lie, how fast or safe a run is, or what it looks at on the way."""

_ROUNDING = ("method.heldout", "train.eval_batch_size", "train.compile")

FREE = tuple(name for name in NEUTRAL if name not in _ROUNDING)
"""Those that decide no bit of a run either: one that goes on may have others than it began with."""
