"""Range checks of settings: each names the setting, its value and what is allowed."""

import math

LARGEST_SEED = 2**32 - 1  # NumPy's RandomState, which draws the class order, takes no more


def check(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        msg = f"{key} must be {rule}, got {value}."
        raise ValueError(msg)


def at_least(key: str, value: int | None, low: int) -> None:
    check(value is None or value >= low, key, value, f"at least {low}")


def positive(key: str, value: float) -> None:
    check(math.isfinite(value) and value > 0, key, value, "positive and finite")


def not_negative(key: str, value: float) -> None:
    check(math.isfinite(value) and value >= 0, key, value, "at least 0 and finite")


def check_seed(key: str, value: int | None) -> None:
    rule = f"between 0 and {LARGEST_SEED}"
    check(value is None or 0 <= value <= LARGEST_SEED, key, value, rule)
