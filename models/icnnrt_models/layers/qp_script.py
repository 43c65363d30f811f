"""Quadratic programs in torch: the statements of `icnnrt.mathematics`, traced, in a scripted loop.

What `interior_point` and `qp_adjoint` do before, in and after their loops, and `quadratic_program.solve` around them,
are traced over torch's namespace; scripted are the loops, which no trace can hold. So a user's own trace holds the
solver whole: with its loops and their early end, not as the steps that one example took. Eager calls run the same, in
half the time of Python where problems are small. All is float64; any device.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from icnnrt.mathematics import interior_point, qp_adjoint, quadratic_program
from icnnrt.mathematics.interior_point import Equilibrated, Iterate, Problem
from icnnrt.mathematics.qp_adjoint import Held
from icnnrt.mathematics.qp_reference import precision_of
from icnnrt_models.layers.namespace import TORCH, Torch

__all__ = ["Data", "QPScript", "Solution", "numbers", "qp_script", "wide"]


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
    """As `icnnrt.mathematics.qp_reference.QPReference`, and the outputs of QuadraticProgram in their order."""

    z: Tensor
    lam: Tensor
    nu: Tensor
    mu: Tensor
    slack: Tensor
    box_slack: Tensor
    residual: Tensor
    status: Tensor
    ray: Tensor
    steps: Tensor


def numbers(tolerance: float) -> tuple[list[float], list[float]]:
    """What float32 and float64 data decide, each `icnnrt.mathematics.quadratic_program.Precision` as numbers, with this
    tolerance where it is positive."""
    asked = tolerance if tolerance > 0.0 else None
    return list(precision_of(np.float32, asked)), list(precision_of(np.float64, asked))


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

def _flat(record: Any) -> list[Tensor]:
    """The arrays of a record that may hold records."""
    return [a for field in record for a in (_flat(field) if isinstance(field, tuple) else [field])]


def _whole(kind: Any, arrays: Iterator[Tensor]) -> Any:
    """A record of that kind, of the arrays that `_flat` has made of one."""
    fields = kind.__annotations__.values()
    return kind(*(_whole(field, arrays) if hasattr(field, "_fields") else next(arrays) for field in fields))


def _step(kept: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    return list(interior_point.step(TORCH, _whole(Equilibrated, iter(kept)), Iterate(*state)))


def _finished(kept: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    return list(interior_point.finished(TORCH, _whole(Equilibrated, iter(kept)), Iterate(*state)))


def _swept(kept: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    return list(interior_point.swept(TORCH, *state))


def _adjoint_step(kept: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    return list(qp_adjoint.step(TORCH, _whole(Held, iter(kept)), *state))


def _adjoint_finished(kept: list[Tensor], state: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(qp_adjoint.finished(TORCH, _whole(Held, iter(kept)), *state))


class _Pieces(Torch):
    """Torch's namespace while a statement is traced: its loop and the interior point method are calls of their own, and
    certificates are looked for among the unsolved, of whom there may be none."""

    def __init__(self, method: Any = None, loop: Any = None) -> None:
        self.method, self.scripted = method, loop

    def loop(self, unfinished: Any, step: Any, state: Any, most: Any) -> Any:
        return self.scripted(list(state[:1]), list(state), most)

    def piece(self, name: str, statement: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        return self.method(*arrays)

    @staticmethod
    def cond(condition: Tensor, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        return then()


# --- What is scripted ----------------------------------------------------------------------------


class QPScript(NamedTuple):
    """`solve` and `adjoint` of quadratic programs as functions of TorchScript, which may stand in a trace."""

    # In float64: (*Data, start, *numbers(tolerance), steps) -> Solution
    solve: Any
    # (Q, G, A, lam, mu, slack, box_slack, z_bar, lam_bar, nu_bar, mu_bar) -> d_z, d_λ, d_ν, d_μ, share, weak
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
    Q, p, G, A, b = problem[:5]
    sizes = 0.0 * p + 1.0, *(0.0 * M.sum(2, keepdim=True) + 1.0 for M in (G, A))
    sweeps = _loop(_swept, [Q], [Q, p, G, A, *sizes, soft + 1.0, active])
    scaling = _Pieces(loop=sweeps)

    def begun(*arrays: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        *of, soft, tolerance, start, active, seen, all_bounds = arrays
        at = interior_point.equilibrated(scaling, Problem(*of), soft, tolerance, seen, all_bounds)
        return _flat(at), list(interior_point.first(scaling, at, start, active))

    began = *problem, soft, soft + interior_point.NEARLY, start, active, 0.0 * p, soft
    kept, state = begun(*began)
    first = _traced(begun, *began)
    steps_of = _loop(_step, kept, state)
    finished = _traced(_finished, kept, state)

    # TorchScript knows no arguments by a star.
    # fmt: off
    def method(
        Q: Tensor, p: Tensor, G: Tensor, A: Tensor, b: Tensor, lower: Tensor, upper: Tensor, soft: Tensor,
        tolerance: Tensor, start: Tensor, active: Tensor, steps: Tensor, seen: Tensor, all_bounds: Tensor,
    ) -> list[Tensor]:
        # fmt: on
        kept, state = first(Q, p, G, A, b, lower, upper, soft, tolerance, start, active, seen, all_bounds)
        return finished(kept, steps_of(kept, state, int(steps)))

    interior_point_method = torch.jit.script(method)

    def stated(*arrays: Tensor) -> tuple[Tensor, ...]:
        *of, start, numbers, steps = arrays
        limits = quadratic_program.Precision(*numbers.unbind())
        return quadratic_program.solve(_Pieces(interior_point_method), Problem(*of), start, limits, steps)

    numbers = torch.tensor(precision_of(np.float64), dtype=torch.float64)
    # A program without a solution is among the examples, so that certificates are traced of some.
    solved = _traced(stated, *problem, start, numbers, torch.tensor(interior_point.STEPS))

    def held(*arrays: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        at = qp_adjoint.held(scaling, *arrays)
        return _flat(at), list(qp_adjoint.begin(at))

    kept, state = held(Q, G, A, row, row, p, row, b)
    adjoint_of = _traced(held, Q, G, A, row, row, p, row, b)
    proximal = _loop(_adjoint_step, kept, state, qp_adjoint.MOST)
    in_units = _traced(_adjoint_finished, kept, state)
    near32, near64 = qp_adjoint.WEAK["float32"], qp_adjoint.WEAK["float64"]

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
        z, lam, nu, slack, residual, status, ray, taken = solved(
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
            taken[:, 0, 0].to(torch.int32),
        )

    # fmt: off
    def adjoint(
        Q: Tensor, G: Tensor, A: Tensor, lam: Tensor, mu: Tensor, slack: Tensor, box_slack: Tensor,
        z_bar: Tensor, lam_bar: Tensor, nu_bar: Tensor, mu_bar: Tensor, near32: float = near32, near64: float = near64,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        # fmt: on
        B, m, q = z_bar.size(0), lam.size(1), A.size(1)
        near = near32 if z_bar.dtype == torch.float32 else near64
        z_bar, lam, mu, Q, A = rows(z_bar, B), rows(lam, B), rows(mu, B), rows(Q, B), rows(A, B)
        bars = torch.cat([there(lam_bar, lam, 0.0), there(mu_bar, mu, 0.0)], 1)
        kept, state = adjoint_of(
            0.5 * (Q + Q.mT),
            rows(G, B),
            with_a_row(A, 2),
            torch.cat([lam, mu], 1).unsqueeze(1),
            torch.cat([rows(slack, B), rows(box_slack, B)], 1).unsqueeze(1),
            z_bar.unsqueeze(1),
            bars.unsqueeze(1),
            with_a_row(there(nu_bar, A[:, :, 0], 0.0), 1).unsqueeze(1),
        )
        d_z, d, d_nu, share, nearness = in_units(kept, proximal(kept, state))
        weak = (nearness < near).sum([1, 2])
        return d_z[:, 0], d[:, 0, :m], d_nu[:, 0, :q], d[:, 0, m:], share[:, 0, 0], weak

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


def _loop(step: Callable[..., list[Tensor]], kept: list[Tensor], state: list[Tensor], most: int = 0) -> Any:
    """(kept, state, most) -> state after as many steps, or fewer where the last of state is false of all samples."""
    traced = _traced(step, kept, state)

    def loop(kept: list[Tensor], state: list[Tensor], most: int = most) -> list[Tensor]:
        for _ in range(most):
            if not bool(state[-1].any()):
                break
            state = traced(kept, state)
        return state

    return torch.jit.script(loop)


def _traced(statement: Callable[..., Any], *examples: Any) -> Any:
    """A function for any batch and any numbers of variables and constraints."""
    return torch.jit.trace(statement, examples, check_trace=False, strict=False)
