"""Checks of answers: against a reference, another session and each alone, by certificate, adjoint and status.

What is said of a problem holds for every kind of them, `icnnrt.checking.problems`.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.checking import problems
from icnnrt.checking.differences import FEW, along, by_weights, judge_adjoint, paired, rows
from icnnrt.checking.energy import DIRECTIONS
from icnnrt.checking.problems import Problem
from icnnrt.checking.report import NO_CONTEXT, Array, Arrays, Check, skipped, worst
from icnnrt.checking.trial import Trial
from icnnrt.mathematics import certificate
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.status import ANSWERED, Status
from icnnrt.serving.load import load

POLYHEDRON_SAMPLES: Final = 8  # the reference takes one quadratic program in numpy a cut
POLYHEDRON_CUTS: Final = 200
# Of a gap, for differences of y: y is open by its root. In float32 rounding ends the descent before.
FINE: Final = {"float64": 1e-12, "float32": 1e-7}


def against_reference(trial: Trial) -> Iterator[Check]:
    """y* and its energy against `mathematics.reference`, run in float64 around the package's own value graph."""
    return trial.problem.against_reference("argmin", trial.problem.answered(trial.problem.answer))


def over_polyhedron(trial: Trial) -> Iterator[Check]:
    """y* of the graphs against `mathematics.bundle_qp`, run around the package's own value graph, and their adjoint by
    x and the constraints, which a random point meets."""
    X, n, rng, T = trial.X[:POLYHEDRON_SAMPLES], trial.n, trial.rng, trial.T
    B = len(X)
    inside = rng.standard_normal((B, n)) / math.sqrt(n)
    # Few enough that f has a say.
    G, A = rng.standard_normal((B, 1, n)), rng.standard_normal((B, min(1, n - 1), n))
    h, b = np.einsum("bmn,bn->bm", G, inside) + 0.05, np.einsum("bmn,bn->bm", A, inside)
    lower, upper = inside - 1.0, inside + np.where(rng.random((B, n)) < 0.5, 1.0, np.inf)
    inputs = {"x": X, "G": G, "h": h, "A": A, "b": b, "lower": lower, "upper": upper}
    problem = problems.over_polyhedron(trial.session, inputs, POLYHEDRON_CUTS)
    kept = problem.answered(problem.answer) & problem.answered(problem.reference())
    yield from problem.against_reference("polyhedron", kept)
    fine = problems.over_polyhedron(trial.session, inputs, POLYHEDRON_CUTS, FINE[T])
    yield from adjoint(trial, "polyhedron: adjoint", ("x", "h", "b", "lower", "upper"), fine)


def alone(trial: Trial) -> Iterator[Check]:
    """Each sample in its batch, against it alone: neighbours without a solution must not matter."""
    problem, few = trial.problem, trial.problem.answer[:FEW]
    parts = [problem.solve(rows=slice(i, i + 1)) for i in range(len(few))]
    each = SimpleNamespace(**{key: np.concatenate([getattr(part, key) for part in parts]) for key in ("y", "status")})
    kept = problem.answered(few) & problem.answered(each)
    yield problem.compare("samples alone", few, each, (" in a batch", " alone"), kept)


def kernels(trial: Trial) -> Iterator[Check]:
    """The answer of the native kernels, if they run, against that of the portable bodies."""
    problem, ours = trial.problem, trial.problem.answer
    if not ours.info["native"]:
        yield skipped("kernels", "the operators run on their portable bodies")
        return
    with load(trial.package, **trial.again, native=False) as other:
        theirs = problem.solve(other)
    kept = problem.answered(ours) & problem.answered(theirs)
    yield problem.compare("kernels", ours, theirs, (" of native kernels", " of portable bodies"), kept)


def recomputed(trial: Trial) -> Iterator[Check]:
    """Energy, gap and KKT residuals, from the numbers handed out; and the lower bound, against every energy seen."""
    told, domain, at = trial.problem.answer, trial.domain, trial.at
    bundle = trial.manifest.solver is not None and trial.manifest.solver.step_size is None
    cuts, y = (told.slopes, told.offsets), told.y.astype(np.float64)

    def energy_of(y: Array, p: Array) -> Array:
        return trial.f(y)[0] + domain.regulariser(NUMPY, p)[:, 0]

    with np.errstate(invalid="ignore", over="ignore"):
        # (y − lower)/(upper − lower) loses the digits that y and lower share, so by the multipliers
        p = certificate.implied_point(told.slopes, told.lam) if trial.bounds and bundle else at.p(y)
        energy = energy_of(y, p)
        gap = certificate.duality_gap(energy, *cuts, told.lam, domain)
        apart = [energy - told.energy, gap - told.gap, np.abs(at.y(p) - y).max(1, initial=0.0)]
        if bundle:  # else there is no model whose multipliers would give y
            residual = certificate.kkt_residuals(*cuts, told.lam, p, domain)
            apart.append(np.abs(residual - told.residual).max(1))
        rounding = certificate.rounding(told.energy, *cuts, domain, told.cut_points)
        points = [trial.somewhere() for _ in range(DIRECTIONS)]
        seen = [energy, trial.problem.reference().energy, *(energy_of(at.y(p), p) for p in points)]
        above = np.maximum(told.lower_bound - np.min(seen, axis=0), 0.0)
    kept = trial.problem.answered(told)
    what = "energy, gap and residuals, reported and recomputed"
    yield worst("certificate", np.abs(apart).max(0)[kept], rounding[kept], what)
    what = f"lower bound above an energy: of y*, of the reference, of {DIRECTIONS} random points"
    yield worst("lower bound", above[kept], 2 * rounding[kept], what)


def status(trial: Trial) -> Iterator[Check]:
    """How many samples have which status. GAP and PRECISION of an argmin are honest answers with their certificates;
    that some programs have no solution is what their status is for, that none has is no network to use."""
    answer, programs = trial.problem.answer, trial.manifest.kind == "qp"
    bad = ~np.isin(answer.status, (Status.CONVERGED,) if programs else ANSWERED)
    counts = sorted(trial.counts().items(), key=lambda count: Status[count[0]])
    detail = ", ".join(f"{count} {name}" for name, count in counts)
    if bad.any():
        detail += f"; {answer.advice(int(np.argmax(bad)))}"
    failed = bad.all() if programs else bad.any()
    yield Check("status", float(bad.mean()), None if programs else 0.0, "fail" if failed else "pass", detail)


def adjoint(trial: Trial, name: str, moved: tuple[str, ...], of: Problem | None = None) -> Iterator[Check]:
    """The cotangents of some inputs against [ȳ'y*(x + h d) − ȳ'y*(x − h d)] / 2h, all of these moved together."""
    problem = of or trial.problem
    at, answer = {key: problem.inputs[key] for key in moved}, problem.answer
    if not any(a.size for a in at.values()):
        yield skipped(name, NO_CONTEXT)
        return
    y_bar = trial.rng.standard_normal(answer.y.shape).astype(answer.y.dtype)
    bars = problem.vjp(trial.session, answer, y_bar)

    def loss(**ahead: NDArray[Any]) -> Array:
        return rows(problem.solve(moved=ahead).y.astype(np.float64) * y_bar)

    told = paired({key: getattr(bars, key) for key in moved})
    yield judge_adjoint(trial, name, along(loss, at, trial.directions(at), told, problem.steps[trial.T]), y_bar)


def adjoint_by_weights(trial: Trial) -> Iterator[Check]:
    """θ̄ of one sample at a time, all trainable weights moved together."""
    problem, name, part = trial.problem, "adjoint: weights", trial.problem.answer[:FEW]
    y_bar = trial.rounded(trial.rng.standard_normal(part.y.shape))

    def bar(i: int) -> Arrays:
        found = problem.vjp(trial.session, part[i], y_bar[i : i + 1])
        return {key: np.where(found.skipped[0], np.nan, a) for key, a in found.weights.items()}

    def loss(few: slice) -> Array:
        return rows(problem.solve(rows=few).y.astype(np.float64) * y_bar)

    yield by_weights(trial, name, bar, loss, lambda found: judge_adjoint(trial, name, found, y_bar))
