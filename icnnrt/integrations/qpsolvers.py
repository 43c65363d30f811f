"""icnnrt as a solver of qpsolvers, so that what is written for that, benchmarks too, runs it by name.

    from icnnrt.integrations.qpsolvers import register
    register()
    x = solve_qp(P, q, G, h, solver="icnnrt")          # from the library qpsolvers

    minimise over x  ½ x'Px + q'x   s.t.  Gx <= h,   Ax = b,   lb <= x <= ub

P has to be symmetric and positive semidefinite; sparse matrices are made dense.
"""

import time
from typing import Any, Final

import numpy as np

from icnnrt.errors import MissingDependencyError
from icnnrt.mathematics.status import Status
from icnnrt.serving.quadratic_program import qp

try:
    import qpsolvers
except ImportError as error:
    raise MissingDependencyError(
        f"qpsolvers: expected the package, but it cannot be imported ({error}); pip install qpsolvers."
    ) from error

__all__ = ["NAME", "register", "solve_problem"]

NAME: Final = "icnnrt"


def register() -> None:
    """Have `qpsolvers.solve_qp` and `qpsolvers.solve_problem` know the solver "icnnrt", in this process."""
    qpsolvers.solvers.solve_function[NAME] = solve_problem
    for names in (qpsolvers.available_solvers, qpsolvers.dense_solvers):
        if NAME not in names:
            names.append(NAME)


def solve_problem(
    problem: qpsolvers.Problem,
    initvals: object = None,
    verbose: bool = False,
    *,
    tolerance: float | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    native: bool | None = None,
    threads: int | None = None,
) -> qpsolvers.Solution:
    """The answer of `icnnrt.qp`, in float64, in the words of qpsolvers.

    problem:          as qpsolvers checks it
    initvals:         not looked at: a start takes multipliers too, see `icnnrt.qp`
    verbose:          print the status and, of what is not solved, the advice
    tolerance, steps, seconds:  as `icnnrt.qp` takes them
    native, threads:  as `icnnrt.load` takes them

    `found` is True where the status is CONVERGED; x, y, z and z_box are there where it is INACCURATE, too. `extras`
    holds status, advice, steps and residual, the relative stationarity, feasibility and duality gap.

    Raises `InputError` for data that are no real numbers or do not fit together, and for settings that do not.
    """
    began = time.perf_counter()
    P, q, *rest = (np.asarray(a, np.float64) if a is not None else None for a in problem.unpack_as_dense())
    G, h, A, b, lb, ub = rest
    assert P is not None  # every problem has them
    assert q is not None
    built = time.perf_counter()
    settings: dict[str, Any] = {"tolerance": tolerance, "steps": steps, "seconds": seconds}
    solution = qp(P, q, G, h, A, b, lower=lb, upper=ub, **settings, native=native, threads=threads)
    solved = time.perf_counter()
    status = Status(int(solution.status))
    if verbose:
        print(f"icnnrt: {status.name}{'' if solution.ok else f', {solution.advice(0)}'}")
    extras: dict[str, Any] = {"status": status.name, "residual": solution.residual, "steps": solution.steps}
    if not solution.ok:
        extras["advice"] = solution.advice(0)
    answer = qpsolvers.Solution(problem, extras=extras, found=bool(solution.ok))
    answer.build_time, answer.solve_time = built - began, solved - built
    if status in (Status.CONVERGED, Status.INACCURATE):
        x = solution.z
        answer.x, answer.obj = np.array(x), float(0.5 * x @ P @ x + q @ x)
        answer.y, answer.z = np.array(solution.nu), np.array(solution.lam)
        answer.z_box = np.array(solution.bound_multipliers) if lb is not None or ub is not None else np.zeros(0)
    return answer
