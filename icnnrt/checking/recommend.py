"""How many iterations a package's solver needs for a gap, told from data: what to export it with."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from icnnrt.arguments import batch, finite_rows, instance, integer, number, refused
from icnnrt.checking.report import Array
from icnnrt.format.fields import Report
from icnnrt.format.manifest import SolverSpec
from icnnrt.mathematics import certificate, reference
from icnnrt.mathematics.domains import MODELS, Coordinates, Domain, coordinates
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.serving.domain_arguments import bounds_of, solver_of
from icnnrt.serving.load import AnySession
from icnnrt.serving.session import Session

PERCENT: Final = (90, 99, 100)
MAX_ITERATIONS: Final = 64


@dataclass(frozen=True)
class Recommendation(Report):
    """What `recommend` found."""

    gap: float
    """The gap asked for, relative to max(1, |lower bound|) as a package's gap_tolerance is."""
    samples: int
    iterations: Mapping[int, int | None]
    """Percent of the samples -> the smallest K with which so many reach the gap; None if none tried was enough."""
    tried: int
    """The largest K tried."""
    exported: int
    """K of the package as it is."""
    reached: tuple[float, ...]
    """Share of the samples that reach the gap with K = 1, 2, ..."""


def recommend(
    session: AnySession,
    x: object,
    gap: float,
    *,
    lower: object = None,
    upper: object = None,
    max_iterations: int = MAX_ITERATIONS,
) -> Recommendation:
    """The smallest K whose gap is reached on 90, 99 and 100 % of the samples x [B, *x_shape].

    The package's solver is run in float64 numpy around its value graph, from the centre of the domain, K = 1, 2, ...
    up to max_iterations or until every sample has reached the gap. A float32 energy has a gap no smaller than its
    rounding. lower and upper are bounds, for a box. Samples with NaN or infinity, or without a y, are left out.

    Raises `InputError` for a package without a solver, wrong shapes, or no finite sample.
    """
    gap = number(gap, "gap", above=0.0, expected="a positive number, such as 1e-3")
    max_iterations = integer(max_iterations, "max_iterations", 1)
    instance(session, "session", Session, "what icnnrt.load returned")
    spec = solver_of(session.manifest, "recommend")
    X = batch(x, "x", session.dtype, session.manifest.x_shape)
    bounds = bounds_of(session.manifest, len(X), lower, upper)
    kept = np.logical_and.reduce([finite_rows(a) for a in (X, *bounds.values())])
    if bounds:
        kept &= (bounds["lower"] <= bounds["upper"]).all(1)
    if not kept.any():
        raise refused("x", "at least one sample without NaN and infinity", "none", "clean the data")
    X, bounds = X[kept], {name: bound[kept] for name, bound in bounds.items()}
    reached: list[float] = []
    domain = session.manifest.domain
    assert domain is not None, "a solver has a domain"
    at = coordinates(bounds, domain.mu)

    def of_y(y: Array) -> tuple[Array, Array]:
        f, g = session.value_and_gradient(X, y.astype(session.dtype))
        return f.astype(np.float64), g.astype(np.float64)

    shape = (len(X), session.manifest.y_shape[0])
    for energy, lower_bound in prefixes(of_y, shape, spec, MODELS[domain.kind], at, max_iterations):
        reached.append(float((energy - lower_bound <= gap * certificate.unit(lower_bound)).mean()))
        if reached[-1] == 1.0:
            break
    enough = {p: next((K for K, share in enumerate(reached, 1) if 100 * share >= p), None) for p in PERCENT}
    return Recommendation(gap, len(X), enough, len(reached), spec.iterations, tuple(reached))


def prefixes(
    value_and_gradient: Callable[[Array], tuple[Array, Array]],
    shape: tuple[int, int],
    spec: SolverSpec,
    model: Domain,
    at: Coordinates,
    K: int,
) -> Iterator[tuple[Array, Array]]:
    """Energy and lower bound, [B] each, after 1, 2, ..., K iterations of a solver: f(y) and ∇f(y), shape [B, n]."""
    of_p = reference.in_coordinates(value_and_gradient, at)
    c = model.centre(shape[1])
    p = np.full(shape, c)
    s = model.logits(NUMPY, p)
    G, e = np.empty((shape[0], 0, shape[1])), np.empty((shape[0], 0))
    lam: Array | None = None
    best = np.full(shape[0], -np.inf)
    f, g = of_p(p)
    for _ in range(K):
        offset = f + (g * (c - p)).sum(1)
        if spec.step_size is None:
            G = np.concatenate([G, g[:, None]], axis=1)
            e = np.concatenate([e, offset[:, None]], axis=1)
            p, lam, lower_bound, _ = reference.bundle_entropy_solve(G, e, lam, spec.steps, model)
        else:
            lower_bound = best = np.maximum(best, offset - model.conjugate(NUMPY, -g)[:, 0])
            s = (s - spec.step_size * g) / (1.0 + spec.step_size)
            p = model.point(NUMPY, s)
        f, g = of_p(p)
        yield f + model.regulariser(NUMPY, p)[:, 0], lower_bound
