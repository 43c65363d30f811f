"""Quadratic programs in torch: the statements of `icnnrt.mathematics`, traced, in a scripted loop.

`interior_point.equilibrated` and `first`, `step` and `finished`, `quadratic_program.solve` around them and `qp_adjoint`
are traced over torch's namespace; scripted is the loop, which no trace can hold. So a user's own trace holds the solver
whole: with its loop and its early end, not as the steps that one example took. Eager calls run the same, in half the
time of Python where problems are small. All is float64; any device.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from icnnrt.mathematics import interior_point, quadratic_program
from icnnrt.mathematics.condensed_kkt import Matrices
from icnnrt.mathematics.interior_point import Equilibrated, Iterate, Problem
from icnnrt.mathematics.qp_adjoint import qp_adjoint
from icnnrt.mathematics.qp_reference import precision_of
from icnnrt_models.layers.namespace import TORCH, Torch

__all__ = ["Data", "QPScript", "Solution", "precision", "qp_script"]


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


def precision(like: Tensor) -> Tensor:
    """What data of the type of `like` decide, `icnnrt.mathematics.quadratic_program.Precision` as five numbers."""
    name = np.float32 if like.dtype == torch.float32 else np.float64
    return torch.tensor(precision_of(name), dtype=torch.float64, device=like.device)


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

    solve: Any  # (*Data, start, numbers, steps) -> Solution
    adjoint: Any  # (Q, G, A, lam, mu, slack, box_slack, z_bar, bars, nu_bar) -> d_z, d_λ, d_ν, d_μ


@functools.cache
def qp_script() -> QPScript:
    """Both, traced and compiled at the first call.

    solve: B problems as users have them, start [B, n + m + q + n] = (z, λ, ν, μ) or of no columns, numbers as
    `precision` gives them. adjoint: bars [B, m + n] are (λ̄, μ̄), multipliers that are NaN count as 0, and autograd sees
    how the answer depends on z_bar, bars and nu_bar.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return _compiled()


def _compiled() -> QPScript:
    problem, start, rows = _example()
    active = torch.ones(2, 1, 1, dtype=torch.bool)
    soft = 0.0 * rows[:, :, :1]
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
    differentiated = _traced(_adjoint, Q, G, A, rows, rows, p, rows, b)

    def solve(
        Q: Tensor,
        p: Tensor,
        G: Tensor,
        h_lower: Tensor,
        h: Tensor,
        A: Tensor,
        b: Tensor,
        lower: Tensor,
        upper: Tensor,
        start: Tensor,
        numbers: Tensor,
        steps: int,
    ) -> Solution:
        n, m, q = p.size(1), h.size(1), b.size(1)
        missing = 1 if q == 0 else 0  # without equalities, one of zeros
        A = torch.nn.functional.pad(A, [0, 0, 0, missing])
        b = torch.nn.functional.pad(b, [0, missing])
        if start.size(1) == 0:
            start = torch.full_like(torch.cat([p, h, b, p], 1), float("nan"))
        elif missing == 1:
            start = torch.cat([start[:, : n + m], torch.zeros_like(b), start[:, n + m :]], 1)
        z, lam, nu, slack, residual, status, ray = solved(
            Q,
            p.unsqueeze(1),
            G,
            A,
            b.unsqueeze(1),
            torch.cat([h_lower, lower], 1).unsqueeze(1),
            torch.cat([h, upper], 1).unsqueeze(1),
            start.unsqueeze(1),
            numbers,
            torch.tensor(steps),
        )
        rows = ray[:, 0]
        ray_nu = rows[:, n + m + n : n + m + n + q]
        return Solution(
            z[:, 0],
            lam[:, 0, :m],
            nu[:, 0, :q],
            lam[:, 0, m:],
            slack[:, 0, :m],
            slack[:, 0, m:],
            residual[:, 0],
            status[:, 0, 0].to(torch.int32),
            torch.cat([rows[:, : n + m], ray_nu, rows[:, n + m : n + m + n]], 1),
        )

    def adjoint(
        Q: Tensor,
        G: Tensor,
        A: Tensor,
        lam: Tensor,
        mu: Tensor,
        slack: Tensor,
        box_slack: Tensor,
        z_bar: Tensor,
        bars: Tensor,
        nu_bar: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m, q = lam.size(1), nu_bar.size(1)
        missing = 1 if q == 0 else 0
        d_z, d, d_nu = differentiated(
            0.5 * (Q + Q.mT),
            G,
            torch.nn.functional.pad(A, [0, 0, 0, missing]),
            torch.cat([lam, mu], 1).unsqueeze(1),
            torch.cat([slack, box_slack], 1).unsqueeze(1),
            z_bar.unsqueeze(1),
            bars.unsqueeze(1),
            torch.nn.functional.pad(nu_bar, [0, missing]).unsqueeze(1),
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
