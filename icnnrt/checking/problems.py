"""Problems that a session solves, of three kinds: how it is asked, how a cotangent goes back, and by how much two right
answers may differ, as their certificates tell it."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.checking.report import Array, Arrays, Check, median, worst
from icnnrt.mathematics import bregman, reference
from icnnrt.mathematics.bundle_qp import bundle_qp_argmin
from icnnrt.mathematics.domains import SPACE, Coordinates, Domain, distance
from icnnrt.mathematics.polyhedron_programs import Polyhedron
from icnnrt.mathematics.status import ANSWERED, Status
from icnnrt.serving import polyhedron
from icnnrt.serving.load import AnySession

# What two answers may differ by where their gaps would allow less: the order of sums, magnified by K solves. The energy
# is relative to max(1, |energy|). z, which has no gap, relative to its largest entry: to the root of a gap of 1e-12
# where a constraint is weakly active; float32 data move it by their rounding too.
Y: Final = {"float64": 1e-6, "float32": 1e-3}
ENERGY: Final = {"float64": 1e-9, "float32": 1e-4}
Z: Final = {"float64": 1e-5, "float32": 1e-3}
# Steps h along a direction that is as long as a typical entry; the difference that comes nearest counts. The longest is
# the cube root of the rounding of y*; in float32 many samples of a piecewise-linear energy straddle kinks with it, and
# the shorter ones, though noisier, do not.
STEPS: Final = {"float64": (1e-5, 1e-6), "float32": (1e-2, 1e-3)}
# The longest along x and constraints that few samples cross a kink with.
POLYHEDRON_STEPS: Final = {"float64": (1e-2, 1e-3), "float32": (1e-1, 1e-2)}
PLAIN: Final = Coordinates(0.0, 1.0)


@dataclass
class Problem:
    """Of any kind: y, or z of a quadratic program, by inputs of B samples each, which have the names of arguments.

    A gap means that of the domain, in coordinates `at`; without a domain there is none.
    """

    session: AnySession
    inputs: Arrays
    method: str  # of the session, which answers
    answered: Callable[[Any], NDArray[np.bool_]]  # samples of an answer that can be compared
    reference: Callable[[], Any] = lambda: None  # by the same method in numpy, around the package's value graph
    domain: Domain | None = None
    at: Coordinates = PLAIN
    letter: str = "y"
    vjp: Callable[..., Any] = lambda session, answer, y_bar: session.vjp(answer, y_bar, on_unsafe="skip")
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: STEPS)

    @functools.cached_property
    def answer(self) -> Any:
        """Of the inputs as they are, computed with the first check that asks for it."""
        return self.solve()

    def solve(self, session: AnySession | None = None, rows: slice = slice(None), moved: Arrays | None = None) -> Any:
        """The answer of some samples, or of another session, or with arrays in the place of some inputs."""
        inputs = {name: a[rows] for name, a in {**self.inputs, **(moved or {})}.items()}
        return getattr(session or self.session, self.method)(**inputs, **self.settings)

    def gaps(self, answer: Any) -> Array:
        """[B]: f is known to its rounding only, which moves y as a gap of that size would."""
        noise = 4 * np.finfo(self.session.dtype).eps * np.maximum(1.0, np.abs(answer.energy))
        return np.asarray(np.maximum(answer.gap, 0.0) + noise)

    def near(self, a: Any, b: Any) -> Array:
        """[B]: by how much an entry may differ. Nearer than the gaps allow, two answers are as good as each other, and
        where K cuts are few, or kinks many, they do differ."""
        T = self.session.manifest.dtype
        if self.domain is None:
            return Z[T] * np.maximum(1.0, np.abs(b.y.astype(np.float64)).max(1, initial=0.0))
        return np.maximum(Y[T], sum(distance(self.domain, self.at, self.gaps(one)) for one in (a, b)))

    def compare(self, name: str, a: Any, b: Any, whose: tuple[str, str], kept: NDArray[np.bool_]) -> Check:
        """The entries of two answers, of the samples that are kept."""
        apart = np.abs(a.y[kept].astype(np.float64) - b.y[kept]).max(1, initial=0.0)
        ours, theirs = (f"{self.letter}{word}" for word in whose)
        allowed = f"; a gap g allows √({2 / self.domain.convexity:g} g) in p" if self.domain else ""
        with np.errstate(invalid="ignore"):
            bound = self.near(a, b)[kept]
        return worst(name, apart, bound, f"max |{ours} − {theirs}|, median {median(apart)}{allowed}")

    def against_reference(self, kind: str, kept: NDArray[np.bool_]) -> Iterator[Check]:
        """The answer and its energy."""
        a, b = self.answer, self.reference()
        yield self.compare(f"{kind}: y", a, b, ("", " of the reference"), kept)
        with np.errstate(invalid="ignore"):
            apart, floor = np.abs(a.energy - b.energy), ENERGY[self.session.manifest.dtype]
            bound = np.max([floor * np.maximum(1.0, np.abs(b.energy)), self.gaps(a), self.gaps(b)], axis=0)
        what = f"|energy − energy of the reference|, median {median(apart[kept])}; the gap is allowed"
        yield worst(f"{kind}: energy", apart[kept], bound[kept], what)


def argmin(
    session: AnySession, inputs: Arrays, f: Callable[[Array], tuple[Array, Array]], domain: Domain, at: Coordinates
) -> Problem:
    """y* over the package's domain, by its solver; f(y) -> value and gradient."""

    @functools.cache
    def true() -> Any:
        solver, n = session.manifest.solver, session.manifest.y_shape[0]
        assert solver is not None
        of_p, start = reference.in_coordinates(f, at), np.full((len(inputs["x"]), n), domain.centre(n))
        with np.errstate(invalid="ignore", over="ignore"):
            if solver.step_size is None:
                found = reference.bundle_entropy_argmin(of_p, start, solver.iterations, domain=domain)
            else:
                found = bregman.bregman_argmin(of_p, start, solver.iterations, solver.step_size, domain)
            return found._replace(y=at.y(found.y))

    def answered(answer: Any) -> NDArray[np.bool_]:
        return np.isfinite(answer.energy) & np.isfinite(answer.gap)

    return Problem(session, inputs, "argmin", answered, true, domain, at)


def quadratic_programs(session: AnySession, inputs: Arrays) -> Problem:
    """z of a network that goes through them: residuals tell that it is right, no gap by how much."""
    return Problem(session, inputs, "solve_qp", lambda answer: answer.status == Status.CONVERGED, letter="z")


def over_polyhedron(session: AnySession, inputs: Arrays, iterations: int, tolerance: float | None = None) -> Problem:
    """y* = argmin of f + ½ ‖y‖² under the constraints among the inputs, by so many cuts at most."""

    def vjp(session: AnySession, answer: Any, y_bar: NDArray[Any]) -> Any:
        # At a gap that is as small as rounding lets it be, GAP is no reason to leave a sample out.
        answer = replace(answer, status=np.where(answered(answer), np.int8(0), answer.status))
        return session.vjp_polyhedron(answer, y_bar, on_unsafe="skip")

    def answered(answer: Any) -> NDArray[np.bool_]:
        return np.isin(answer.status, ANSWERED)

    @functools.cache
    def true() -> Any:
        X, rows = inputs["x"], Polyhedron(**{name: a for name, a in inputs.items() if name != "x"})
        f, usual = polyhedron.value_and_gradient(session, X), polyhedron.TOLERANCE[session.manifest.dtype]
        return bundle_qp_argmin(f, rows, iterations, 1.0, tolerance=usual, precision=X.dtype)

    settings = {"mu": 1.0, "iterations": iterations, "tolerance": tolerance}
    told = (answered, true, SPACE, PLAIN, "y", vjp, settings, POLYHEDRON_STEPS)
    return Problem(session, inputs, "argmin_polyhedron", *told)
