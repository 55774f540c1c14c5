"""How many processors this process may use."""

import os


def usable_cpus() -> int:
    """Processors that the system lets this process run on, at least 1.

    A container or a batch system may leave it fewer than the machine has.

    Examples
    --------
    >>> 1 <= usable_cpus() <= (os.cpu_count() or 1)
    True
    """
    count = getattr(os, "process_cpu_count", None)  # from Python 3.13 on
    if count is not None:
        return count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
