"""y* = argmin over a package's own domain of f(x, y) + R(y), by argmin.onnx, with the certificate of every sample."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, finite_rows, instance, sample
from icnnrt.format.manifest import Manifest
from icnnrt.mathematics import certificate
from icnnrt.mathematics.certificate import Tolerances
from icnnrt.mathematics.domains import MODELS, Domain
from icnnrt.mathematics.status import Status, advise
from icnnrt.serving.chunks import chunks
from icnnrt.serving.domain_arguments import bounds_of, solver_of, start_of
from icnnrt.serving.solution import Array, EnergySolution, Floats

if TYPE_CHECKING:
    from icnnrt.serving.session import Session


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ArgminSolution(EnergySolution):
    """y* = argmin over y in the domain of f(x, y) + R(y) for B samples, with the certificate of each.

    By default that is [0,1]^n and −H(y), as below. A box and (μ/2)‖y‖² are solved in p, y = lower + (upper − lower)∘p
    or y = p/√μ: then slopes, offsets and cut_points are those of f as a function of p, and so is the y of the
    multipliers; see `icnnrt.mathematics.domains`, which has the centre of each domain too, where ½ stands here. y is y
    always. Bregman proximal gradient (`icnnrt.mathematics.bregman`) solves no models: its cuts are those of the points
    it was at, lam is 1 at the one with the best bound, and residuals and lam_history are zero.

    K cuts; T is the package's dtype. A sample that was not run (NOT_FINITE_INPUT) is NaN throughout. The length is B;
    `solution[i]`, a slice or a mask selects samples and gives an ArgminSolution of them.
    """

    x: Floats
    """[B, *x_shape] T, the contexts as they were run."""
    y: Floats
    """[B, n] T, the answer."""
    lam: Floats
    """[B, K] T, multipliers λ of the cuts: nonnegative, of sum 1, y = σ(−slopes'λ)."""
    slopes: Floats
    """[B, K, n] T, g_i = ∇f(y_i)."""
    offsets: Floats
    """[B, K] T, centred: e_i = f(y_i) + g_i'(½ − y_i)."""
    cut_points: Floats
    """[B, K, n] T, y_i: the first is where the solver started, the next one the answer with the cuts before it."""
    lam_history: Floats
    """[B, K, K] T, row k−1: the multipliers after k cuts, zero beyond the k-th."""
    energy: Array
    """[B] float64, f(x, y) − H(y)."""
    lower_bound: Array
    """[B] float64: no energy is below it if f is convex in y, up to the rounding of f in the package's dtype."""
    gap: Array
    """[B] float64, energy − lower_bound: the most that y can be suboptimal by. It is known to the rounding of f in the
    package's dtype only, which `uncertainty` tells: a gap below that, negative ones too, means zero."""
    residual: Array
    """[B, 3] float64, KKT residuals of the last model: stationarity, feasibility, complementarity."""
    complementarity_history: Array
    """[B, K] float64, complementarity of every model; an exact gradient needs all of them small."""
    status: NDArray[np.int8]
    """[B] int8, a `Status` each; `certificate.status_of` says how it is told."""
    info: Mapping[str, Any]
    """How it was computed: providers, native (whether compiled kernels ran), domain, iterations, steps, gap_tolerance,
    residual_tolerance, seconds."""
    weights_id: str
    """Which weights it was computed with; a session refuses to differentiate a solution of other weights."""
    lower: Floats | None = None
    """[B, n] T, the lower bounds of a box; None for other domains. Slopes, offsets and cut points of a box are those of
    p = (y − lower) / (upper − lower)."""
    upper: Floats | None = None
    """[B, n] T, the upper bounds of a box; None for other domains."""

    def advice(self, i: int) -> str:
        """One sentence with numbers: how sample `i` went and what would make it better."""
        i = sample(i, len(self))
        one, info = self[i], self.info
        scale = float(certificate.unit(one.lower_bound)[0])
        below = certificate.convexity_violation(one.slopes, one.offsets, one.cut_points, self._model)[0]
        return f"sample {i}: " + advise(
            Status(one.status[0]),
            iterations=info["iterations"],
            steps=info["steps"],
            gap=float(one.gap[0]),
            gap_bound=info["gap_tolerance"] * scale,
            residual=float(certificate.relative_residual(one.residual, one.lower_bound)[0]),
            residual_bound=info["residual_tolerance"],
            violation=float(max(below, one.residual[0, 2] - one.gap[0])),
            uncertainty=float(one.uncertainty[0]),
            dtype=str(self.y.dtype),
        )

    @property
    def uncertainty(self) -> Array:
        """[B] float64: by how much rounding may have moved gap and lower bound, as `certificate.uncertainty` tells."""
        box = None if self.lower is None or self.upper is None else certificate.magnification(self.lower, self.upper)
        return certificate.uncertainty(
            *(self.energy, self.gap, self.slopes, self.offsets, self.lam, self._model, self.cut_points, box)
        )

    @property
    def _model(self) -> Domain:
        return MODELS[self.info.get("domain", "unit_box")]

    def unsafe(self, *, every_model: bool) -> NDArray[np.bool_]:
        """[B] bool: samples that no gradient should be taken at.

        Those are all but the `certificate.differentiable` and, with `every_model`, those where any of the K models was
        left with a complementarity above the tolerance. GAP is safe: what is differentiated is the K-step algorithm
        itself.
        """
        bad = ~self.differentiable
        if every_model:
            with np.errstate(invalid="ignore"):
                bound = self.info["residual_tolerance"] * certificate.unit(self.lower_bound)
                # Written so that NaN is unsafe.
                bad = bad | ~(self.complementarity_history <= bound[:, None]).all(1)
        return bad


def argmin(session: "Session", x: object, lower: object, upper: object, y_init: object, warm: object) -> ArgminSolution:
    """`EnergySession.argmin` documents the arguments."""
    began = time.perf_counter()
    manifest, runner = session.manifest, session.runner
    solver = solver_of(manifest, "argmin")
    X = batch(x, "x", session.dtype, manifest.x_shape)
    bounds = bounds_of(manifest, len(X), lower, upper)
    start = start_of(manifest, len(X), y_init, _warm(warm), bounds)
    feeds = {"x": X, "y_init": start, **bounds}
    runner.check_open()
    finite = np.logical_and.reduce([finite_rows(a) for a in (X, *bounds.values())])
    run = finite & (bounds["lower"] <= bounds["upper"]).all(1) if bounds else finite
    out, weights_id = runner.run("argmin", feeds, where=run)
    proven, at_once = session.convexity.proven_with(weights_id), runner.samples_at_once("argmin", feeds)
    # So many at once, as this takes memory too.
    parts = [
        judged(manifest, finite[rows], _rows(out, rows), _rows(bounds, rows), proven)[0]
        for rows in chunks(len(X), at_once)
    ]
    status = session.convexity.doubted(np.concatenate(parts) if parts else np.zeros(0, np.int8))
    status[finite & ~run] = Status.INFEASIBLE
    assert manifest.domain is not None, "a solver has a domain"
    info = runner.info(
        "argmin",
        began,
        ran=bool(run.any()),
        domain=manifest.domain.kind,
        iterations=solver.iterations,
        steps=solver.steps,
        gap_tolerance=solver.gap_tolerance,
        residual_tolerance=solver.residual_tolerance,
    )
    return ArgminSolution(x=X, **out, status=status, info=info, weights_id=weights_id, **bounds)


def _warm(solution: object) -> Floats | None:
    """The y of an earlier solution."""
    if solution is None:
        return None
    expected, remedy = "what session.argmin returned", "pass an array as y_init instead"
    return instance(solution, "warm", ArgminSolution, expected, remedy).y


def judged(
    manifest: Manifest,
    finite: NDArray[np.bool_],
    out: Mapping[str, NDArray[Any]],
    bounds: Mapping[str, Floats],
    proven: bool,
) -> tuple[NDArray[np.int8], Array | float]:
    """`certificate.judge` of what a graph of this package gave; `finite` [B] says which samples are."""
    assert manifest.solver is not None, "what is judged has been solved"
    assert manifest.domain is not None, "a solver has a domain"
    tolerances = Tolerances(manifest.solver.gap_tolerance, manifest.solver.residual_tolerance)
    model, lower, upper = MODELS[manifest.domain.kind], bounds.get("lower"), bounds.get("upper")
    return certificate.judge(finite, out, tolerances, model, lower, upper, proven=proven)


def _rows(arrays: Mapping[str, Floats], rows: Any) -> dict[str, Floats]:
    return {name: array[rows] for name, array in arrays.items()}
