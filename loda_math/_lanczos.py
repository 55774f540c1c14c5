"""Lanczos for the leading eigenpairs of a large host matrix, taken only with a proof.

A row-major NumPy array comes in, of which the lower triangle is read; only ``_fast`` calls this.
"""

from inspect import signature
from typing import Any

# Lanczos vectors kept for each eigenpair, at least so many, and restarts before giving up.
BASIS, LEAST, RESTARTS = 3, 48, 12


def leading(a: Any, count: int) -> tuple[Any, Any] | None:
    """The ``count`` largest eigenvalues, falling, and eigenvectors; ``None`` if not certain.

    Lanczos may miss an eigenvector, one of an equal pair say, without a sign in the residuals. So
    the result counts only if a Cholesky factorisation shows that no other eigenvalue is larger.
    """
    import numpy as np
    from scipy.linalg.blas import get_blas_funcs
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    size = len(a)
    steps = max(BASIS * count, LEAST)
    if 4 * steps > size:
        return None
    # Row-major lower is column-major upper. Reading one triangle halves the traffic.
    times_vector, times_matrix = get_blas_funcs(("symv", "symm"), (a,))
    operator = LinearOperator(a.shape, lambda x: times_vector(1.0, a.T, x), dtype=a.dtype)
    # A fixed start without structure: a constant one is dead for centred features.
    start = np.sin(np.arange(1.0, size + 1) ** 2).astype(a.dtype)
    tolerance = size * float(np.finfo(a.dtype).eps)
    options = {"v0": start, "ncv": steps, "maxiter": RESTARTS, "tol": tolerance}
    if "rng" in signature(eigsh).parameters:
        # Where the matrix runs out of directions ARPACK draws new ones: the same every time.
        options["rng"] = np.random.default_rng(0)
    try:
        values, vectors = eigsh(operator, count, which="LA", **options)
    except ArpackError:
        return None
    values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
    residual = times_matrix(1.0, a.T, vectors) - vectors * values
    slack = tolerance * float(np.abs(values).max())
    sound = (
        np.linalg.norm(residual, axis=0).max() <= slack
        and np.abs(vectors.T @ vectors - np.eye(count)).max() <= tolerance
        and _complete(a, values, vectors, slack)
    )
    return (values, vectors) if sound else None


def _complete(a: Any, values: Any, vectors: Any, slack: float) -> bool:
    """Whether no eigenvalue above the last one found was missed: τI − A + VΘVᵀ is definite."""
    from scipy.linalg.lapack import get_lapack_funcs

    rest = (vectors * values) @ vectors.T
    rest -= a
    rest.ravel()[:: len(a) + 1] += values[-1] + slack
    functions: Any = get_lapack_funcs(("potrf",), (rest,))
    _, failed = functions[0](rest.T, lower=0, clean=0, overwrite_a=1)
    return bool(failed == 0)
