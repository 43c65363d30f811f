"""Quadratic programs, forward and backward, beside the layers that people use.

`icnnrt` is `icnnrt.QPSolver`, given all data anew in every call, and the gradients of all of them; `icnnrt.qp` is the
function that takes any size, with all checks; `icnnrt torch` is our torch layer with autograd. What the others are is
said in qp_peers.
Problems are built backwards from their solutions, so that `difference` tells how far each z is from the truth.
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
from benchmarks.qp_peers import PEERS, Answer, Data
from benchmarks.report import Entry, Row, Target, entries
from benchmarks.settings import Settings
from benchmarks.threads import cores, threads

SIZES: Final = ((10, 5, 0), (10, 10, 3), (50, 50, 10), (100, 100, 20))
QUICK_SIZES: Final = ((10, 10, 3),)
BASE: Final = "icnnrt"
COMPILED: Final = ("ProxQP", "moreau", "OSQP", "QPLayer")  # those whose solver is compiled
SEED: Final = 6


def problems(B: int, n: int, m: int, q: int) -> tuple[Data, NDArray[np.float64]]:
    """Data and the solutions z [B, n]; about half of the rows of G hold z."""
    rng = np.random.default_rng(SEED)
    M = rng.standard_normal((B, n, n))
    Q = M @ M.swapaxes(1, 2) / n + 0.1 * np.eye(n)
    G, A = rng.standard_normal((B, m, n)), rng.standard_normal((B, q, n))
    z = rng.standard_normal((B, n))
    holds = (rng.random((B, m)) < 0.5) & (np.cumsum(np.ones((B, m)), 1) <= (n - q) // 2)
    lam = holds * rng.uniform(0.5, 1.5, (B, m))
    h = np.einsum("bij,bj->bi", G, z) + ~holds * rng.uniform(0.5, 1.5, (B, m))
    p = -(np.einsum("bij,bj->bi", Q, z) + np.einsum("bij,bi->bj", G, lam))
    p -= np.einsum("bij,bi->bj", A, rng.standard_normal((B, q)))
    return Data(Q, p, G, h, A, np.einsum("bij,bj->bi", A, z), rng.standard_normal((B, n))), z


def qp(settings: Settings) -> list[Row]:
    """A row for each number of threads, size and batch; float64."""
    sizes = QUICK_SIZES if settings.quick else SIZES
    return [
        row(settings, size, batch, count)
        for count in settings.threads
        for size in sizes
        for batch in settings.batches
    ]  # fmt: skip


def row(settings: Settings, size: tuple[int, int, int], B: int, count: int) -> Row:
    n, m, q = size
    setting = {"n": n, "m": m, "q": q, "batch": B, "dtype": "float64", "threads": count}
    settings.progress("qp " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    data, z = problems(B, n, m, q)
    facts: dict[str, Any] = {"differences": {}}
    with threads(count):
        contenders = _contenders(data, z, count, facts)
        outcome = race(contenders, settings.budget, settle=count != 1)
    found = entries(contenders, outcome, BASE)
    return Row(setting, BASE, found, facts, () if settings.quick else tuple(_targets(found, B)))


def _targets(found: dict[str, Entry], B: int) -> list[Target]:
    """At batch 128 faster than every peer, at batch 1 within a fifth of the fastest compiled one."""
    if B == targets.QP_BATCH:
        names = [name for name in PEERS if found[name].ratio is not None]
        return [
            target
            for name in names
            for target in targets.judged(f"{name} / icnnrt", 1.0, found, BASE, name, at_least=True)
        ]
    if B == 1:
        ratios = {name: ratio for name in COMPILED if (ratio := found[name].ratio) is not None}
        if ratios:
            fastest = min(ratios, key=lambda name: ratios[name])
            what = f"icnnrt / {fastest}, the fastest compiled peer"
            return list(targets.judged(what, targets.QP_OF_FASTEST, found, BASE, fastest, at_least=False))
    return []


def _contenders(
    data: Data, z: NDArray[np.float64], count: int, facts: dict[str, Any]
) -> dict[str, Contender | Missing]:
    makers: dict[str, Callable[[Data, int], Callable[[], Answer]]] = {
        BASE: _icnnrt,
        "icnnrt.qp": _icnnrt_qp,
        "icnnrt torch": _icnnrt_torch,
        **PEERS,
    }
    contenders: dict[str, Contender | Missing] = {}
    for name, make in makers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = make(data, count or cores())
                began = time.perf_counter()
                found, *_ = call()
                first = time.perf_counter() - began
        except Exception as error:  # a peer that is not installed, or cannot
            contenders[name] = Missing(first_line(error))
            continue
        facts["differences"][name] = float(np.abs(np.asarray(found) - z).max())
        contenders[name] = Contender(call, first=first)  # what takes seconds is timed by this one call
    return contenders


def _icnnrt(data: Data, count: int) -> Callable[[], Answer]:
    Q, p, G, h, A, b, z_bar = data
    B, n = p.shape
    solver = icnnrt.QPSolver(n, h.shape[1], b.shape[1], batch=B, threads=count)

    def call() -> Answer:
        z = solver.solve(Q, p, G, h, A, b)
        return z, solver.vjp(z_bar)

    return call


def _icnnrt_qp(data: Data, count: int) -> Callable[[], Answer]:
    Q, p, G, h, A, b, z_bar = data
    equalities = (A, b) if b.size else (None, None)

    def call() -> Answer:
        solution = icnnrt.qp(Q, p, G, h, *equalities, threads=count)
        gradients = solution.vjp(z_bar)
        return solution.z, gradients.Q, gradients.p, gradients.G, gradients.h, gradients.A, gradients.b

    return call


def _icnnrt_torch(data: Data, count: int) -> Callable[[], Answer]:
    import torch

    from icnnrt_exporters import QPLayer

    layer = QPLayer()
    z_bar = torch.from_numpy(data.z_bar)
    used = 6 if data.b.size else 4

    def call() -> Answer:
        leaves = [torch.from_numpy(a).requires_grad_() for a in data[:used]]
        z = layer(*leaves)
        return z.detach().numpy(), torch.autograd.grad(z, leaves, z_bar)

    return call
