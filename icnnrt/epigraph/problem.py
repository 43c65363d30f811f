"""Inference of a piecewise-linear input-convex network as one linear or quadratic program, exactly.

    min over y of  f(x, y) + (μ/2) ‖y‖²   s.t.  Gy <= h,   Ay = b,   lower <= y <= upper

With x given, and where f is made of affine maps and maxima (ReLU, leaky ReLU, |·|, max, max pooling), a variable t for
each unit that bends turns this into a program of z = (y, t)::

    min over z of  ½ z'Qz + p'z + constant   s.t.  [epigraphs of the units; G] z <= h,   Az = b,   lower <= z <= upper

whose optimum is that of f, as t only ever presses downwards (`icnnrt.convexity.piecewise` has the argument and checks
it). The graph of the package is followed, so this holds for any network, of whatever origin; in float64, with the
weights as they are now. Source of the idea: Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4.
"""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, finite_rows, instance, number, refused
from icnnrt.convexity import piecewise
from icnnrt.convexity.memory import call_bounded
from icnnrt.errors import InputError
from icnnrt.format.onnx_graph import Graph, read_graph
from icnnrt.format.package import Package
from icnnrt.mathematics.qp_reference import QP, QPReference, qp_solve
from icnnrt.mathematics.qp_status import STATUSES, advise
from icnnrt.mathematics.status import Status
from icnnrt.programs import Coo, Program, write_program
from icnnrt.serving.domain_arguments import given_rows
from icnnrt.serving.session import Session

Array = NDArray[np.float64]


class EpigraphSolution(NamedTuple):
    """The optimum of one problem; NaN where the status is neither CONVERGED nor INACCURATE."""

    y: Array  # [n]
    value: float  # f(x, y) + (μ/2) ‖y‖²
    z: Array  # [N], y and the hidden variables
    lam: Array  # [m], multipliers of Gz <= h
    nu: Array  # [q], of Az = b
    bound_multipliers: Array  # [N], of lower and upper
    residual: Array  # [3] relative stationarity, feasibility, duality gap
    status: Status

    @property
    def ok(self) -> bool:
        """Whether the status is CONVERGED."""
        return self.status == Status.CONVERGED

    def advice(self) -> str:
        """One sentence with numbers: how it went, and what would make it better."""
        a, b, c = (float(r) for r in self.residual)
        return advise(self.status, residual=(a, b, c), steps=None, double=True, ray=False)

    def summary(self) -> str:
        """The status and, unless it is CONVERGED, the advice."""
        return self.status.name if self.ok else f"{self.status.name}\n{self.advice()}"


class EpigraphProblem(NamedTuple):
    """min over z of ½ z'Qz + p'z + constant s.t. Gz <= h, Az = b, lower <= z <= upper; z = (y, t)."""

    Q: Coo  # [N, N]
    p: Array  # [N]
    G: Coo  # [m, N]; the rows of the units first, then those of y
    h: Array  # [m]
    A: Coo  # [q, N]
    b: Array  # [q]
    lower: Array  # [N], −inf where there is none
    upper: Array  # [N], inf where there is none
    constant: float
    variables: tuple[str, ...]  # names of z: y0, y1, ..., and t<unit's place>_<entry>
    units: tuple[str, ...]  # what in the graph makes the hidden variables t1_*, t2_*, ...
    n: int  # of y

    def y(self, z: Array) -> Array:
        """The y of z [..., N]."""
        return z[..., : self.n]

    def objective(self, z: Array) -> float:
        """½ z'Qz + p'z + constant."""
        return self._program().objective(z)

    def qp(self) -> QP:
        """The same for `qp_solve` and the operator QPSolve: dense, a batch of one, less the constant."""
        return QP(**{name: array[None] for name, array in self._program().dense(math.inf).items()})

    def solve(self, solver: Callable[[QP], QPReference] = qp_solve) -> EpigraphSolution:
        """The optimum by `qp_solve`, or by anything that takes its problem and answers as it does."""
        found = solver(self.qp())
        z = found.z[0]
        status = STATUSES[int(found.status[0])]
        return EpigraphSolution(
            self.y(z), self.objective(z), z, found.lam[0], found.nu[0], found.mu[0], found.residual[0], status
        )

    def write(self, path: str | os.PathLike[str], name: str = "icnnrt") -> None:
        """Write it as .lp (CPLEX' LP format) or .mps (free MPS), atomically; see `icnnrt.programs`."""
        write_program(path, self._program(), name)

    def _program(self) -> Program:
        return Program(*self[:10])


def epigraph(
    source: Session | Package,
    x: object,
    *,
    lower: object = None,
    upper: object = None,
    G: object = None,
    h: object = None,
    A: object = None,
    b: object = None,
    mu: float = 0.0,
) -> list[EpigraphProblem]:
    """One problem for each sample of x [B, *x_shape]; x None stands for one sample of an energy without context.

    source:        a session (its weights as they are now) or a package. Its own domain and regulariser play no part
    lower, upper:  of y, one number, [n] or [B, n]; none where left out or infinite
    G, h:          Gy <= h, [m, n] or [B, m, n], and [m] or [B, m]
    A, b:          Ay = b, likewise
    mu:            of (μ/2) ‖y‖²; with 0 the problem is linear, and may fall without end where y is not bounded

    Raises `InputError` naming the operator where f is not piecewise linear and convex in y, and for wrong arguments.
    """
    session = source if isinstance(source, Session) else None
    package = source.package if isinstance(source, Session) else source
    instance(package, "source", Package, "a session or a package", "icnnrt.load one")
    manifest = package.manifest
    if manifest.kind == "gradient":
        raise InputError("source: the package holds the gradient of an energy alone; export the energy itself.")
    if manifest.kind == "qp":
        raise refused("source", "a package of an energy", "one of a network of quadratic programs")
    mu = number(mu, "mu", least=0.0)
    (n,) = manifest.y_shape
    if x is None:
        batch(np.zeros((1, *manifest.x_shape)), "x", "float64", (0,))  # refuses, but of an energy without context
    X = np.zeros((1, *manifest.x_shape)) if x is None else batch(x, "x", manifest.dtype, manifest.x_shape)
    if not finite_rows(X).all():
        raise refused("x", "finite numbers", f"others in sample {int(np.argmin(finite_rows(X)))}", "clean it")
    rows = given_rows(len(X), n, G=G, h=h, A=A, b=b, lower=lower, upper=upper)._asdict()
    for name, absent in (("lower", -np.inf), ("upper", np.inf)):
        if (rows[name] == -absent).any():
            raise refused(name, f"numbers, or {absent} for none", -absent, "leave it out")
    weights = dict(package.weights if session is None else session.weights)
    graph = read_graph(package.graphs["value"], weights)
    problems = []
    for i, given in enumerate(X):
        walk, f = call_bounded(graph.initializers.values(), _walked, graph, given, n)
        problems.append(_problem(f, walk.hidden, n, mu, {name: array[i] for name, array in rows.items()}))
    return problems


def _walked(graph: Graph, x: Array, n: int) -> tuple[piecewise.Walk, piecewise.Affine]:
    walk = piecewise.Walk(graph, x, n)
    return walk, walk.run()


def _problem(
    f: piecewise.Affine, hidden: dict[int, piecewise.Hidden], n: int, mu: float, given: dict[str, Array]
) -> EpigraphProblem:
    # What f does not press on, directly or through others, is left out: it would be unbounded above.
    kept: dict[int, NDArray[np.bool_]] = {b: np.zeros(h.size, bool) for b, h in hidden.items()}
    for block, planes in f.terms.items():
        if block:
            kept[block] |= planes[:, 0] != 0
    for block in sorted(hidden, reverse=True):
        for variables, piece in hidden[block].pieces:
            used = kept[block][variables]
            for other, planes in piece.terms.items():
                if other:
                    kept[other] |= (planes[:, used] != 0).any(1)
    columns, names, lower = {0: np.arange(n)}, [f"y{j}" for j in range(n)], [given["lower"]]
    for block, unit in hidden.items():
        there = np.flatnonzero(kept[block])
        columns[block] = np.full(unit.size, -1)
        columns[block][there] = len(names) + np.arange(len(there))
        names += [f"t{block}_{j}" for j in there]
        lower.append(unit.lower[there])
    N = len(names)

    p = np.zeros(N)
    for block, planes in f.terms.items():
        pressed = columns[block] >= 0
        p[columns[block][pressed]] = planes[pressed, 0]
    triplets: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    h: list[Array] = []
    m = 0
    for block, unit in hidden.items():
        for variables, piece in unit.pieces:
            rows = np.flatnonzero(kept[block][variables])
            for other, planes in piece.terms.items():
                j, r = np.nonzero(planes[:, rows])
                triplets.append((m + r, columns[other][j], planes[j, rows[r]]))
            triplets.append((m + np.arange(len(rows)), columns[block][variables[rows]], np.full(len(rows), -1.0)))
            h.append(-piece.const[rows])
            m += len(rows)
    finite = given["h"] < np.inf
    r, j = np.nonzero(given["G"][finite])
    triplets.append((m + r, j, given["G"][finite][r, j]))
    h.append(given["h"][finite])
    m += int(finite.sum())
    i, j, value = (np.concatenate(parts) for parts in zip(*triplets, strict=True))
    G = Coo(i.astype(np.int64), j.astype(np.int64), value.astype(np.float64), (m, N))
    r, j = np.nonzero(given["A"])
    A = Coo(r, j, given["A"][r, j], (len(given["b"]), N))
    curved = np.arange(n if mu else 0)
    return EpigraphProblem(
        Coo(curved, curved, np.full(len(curved), float(mu)), (N, N)),
        p,
        G,
        np.concatenate(h),
        A,
        np.array(given["b"]),
        np.concatenate(lower),
        np.append(given["upper"], np.full(N - n, np.inf)),
        float(f.const[0]),
        tuple(names),
        tuple(unit.name for unit in hidden.values()),
        n,
    )
