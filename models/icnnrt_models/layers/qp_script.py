"""Quadratic programs in torch: the statements of `icnnrt.mathematics`, traced, in a scripted loop.

`interior_point.equilibrated` and `first`, `step` and `finished`, `quadratic_program.solve` around them and `qp_adjoint`
are traced over torch's namespace; scripted is the loop, which no trace can hold. So a user's own trace holds the solver
whole: with its loop and its early end, not as the steps that one example took. Eager calls run the same, in half the
time of Python where problems are small. All is float64; any device.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from icnnrt.mathematics import interior_point, quadratic_program
from icnnrt.mathematics.condensed_kkt import Matrices
from icnnrt.mathematics.interior_point import Equilibrated, Iterate, Problem
from icnnrt.mathematics.qp_adjoint import qp_adjoint
from icnnrt.mathematics.qp_reference import precision_of
from icnnrt_models.layers.namespace import TORCH, Torch

__all__ = ["NUMBERS", "Data", "QPScript", "Solution", "qp_script", "wide"]


class Data(NamedTuple):
    """B problems; as `icnnrt.mathematics.qp_reference.QP`."""

    Q: Tensor
    p: Tensor
    G: Tensor
    h_lower: Tensor
    h: Tensor
    A: Tensor
    b: Tensor
    lower: Tensor
    upper: Tensor


class Solution(NamedTuple):
    """As `icnnrt.mathematics.qp_reference.QPReference`, and the outputs of the operator QPSolve in their order."""

    z: Tensor
    lam: Tensor
    nu: Tensor
    mu: Tensor
    slack: Tensor
    box_slack: Tensor
    residual: Tensor
    status: Tensor
    ray: Tensor


# What float32 and float64 data decide, `icnnrt.mathematics.quadratic_program.Precision` as five numbers.
NUMBERS: Final = list(precision_of(np.float32)), list(precision_of(np.float64))


# --- Data as the operators have them: every leading axis is B or 1, what is absent has no columns, any dtype ------


def rows(a: Tensor, B: int) -> Tensor:
    """For each of the B samples, in float64."""
    return a.to(torch.float64).expand([B] + list(a.size()[1:]))  # noqa: RUF005  TorchScript knows no star


def there(a: Tensor, like: Tensor, none: float) -> Tensor:
    """a in the rows of `like`, or that number where it has no columns."""
    return rows(a, like.size(0)) if a.size(1) == like.size(1) else torch.full_like(like, none)


def with_a_row(a: Tensor, rank: int) -> Tensor:
    """A or b; without equalities, one of zeros: 0'z = 0."""
    missing = 1 if a.size(1) == 0 else 0
    return torch.nn.functional.pad(a, [0, 0, 0, missing] if rank == 2 else [0, missing])


# fmt: off
def wide(
    Q: Tensor, p: Tensor, G: Tensor, h_lower: Tensor, h: Tensor, A: Tensor, b: Tensor, lower: Tensor, upper: Tensor,
    start: Tensor,
) -> Data:
    """All data of each sample."""
    # fmt: on
    B = 1
    for a in (Q, p, G, h_lower, h, A, b, lower, upper, start):
        if a.size(0) != 1:
            B = a.size(0)
    infinity = float("inf")
    p, h = rows(p, B), rows(h, B)
    h_lower, upper = there(h_lower, h, -infinity), there(upper, p, infinity)
    return Data(rows(Q, B), p, rows(G, B), h_lower, h, rows(A, B), rows(b, B), there(lower, p, -infinity), upper)


# --- What is traced ------------------------------------------------------------------------------

KEPT = len(Matrices._fields) + len(Equilibrated._fields) - 1  # arrays of an equilibrated problem


def _flat(at: Equilibrated) -> tuple[Tensor, ...]:
    return (*at.of, *at[1:])


def _whole(arrays: Sequence[Tensor]) -> Equilibrated:
    size = len(Matrices._fields)
    return Equilibrated(Matrices(*arrays[:size]), *arrays[size:])


def _first(*arrays: Tensor) -> tuple[Tensor, ...]:
    *problem, soft, start, active = arrays
    at = interior_point.equilibrated(TORCH, Problem(*problem), soft)
    return (*_flat(at), *interior_point.first(TORCH, at, start, active))


def _step(*arrays: Tensor) -> tuple[Tensor, ...]:
    return interior_point.step(TORCH, _whole(arrays[:KEPT]), Iterate(*arrays[KEPT:]))


def _finished(*arrays: Tensor) -> tuple[Tensor, ...]:
    *kept, lower, upper, x = arrays
    # Of the problem it reads the bounds alone.
    problem = Problem(x, x, x, x, x, lower, upper)
    return interior_point.finished(TORCH, _whole(kept), problem, x)


def _adjoint(*arrays: Tensor) -> tuple[Tensor, ...]:
    return qp_adjoint(TORCH, *arrays)


class _Pieces(Torch):
    """Torch's namespace while `quadratic_program.solve` is traced: the interior point method is a call of its own, and
    certificates are looked for among the unsolved, of whom there may be none."""

    def __init__(self, solve: Any) -> None:
        self.solve = solve

    def piece(self, name: str, statement: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        return self.solve(*arrays)

    @staticmethod
    def cond(condition: Tensor, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        return then()


# --- What is scripted ----------------------------------------------------------------------------


class QPScript(NamedTuple):
    """`solve` and `adjoint` of quadratic programs as functions of TorchScript, which may stand in a trace."""

    # In float64: (*Data, start, *NUMBERS, steps) -> Solution
    solve: Any
    # (Q, G, A, lam, mu, slack, box_slack, z_bar, lam_bar, nu_bar, mu_bar) -> d_z, d_λ, d_ν, d_μ
    adjoint: Any


@functools.cache
def qp_script() -> QPScript:
    """Both, traced and compiled at the first call.

    solve: B problems, start [B, n + m + q + n] = (z, λ, ν, μ) or of no columns; the dtype of p is that of the data.
    adjoint: multipliers that are NaN count as 0, and autograd sees how the answer depends on the four cotangents.
    """
    # In a thread of its own, where no trace, mode or transform that asks for it here is known: traces do not nest.
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as thread:
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return thread.submit(_compiled).result()


@torch.no_grad()
def _compiled() -> QPScript:
    problem, start, row = _example()
    active = torch.ones(2, 1, 1, dtype=torch.bool)
    soft = 0.0 * row[:, :, :1]
    kept = _first(*problem, soft, start, active)
    first = _traced(_first, *problem, soft, start, active)
    step = _traced(_step, *kept)
    finished = _traced(_finished, *kept[:KEPT], *problem[5:], kept[KEPT])

    # TorchScript knows no arguments by a star.
    # fmt: off
    def loop(
        Q: Tensor, p: Tensor, G: Tensor, A: Tensor, b: Tensor, lower: Tensor, upper: Tensor, soft: Tensor,
        start: Tensor, active: Tensor, steps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        (q0, q1, q2, q3, q4, q5, q6, q7, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11,
         x, r_d, r_nu, r_s, gap, best_x, best, idle, going) = first(
            Q, p, G, A, b, lower, upper, soft, start, active
        )
        for _ in range(int(steps)):
            if not bool(going.any()):
                break
            x, r_d, r_nu, r_s, gap, best_x, best, idle, going = step(
                q0, q1, q2, q3, q4, q5, q6, q7, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11,
                x, r_d, r_nu, r_s, gap, best_x, best, idle, going,
            )
        z, lam, nu, slack, residual, D = finished(
            q0, q1, q2, q3, q4, q5, q6, q7, e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, lower, upper, best_x
        )
        return z, lam, nu, slack, residual, D

    # fmt: on
    interior_point_method = torch.jit.script(loop)

    def stated(*arrays: Tensor) -> tuple[Tensor, ...]:
        *of, start, numbers, steps = arrays
        limits = quadratic_program.Precision(*numbers.unbind())
        return quadratic_program.solve(_Pieces(interior_point_method), Problem(*of), start, limits, steps)

    numbers = torch.tensor(precision_of(np.float64), dtype=torch.float64)
    # A program without a solution is among the examples, so that certificates are traced of some.
    solved = _traced(stated, *problem, start, numbers, torch.tensor(interior_point.STEPS))
    Q, p, G, A, b = problem[:5]
    differentiated = _traced(_adjoint, Q, G, A, row, row, p, row, b)

    # fmt: off
    def solve(
        Q: Tensor, p: Tensor, G: Tensor, h_lower: Tensor, h: Tensor, A: Tensor, b: Tensor, lower: Tensor, upper: Tensor,
        start: Tensor, numbers32: list[float], numbers64: list[float], steps: int,
    ) -> Solution:
        # fmt: on
        numbers = numbers32 if p.dtype == torch.float32 else numbers64
        of = wide(Q, p, G, h_lower, h, A, b, lower, upper, start)
        n, m, q = of.p.size(1), of.h.size(1), of.b.size(1)
        missing = 1 if q == 0 else 0  # without equalities, one of zeros
        A, b = with_a_row(of.A, 2), with_a_row(of.b, 1)
        if start.size(1) == 0:
            start = torch.full_like(torch.cat([of.p, of.h, b, of.p], 1), float("nan"))
        else:
            start = rows(start, of.p.size(0))
            if missing == 1:
                start = torch.cat([start[:, : n + m], torch.zeros_like(b), start[:, n + m :]], 1)
        z, lam, nu, slack, residual, status, ray = solved(
            of.Q,
            of.p.unsqueeze(1),
            of.G,
            A,
            b.unsqueeze(1),
            torch.cat([of.h_lower, of.lower], 1).unsqueeze(1),
            torch.cat([of.h, of.upper], 1).unsqueeze(1),
            start.unsqueeze(1),
            torch.tensor(numbers, dtype=torch.float64, device=p.device),
            torch.tensor(steps),
        )
        certificate = ray[:, 0]
        ray_nu = certificate[:, n + m + n : n + m + n + q]
        return Solution(
            z[:, 0],
            lam[:, 0, :m],
            nu[:, 0, :q],
            lam[:, 0, m:],
            slack[:, 0, :m],
            slack[:, 0, m:],
            residual[:, 0],
            status[:, 0, 0].to(torch.int32),
            torch.cat([certificate[:, : n + m], ray_nu, certificate[:, n + m : n + m + n]], 1),
        )

    # fmt: off
    def adjoint(
        Q: Tensor, G: Tensor, A: Tensor, lam: Tensor, mu: Tensor, slack: Tensor, box_slack: Tensor,
        z_bar: Tensor, lam_bar: Tensor, nu_bar: Tensor, mu_bar: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # fmt: on
        B, m, q = z_bar.size(0), lam.size(1), A.size(1)
        z_bar, lam, mu, Q, A = rows(z_bar, B), rows(lam, B), rows(mu, B), rows(Q, B), rows(A, B)
        bars = torch.cat([there(lam_bar, lam, 0.0), there(mu_bar, mu, 0.0)], 1)
        d_z, d, d_nu = differentiated(
            0.5 * (Q + Q.mT),
            rows(G, B),
            with_a_row(A, 2),
            torch.cat([lam, mu], 1).unsqueeze(1),
            torch.cat([rows(slack, B), rows(box_slack, B)], 1).unsqueeze(1),
            z_bar.unsqueeze(1),
            bars.unsqueeze(1),
            with_a_row(there(nu_bar, A[:, :, 0], 0.0), 1).unsqueeze(1),
        )
        return d_z[:, 0], d[:, 0, :m], d_nu[:, 0, :q], d[:, 0, m:]

    return QPScript(torch.jit.script(solve), torch.jit.script(adjoint))


def _example() -> tuple[Problem, Tensor, Tensor]:
    """Two programs, a cold start, and a row [2, 1, m + n]."""
    double = torch.float64
    n, m, q = 3, 2, 1
    G, A = torch.rand(2, m, n, dtype=double), torch.rand(2, q, n, dtype=double)
    p, b, upper = torch.rand(2, 1, n, dtype=double), torch.rand(2, 1, q, dtype=double), torch.ones(2, 1, m + n).double()
    Q = torch.eye(n, dtype=double).expand(2, n, n).contiguous()
    lower = upper - torch.tensor([2.0, -1.0], dtype=double)[:, None, None]
    start = torch.full((2, 1, n + m + q + n), torch.nan, dtype=double)
    return Problem(Q, p, G, A, b, lower, upper), start, upper


def _traced(statement: Callable[..., Any], *examples: Tensor) -> Any:
    """A function for any batch and any numbers of variables and constraints."""
    return torch.jit.trace(lambda *arrays: tuple(statement(*arrays)), examples, check_trace=False)
