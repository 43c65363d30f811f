"""Model predictive control: quadratic programs of hundreds of variables, nearly all of whose entries are 0.

`icnnrt` is a `QPSolver` with a pattern, given all data anew in every call, and the gradients of all of them; `icnnrt
forward` leaves these out, as `PIQP`, the sparse solver, has none. `icnnrt torch` is a QPLayer with that pattern,
`icnnrt dense` a `QPSolver` without. Peers of `qp_peers` get the box as rows of G, as they know no bounds; moreau and
OSQP are told which entries are 0, and cvxpylayers takes Q, G and A for constants: as parameters it takes minutes to
compile them.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import icnnrt
from benchmarks import targets
from benchmarks.interleaved import Contender, Missing, first_line, race
from benchmarks.qp_peers import EPS, PEERS, Answer, Data
from benchmarks.report import Entry, Row, Target, entries
from benchmarks.settings import Settings
from benchmarks.threads import cores, threads

STAGES: Final = 50
QUICK_STAGES: Final = 5
STATES: Final = 6
INPUTS: Final = 2
SEED: Final = 3
BASE: Final = "icnnrt"
FORWARD: Final = "icnnrt forward"
PIQP: Final = "PIQP"
Problem = dict[str, NDArray[np.float64]]  # by the names that QPSolver.solve takes them by, one sample


def problem(stages: int) -> Problem:
    """z = (u_0, x_1, u_1, x_2, ...) with x_{k+1} = F x_k + E u_k, from an x_0 that drives inputs to their bounds."""
    rng = np.random.default_rng(SEED)
    F = np.eye(STATES) + 0.1 * rng.standard_normal((STATES, STATES))
    F /= max(1.0, float(np.abs(np.linalg.eigvals(F)).max()))
    E = 0.3 * rng.standard_normal((STATES, INPUTS))
    width = INPUTS + STATES
    n, q = stages * width, stages * STATES
    A, b = np.zeros((q, n)), np.zeros(q)
    for k in range(stages):
        rows, at = slice(k * STATES, (k + 1) * STATES), k * width
        A[rows, at : at + INPUTS] = E
        A[rows, at + INPUTS : at + width] = -np.eye(STATES)
        if k:
            A[rows, at - STATES : at] = F
    b[:STATES] = -F @ rng.standard_normal(STATES)
    of_input = np.tile(np.arange(width) < INPUTS, stages)
    upper = np.where(of_input, 0.5, 4.0)
    Q = np.diag(np.where(of_input, 0.1, 1.0))
    return {"Q": Q, "p": 0.1 * rng.standard_normal(n), "A": A, "b": b, "lower": -upper, "upper": upper}


def mpc(settings: Settings) -> list[Row]:
    """A row for each number of threads; one problem, float64."""
    stages = QUICK_STAGES if settings.quick else STAGES
    return [row(settings, stages, count) for count in settings.threads]


def row(settings: Settings, stages: int, count: int) -> Row:
    data = problem(stages)
    n, q = len(data["p"]), len(data["b"])
    setting = {"stages": stages, "n": n, "m": 0, "q": q, "batch": 1, "dtype": "float64", "threads": count}
    settings.progress("qp " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    z_bar = np.random.default_rng(SEED).standard_normal((1, n))
    facts: dict[str, Any] = {"differences": {}}
    with threads(count):
        contenders = _contenders(data, z_bar, count, facts)
        outcome = race(contenders, settings.budget, settle=count != 1)
    found = entries(contenders, outcome, BASE)
    return Row(setting, BASE, found, facts, () if settings.quick else tuple(_targets(found)))


def _targets(found: dict[str, Entry]) -> list[Target]:
    judged = list(
        targets.judged(f"{FORWARD} / {PIQP}", targets.MPC_OF_PIQP, found, FORWARD, PIQP, at_least=False)
    )  # fmt: skip
    for name in PEERS:
        if found[name].ratio is not None:
            judged += targets.judged(f"{name} / icnnrt", 1.0, found, BASE, name, at_least=True)
    return judged


def _contenders(
    data: Problem, z_bar: NDArray[np.float64], count: int, facts: dict[str, Any]
) -> dict[str, Contender | Missing]:
    workers = count or cores()
    n = len(data["p"])
    rows = Data(
        *(data[name][None] for name in ("Q", "p")),
        np.concatenate([np.eye(n), -np.eye(n)])[None],
        np.concatenate([data["upper"], -data["lower"]])[None],
        *(data[name][None] for name in ("A", "b")),
        z_bar,
    )
    peers = {**PEERS, "cvxpylayers": _cvxpylayers}
    makers: dict[str, Callable[[], Callable[[], Answer]]] = {
        BASE: lambda: _icnnrt(data, z_bar, workers),
        FORWARD: lambda: _icnnrt(data, None, workers),
        "icnnrt torch": lambda: _icnnrt_torch(data, z_bar),
        "icnnrt dense": lambda: _icnnrt(data, z_bar, workers, sparse=False),
        PIQP: lambda: _piqp(data),
        **{name: lambda make=make: make(rows, workers) for name, make in peers.items()},
    }
    contenders: dict[str, Contender | Missing] = {}
    answer: NDArray[np.float64] | None = None
    for name, maker in makers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = maker()
                began = time.perf_counter()
                z = np.array(call()[0], np.float64).reshape(n)
                first = time.perf_counter() - began
        except Exception as error:  # a peer that is not installed, or cannot
            contenders[name] = Missing(first_line(error))
            continue
        answer = z if answer is None else answer  # that of icnnrt, which comes first
        facts["differences"][name] = float(np.abs(z - answer).max())
        contenders[name] = Contender(call, first=first)
    return contenders


def _icnnrt(
    data: Problem, z_bar: NDArray[np.float64] | None, count: int, sparse: bool = True
) -> Callable[[], Answer]:  # fmt: skip
    pattern = icnnrt.QPPattern(data["Q"], None, data["A"]) if sparse else None
    solver = icnnrt.QPSolver(len(data["p"]), 0, len(data["b"]), box=True, pattern=pattern, threads=count)

    def call() -> Answer:
        z = solver.solve(**data)
        return z, None if z_bar is None else solver.vjp(z_bar)

    return call


def _icnnrt_torch(data: Problem, z_bar: NDArray[np.float64]) -> Callable[[], Answer]:
    import torch

    from icnnrt_exporters import QPLayer

    layer = QPLayer(pattern=icnnrt.QPPattern(data["Q"], None, data["A"]))
    bar = torch.from_numpy(z_bar)

    def call() -> Answer:
        leaves = {name: torch.from_numpy(a).requires_grad_() for name, a in data.items()}
        z = layer(**leaves)
        return z.detach().numpy(), torch.autograd.grad(z, list(leaves.values()), bar[0] if z.dim() == 1 else bar)

    return call


def _piqp(data: Problem) -> Callable[[], Answer]:
    """PIQP's sparse solver, set up once; its values are new in every call, as sparse matrices beforehand."""
    import piqp as package
    from scipy import sparse

    Q, A = sparse.csc_matrix(data["Q"]), sparse.csc_matrix(data["A"])
    solver = package.SparseSolver()
    for name in ("eps_abs", "eps_rel", "eps_duality_gap_abs", "eps_duality_gap_rel"):
        setattr(solver.settings, name, EPS)
    bounds = {"x_l": data["lower"], "x_u": data["upper"]}
    solver.setup(P=Q, c=data["p"], A=A, b=data["b"], **bounds)

    def call() -> Answer:
        solver.update(P=Q, c=data["p"], A=A, b=data["b"], **bounds)
        solver.solve()
        return (solver.result.x,)

    return call


def _cvxpylayers(data: Data, count: int) -> Callable[[], Answer]:
    """cvxpylayers in torch, with its default solver: gradients of p, h and b alone."""
    import cvxpy as cp
    import torch
    from cvxpylayers.torch import CvxpyLayer

    Q, _, G, _, A, _, bar = data
    p, h, b = (cp.Parameter(a.shape[1]) for a in (data.p, data.h, data.b))
    z = cp.Variable(Q.shape[1])
    objective = cp.Minimize(0.5 * cp.sum_squares(np.linalg.cholesky(Q[0]).T @ z) + p @ z)
    layer = CvxpyLayer(cp.Problem(objective, [G[0] @ z <= h, A[0] @ z == b]), parameters=[p, h, b], variables=[z])

    def call() -> Answer:
        leaves = [torch.from_numpy(a).requires_grad_() for a in (data.p, data.h, data.b)]
        (answer,) = layer(*leaves)
        return answer.detach().numpy(), torch.autograd.grad(answer, leaves, torch.from_numpy(bar))

    return call
