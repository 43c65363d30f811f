"""Solvers of quadratic programs that others have: each makes a call that solves one problem, given all data anew.

All solve  min ½ z'Qz + p'z  s.t.  h_lower <= Gz <= h, Az = b, lower <= z <= upper  in float64 and are asked for 1e-9 in
their own measure. The data lie as the solver wants them before the call, which sets it up, solves, and gives what
`Answer` says, signed as ours are, so that all are judged by one residual; or raises.
"""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

import icnnrt

Array = NDArray[np.float64]
Program = Mapping[str, Array]  # as `icnnrt.programs.Program.dense` has it
Answer = tuple[Array, Array, Array, Array]  # z, λ, ν, μ
Call = Callable[[], Answer]
EPS: Final = 1e-9
FAR: Final = 1e30


class NoAnswer(Exception):
    """The solver says so itself."""


def ours(program: Program) -> Call:
    """`icnnrt.qp`."""

    def call() -> Answer:
        solution = icnnrt.qp(**program, threads=1)
        if not solution.ok:
            raise NoAnswer(icnnrt.Status(int(solution.status)).name)
        return solution.z, solution.lam, solution.nu, solution.bound_multipliers

    return call


def ours_prepared(program: Program) -> Call:
    """`icnnrt.QPSolver`, which has memory of that size; bounds that are nowhere are left out."""
    n, m, q = len(program["p"]), len(program["h"]), len(program["b"])
    sides = {"box": ("lower", "upper"), "two_sided": ("h_lower",)}
    there = {flag: any(np.isfinite(program[name]).any() for name in names) for flag, names in sides.items()}
    absent = {name for flag, names in sides.items() if not there[flag] for name in names}
    given = {name: array for name, array in program.items() if name not in absent}
    solver = icnnrt.QPSolver(n, m, q, threads=1, **there)

    def call() -> Answer:
        solver.solve(**given)
        return solver.z[0], solver.lam[0], solver.nu[0], solver.bound_multipliers[0]

    return call


def from_nearby(program: Program) -> Call:
    """`icnnrt.QPSolver` from its last answer, for a p that moves by 1e-3."""
    n, m, q = len(program["p"]), len(program["h"]), len(program["b"])
    solver = icnnrt.QPSolver(n, m, q, two_sided=True, box=True, warm=True, threads=1)
    near = [program["p"], program["p"] + 1e-3 * np.random.default_rng(1).standard_normal(n)]
    solver.solve(**program)

    def call() -> Answer:
        near.reverse()
        solver.solve(p=near[0])
        return solver.z[0], solver.lam[0], solver.nu[0], solver.bound_multipliers[0]

    return call


def piqp(program: Program) -> Call:
    """PIQP's dense interior point method."""
    import piqp as package

    Q, p, G, h_lower, h, A, b, lower, upper = program.values()
    equalities, rows = (A, b) if len(b) else (None, None), (G, h_lower, h) if len(h) else (None, None, None)
    box = [side if np.isfinite(side).any() else None for side in (lower, upper)]

    def call() -> Answer:
        solver = package.DenseSolver()
        solver.settings.eps_abs = solver.settings.eps_rel = EPS
        solver.settings.eps_duality_gap_abs = solver.settings.eps_duality_gap_rel = EPS
        solver.setup(Q, p, *equalities, *rows, *box)
        status = solver.solve()
        if status != package.PIQP_SOLVED:
            raise NoAnswer(str(status))
        found = solver.result
        lam = found.z_u - found.z_l if len(h) else np.zeros(0)
        return found.x, lam, found.y if len(b) else np.zeros(0), found.z_bu - found.z_bl

    return call


def daqp(program: Program) -> Call:
    """DAQP's dual active set method."""
    import daqp as package

    Q, p, G, h_lower, h, A, b, lower, upper = program.values()
    n = len(p) if np.isfinite([lower, upper]).any() else 0  # simple bounds, which stand first
    rows = np.ascontiguousarray(np.concatenate([G, A]))
    high = np.minimum(np.concatenate([upper[:n], h, b]), FAR)
    low = np.maximum(np.concatenate([lower[:n], h_lower, b]), -FAR)
    sense = np.concatenate([np.zeros(n + len(h)), np.full(len(b), 5)]).astype(np.int32)
    settings = {"primal_tol": EPS, "dual_tol": EPS, "iter_limit": 10_000}

    def call() -> Answer:
        z, _, flag, info = package.solve(Q, p, rows, high, low, sense, **settings)
        if flag < 1:
            raise NoAnswer(f"exit flag {flag}")
        lam = info["lam"]
        return z, lam[n : n + len(h)], lam[n + len(h) :], lam[:n] if n else np.zeros(len(p))

    return call


def clarabel(program: Program) -> Call:
    """Clarabel's sparse interior point method."""
    import clarabel as package
    from scipy import sparse

    Q, p, G, h_lower, h, A, b, lower, upper = program.values()
    n, eye = len(p), np.eye(len(p))
    sides = ((G, h, 1.0), (G, h_lower, -1.0), (eye, upper, 1.0), (eye, lower, -1.0))
    kept = [np.flatnonzero(np.isfinite(side)) for _, side, _ in sides]
    rows = [A, *(sign * M[at] for (M, _, sign), at in zip(sides, kept, strict=True))]
    right = [b, *(sign * side[at] for (_, side, sign), at in zip(sides, kept, strict=True))]
    settings = package.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = EPS
    settings.max_threads = 1
    cones = [package.ZeroConeT(len(b)), package.NonnegativeConeT(sum(map(len, kept)))]
    P, C, d = sparse.csc_matrix(np.triu(Q)), sparse.csc_matrix(np.concatenate(rows)), np.concatenate(right)

    def call() -> Answer:
        found = package.DefaultSolver(P, p, C, d, cones, settings).solve()
        if "Solved" not in str(found.status):
            raise NoAnswer(str(found.status))
        nu, *parts = np.split(np.array(found.z), np.cumsum([len(part) for part in right])[:-1])
        lam, mu = np.zeros(len(h)), np.zeros(n)
        for into, at, part, (_, _, sign) in zip((lam, lam, mu, mu), kept, parts, sides, strict=True):
            into[at] += sign * part
        return np.array(found.x), lam, nu, mu

    return call


def proxqp(program: Program) -> Call:
    """ProxQP's dense proximal method."""
    import proxsuite

    Q, p, G, h_lower, h, A, b, lower, upper = program.values()
    far = [np.clip(side, -1e20, 1e20) for side in (h_lower, h, lower, upper)]

    def call() -> Answer:
        qp = proxsuite.proxqp.dense.QP(len(p), len(b), len(h), True)
        qp.settings.eps_abs, qp.settings.eps_rel = EPS, 0.0
        qp.init(Q, p, A, b, G, *far)
        qp.solve()
        if qp.results.info.status != proxsuite.proxqp.PROXQP_SOLVED:
            raise NoAnswer(str(qp.results.info.status))
        return qp.results.x, qp.results.z[: len(h)], qp.results.y, qp.results.z[len(h) :]

    return call


OTHERS: Final[dict[str, Callable[[Program], Call]]] = {
    "PIQP": piqp,
    "DAQP": daqp,
    "Clarabel": clarabel,
    "ProxQP": proxqp,
}
