"""A package in use: energies, their argmin with a certificate on every sample, and gradients through it."""

import functools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, converted, finite_in_all, finite_rows, flag, integer, writeable
from icnnrt.errors import CertificateError, InputError, PackageError
from icnnrt.format.manifest import Manifest, SolverSpec
from icnnrt.format.package import Package
from icnnrt.format.signatures import arrays_of, outputs_of
from icnnrt.format.verdict import Convexity
from icnnrt.limits import Limits, call, checked_limits, each_call
from icnnrt.mathematics import certificate
from icnnrt.mathematics.certificate import Tolerances
from icnnrt.mathematics.domains import MODELS
from icnnrt.mathematics.qp_status import QPStatus, statuses
from icnnrt.mathematics.status import RESTS_ON_CONVEXITY, Status
from icnnrt.ort import Provider
from icnnrt.printable import named
from icnnrt.serving import adjoint as _adjoint
from icnnrt.serving import polyhedron as _polyhedron
from icnnrt.serving.chunks import chunks
from icnnrt.serving.kept_convex import KeptConvex
from icnnrt.serving.polyhedron import ConstraintCotangents, PolyhedronSolution
from icnnrt.serving.runner import Runner
from icnnrt.serving.solution import Cotangents, Pulled, QPAnswer, Solution
from icnnrt.serving.weight_sets import WeightSet

Floats = NDArray[Any]  # float32 or float64: the package's dtype
NAMED: Final = 3  # how many samples an error names


def load(
    path: str | os.PathLike[str] | Package,
    *,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    native: bool | None = None,
    strict: bool = False,
    memory: int | None = None,
    follow_links: bool = False,
    limits: Limits | None = None,
) -> "Session":
    """Open the package at `path`, check it, and return a session that serves it.

    path:       the package folder, or a `Package` that is open already
    providers:  ONNX Runtime execution providers in order of preference, each a name or (name, options);
                by default the CPU. One that is missing is an error, never a silent fallback
    threads:    threads within one operator, 1 by default: the graphs are long chains of small operators, so one core
                serves a control loop best, and several callers in threads of their own use the others. Measure before
                raising it: on busy cores a second thread made batches of 128 twice as slow
    native:     whether compiled kernels run the solver's operators: True demands them, False leaves the operators to
                their portable bodies, and None, the default, takes the kernels if icnnrt was installed with them. They
                run on the CPU under every provider, so another device copies the cuts to it and the solution back, K
                times a call. A library that is there but that onnxruntime cannot use is a warning, and an error under
                True
    strict:     let `argmin` raise when any sample did not converge, unless it is told otherwise
    memory:     about how many bytes a call may take besides its arguments and its answer: large batches are run in
                chunks, of one sample at least. 64 MiB by default, or four times the weights where that is more. Answers
                depend on it by rounding at most; they are the same on every machine, if it is
    follow_links:  whether files of the package may be symbolic links to files, see `Package.open`
    limits:     for a package of a stranger: how long each call of the session may take, how much memory, and whether in
                a process of its own, see `icnnrt.Limits`; by default as much as there is

    A graph is handed to onnxruntime when it is first used, so this is fast and the first call of each method slow.

    Raises `PackageError` for a damaged package, `ProviderError` for a missing provider, `MissingDependencyError`
    without onnxruntime or the kernels that were demanded, `InputError` for other arguments.
    """
    package = path if isinstance(path, Package) else Package.open(path, follow_links=follow_links)
    return Session(
        package, providers=providers, threads=threads, native=native, strict=strict, memory=memory, limits=limits
    )


class Session:
    """Serves one package: f(x, y), y* = argmin over y in [0,1]^n of f(x, y) − H(y), and gradients of a loss on y*.

    Made by `load`. Every method may be called from several threads at once; they run in parallel. Use it as a context
    manager, or call `close`, to free the memory at a given moment.
    """

    def __init__(
        self,
        package: Package,
        *,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        native: bool | None = None,
        strict: bool = False,
        memory: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._package = package
        self._limits = checked_limits(limits)
        self._options: dict[str, Any] = {"providers": providers, "threads": threads, "native": native}
        self._options |= {"strict": strict, "memory": memory, "limits": self._limits}
        self._runner = Runner(package, providers, threads, native, memory, self._limits)
        self._native = native
        self._strict = flag(strict, "strict")
        manifest = package.manifest
        self._dtype = np.dtype(manifest.dtype)
        self._x_shape, (self._n,) = manifest.x_shape, manifest.y_shape
        found = manifest.convexity
        # What was last seen of the energy, and with which weights: by the export, or by `prove_convexity`.
        self._seen = (found.verdict if found else "unknown", self._runner.weights.id)

    # --- What it is ------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        """What the package says of itself."""
        return self._package.manifest

    @property
    def path(self) -> Path:
        """The package folder, absolute."""
        return self._package.path

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64: of x, y and the energy."""
        return self._dtype

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers in use, in order of preference."""
        return self._runner.provider_names

    @property
    def native(self) -> bool:
        """Whether compiled kernels serve the solver's operators; if not, their portable bodies do."""
        return self._runner.native

    @property
    def weights(self) -> Mapping[str, NDArray[Any]]:
        """name -> weight: the weights as they are now, all of one time, read-only; later updates do not reach them."""
        self._runner.check_open()
        return _Weights(self._runner.weights)

    @property
    def weights_id(self) -> str:
        """Changes whenever the weights do; a `Solution` bears the one it was computed with."""
        return self._runner.weights.id

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"<Session of {named(m.name)}: x {list(m.x_shape)}, y {list(m.y_shape)}, {m.dtype}, "
            f"{', '.join(self.providers)}{', native' if self.native else ''}>"
        )

    # --- The energy ------------------------------------------------------------------------------

    def value(self, x: object, y: object, *, out: Floats | None = None) -> Floats:
        """f(x, y), [B]; `value_and_gradient` documents x, y and out."""
        return self._evaluate("value", x, y, only=("f",), out=out)["f"]

    def gradient(self, x: object, y: object, *, out: Floats | None = None) -> Floats:
        """∇_y f(x, y), [B, n]; `value_and_gradient` documents x, y and out.

        For an energy of y alone, x None, that is the map y -> ∇f(y): the transport map of optimal transport.
        """
        role = "gradient" if self.manifest.kind == "gradient" else "value"
        return self._evaluate(role, x, y, only=("gradient",), out=out)["gradient"]

    def value_and_gradient(
        self, x: object, y: object, *, out: tuple[Floats, Floats] | None = None
    ) -> tuple[Floats, Floats]:
        """f(x, y) and ∇_y f(x, y) for a batch: ([B], [B, n]) in the package's dtype.

        x [B, *x_shape] and y [B, n] are arrays or nested lists of numbers; y may lie anywhere, not only in the domain.
        x may be None where the energy has no context (x_shape is [0]). Floats of another width are converted; integers
        and booleans must convert exactly. A sample with NaN or infinity in x or y gets NaN and leaves the others as
        they are. A large batch is run in chunks, see `load`; large arrays of the package's dtype are read where they
        are, so nobody should write in them meanwhile.

        out: arrays that the result is written to and that are returned, one for each it has: of its shape and dtype,
        C-contiguous, writeable, and apart from x and y. What an exception leaves in them is not defined.

        Raises `InputError` for a wrong shape or dtype, or if the package holds only a gradient.
        """
        found = self._evaluate("value", x, y, out=out)
        return found["f"], found["gradient"]

    def hvp(self, x: object, y: object, v: object, *, out: Floats | None = None) -> Floats:
        """∇²_y f(x, y) v, [B, n], for v [B, n]. Needs hvp.onnx, an optional head of the export."""
        return self._evaluate("hvp", x, y, v, out=out)["hvp"]

    def hessian(self, x: object, y: object, *, out: Floats | None = None) -> Floats:
        """∇²_y f(x, y), dense: [B, n, n]. Needs hessian.onnx, an optional head of the export."""
        return self._evaluate("hessian", x, y, only=("hessian",), out=out)["hessian"]

    def value_gradient_hessian(
        self, x: object, y: object, *, out: tuple[Floats, Floats, Floats] | None = None
    ) -> tuple[Floats, Floats, Floats]:
        """f [B], ∇_y f [B, n] and ∇²_y f [B, n, n] in one run: of a material law, energy, stress and tangent."""
        if self.manifest.kind != "energy":
            raise _no_value(self.manifest)
        found = self._evaluate("hessian", x, y, out=out)
        return found["f"], found["gradient"], found["hessian"]

    def gradient_x(self, x: object, y: object, *, out: Floats | None = None) -> Floats:
        """∇_x f(x, y), [B, *x_shape]. Needs gradient_x.onnx, an optional head of the export."""
        return self._evaluate("gradient_x", x, y, out=out)["gradient_x"]

    def pullback(
        self,
        x: object,
        y: object,
        f_bar: object,
        gradient_bar: object,
        *,
        out: tuple[Floats, Floats] | None = None,
    ) -> Pulled:
        """Cotangents of f and ∇_y f to y, x and the weights: the gradients of Σ_b f̄_b f(x_b, y_b) + ḡ_b'∇_y f.

        f_bar [B], gradient_bar [B, n]. ȳ = f̄ ∇_y f + ∇²_y f ḡ; θ̄ is summed over the batch. A sample with NaN or
        infinity in any of the four has NaN in ȳ and x̄ and no part in θ̄. Needs pullback.onnx, an optional head. `out`
        are arrays for ȳ and x̄, as `value_and_gradient` documents them; what is returned are views of them.
        """
        self._demand("pullback")
        Y, n = batch(y, "y", self._dtype, (self._n,), copy=False), (self._n,)
        X = self._no_context(len(Y)) if x is None else batch(x, "x", self._dtype, self._x_shape, copy=False)
        feeds = {
            "x": X,
            "y": batch(Y, "y", self._dtype, n, length=len(X), copy=False),
            "f_bar": batch(f_bar, "f_bar", self._dtype, (), length=len(X), copy=False),
            "gradient_bar": batch(gradient_bar, "gradient_bar", self._dtype, n, length=len(X), copy=False),
        }
        into = None
        if out is not None:
            into = self._into(out, ("y_bar", "x_bar"), len(X), (x, y, f_bar, gradient_bar, *feeds.values()))
        self._runner.check_open()
        found, _ = self._runner.run("pullback", feeds, where=finite_in_all(feeds.values()), out=into)
        return Pulled(found["y_bar"], found["x_bar"], _adjoint.weights_bar(found))

    def _demand(self, role: str) -> None:
        if role not in self.manifest.graphs:
            if role == "value":
                raise _no_value(self.manifest)
            raise InputError(
                f"{role}: the package {named(self.manifest.name)} has no {role}.onnx; export it again with "
                f"heads=[{role!r}], or on the command line with --head {role}."
            )

    def _evaluate(
        self,
        role: str,
        x: object,
        y: object,
        v: object = None,
        *,
        only: tuple[str, ...] | None = None,
        weights: WeightSet | None = None,
        out: object = None,
    ) -> dict[str, NDArray[Any]]:
        """Run a graph of the energy; a sample that holds NaN or infinity is left out, and NaN in every output.

        `out` is what the caller wants the outputs in: an array if it is one, a tuple of arrays if they are several.
        """
        self._demand(role)
        X = None if x is None else batch(x, "x", self._dtype, self._x_shape, copy=False)
        length = None if X is None else len(X)
        Y = batch(y, "y", self._dtype, (self._n,), length=length, copy=False)
        feeds = {"x": self._no_context(len(Y)) if X is None else X, "y": Y}
        if role == "hvp":
            feeds["y_dot"] = batch(v, "v", self._dtype, (self._n,), length=len(Y), copy=False)
        into = None
        if out is not None:
            into = self._into(out, only or outputs_of(self.manifest, role), len(Y), (x, y, v, *feeds.values()))
        self._runner.check_open()
        finite = finite_in_all(feeds.values())
        return self._runner.run(role, feeds, only=only, weights=weights, where=finite, out=into)[0]

    def _into(self, out: object, names: tuple[str, ...], B: int, inputs: tuple[object, ...]) -> dict[str, Floats]:
        """The arrays that a caller wants results in, by the names of these."""
        given = [out] if len(names) == 1 else out
        if not isinstance(given, list | tuple) or len(given) != len(names):
            raise InputError(
                f"out: expected a tuple of {len(names)} arrays, for {', '.join(names)}, but got "
                f"{f'{len(given)} of them' if isinstance(given, list | tuple) else type(out).__name__}."
            )
        into: dict[str, Floats] = {}
        for i, (name, array) in enumerate(zip(names, given, strict=True)):
            dtype, (_, *shape) = arrays_of(self.manifest)[name]
            argument = "out" if len(names) == 1 else f"out[{i}]"
            others = (*inputs, *into.values())
            into[name] = writeable(array, argument, dtype, (B, *map(int, shape)), others)
        return into

    def _no_context(self, B: int) -> Floats:
        if math.prod(self._x_shape):
            raise InputError(
                f"x: expected an array of shape [{B}, {', '.join(map(str, self._x_shape))}], but got None; only an "
                "energy without context does without it."
            )
        return np.zeros((B, *self._x_shape), self._dtype)

    # --- Its argmin ------------------------------------------------------------------------------

    def argmin(
        self,
        x: object,
        *,
        lower: object = None,
        upper: object = None,
        y_init: object = None,
        warm: Solution | None = None,
        strict: bool | None = None,
    ) -> Solution:
        """Solve y* = argmin over y in the domain of f(x, y) + R(y) for a batch of contexts x [B, *x_shape].

        The package fixes domain and regulariser, see `icnnrt.format.manifest.Domain`: [0,1]^n with R = −H by default.

        x:       array or nested lists of numbers, converted to the package's dtype as `value_and_gradient` does
        lower:   with `upper`, the bounds of y, for a package whose domain is a box and for no other: [B, n], or [n] or
                 one number for all samples. Where both are equal they fix y
        y_init:  where the solver starts, [B, n] in the domain; its centre by default
        warm:    a solution of B earlier samples (of any weights): its y is where the solver starts, brought within
                 the bounds of now, and the centre where it is NaN. K cuts are made all the same, so a good start makes
                 the answer better, not faster
        strict:  raise `CertificateError` if any sample did not converge; by default what `load` was told

        Returns a `Solution` of B samples, each with status, gap and residual. A batch of none is fine. A sample with
        NaN or infinity in x or a bound is not run and has status NOT_FINITE_INPUT, or INFEASIBLE where a lower bound
        exceeds its upper one; the others' answers do not depend on it, up to the rounding that another batch size
        brings. Of a package that was exported although its energy is not convex, every answer is NOT_CONVEX.

        Raises `InputError` for a wrong shape, dtype or range.
        """
        started = time.perf_counter()
        solver = self._solver("argmin")
        X = batch(x, "x", self._dtype, self._x_shape)
        B = len(X)
        bounds = self._bounds(B, lower, upper)
        feeds = {"x": X, "y_init": self._start(B, y_init, warm, bounds), **bounds}
        self._runner.check_open()
        finite = np.logical_and.reduce([finite_rows(a) for a in (X, *bounds.values())])
        run = finite & (bounds["lower"] <= bounds["upper"]).all(1) if bounds else finite
        out, weights_id = self._runner.run("argmin", feeds, where=run)
        assert self.manifest.domain is not None, "a solver has a domain"
        status = self._judged(finite, out, bounds, weights_id, self._runner.samples_at_once("argmin", feeds))
        if self._seen[0] == "violated":  # whether or not these cuts show it
            status[np.isin(status, RESTS_ON_CONVEXITY)] = Status.NOT_CONVEX
        status[finite & ~run] = Status.INFEASIBLE
        info = {
            "providers": self.providers,
            "native": bool(run.any()) and self._runner.ran_native("argmin"),
            "domain": self.manifest.domain.kind,
            "iterations": solver.iterations,
            "steps": solver.steps,
            "gap_tolerance": solver.gap_tolerance,
            "residual_tolerance": solver.residual_tolerance,
            "seconds": time.perf_counter() - started,
        }
        solution = Solution(x=X, **out, status=status, info=info, weights_id=weights_id, **bounds)
        if self._is_strict(strict):
            _demand(solution)
        return solution

    def _judged(
        self,
        finite: NDArray[np.bool_],
        out: Mapping[str, NDArray[Any]],
        bounds: Mapping[str, Floats],
        weights_id: str,
        size: int,
    ) -> NDArray[np.int8]:
        """The status of every sample; so many at once, as this takes memory too."""
        if len(finite) > size:

            def of(those: Mapping[str, Floats], rows: Any) -> dict[str, Floats]:
                return {name: a[rows] for name, a in those.items()}

            parts = ((finite[rows], of(out, rows), of(bounds, rows)) for rows in chunks(len(finite), size))
            return np.concatenate([self._judged(*part, weights_id, size) for part in parts])
        solver, domain = self.manifest.solver, self.manifest.domain
        assert solver is not None, "what is judged has been solved"
        assert domain is not None, "a solver has a domain"
        tolerances = Tolerances(solver.gap_tolerance, solver.residual_tolerance)
        lower, upper = bounds.get("lower"), bounds.get("upper")
        proven = self._is_proven(weights_id)
        status, _ = certificate.judge(finite, out, tolerances, MODELS[domain.kind], lower, upper, proven=proven)
        return status

    def solve_qp(self, x: object, *, strict: bool | None = None) -> QPAnswer:
        """z(x) of a package of kind "qp", a network that goes through quadratic programs: x [B, *x_shape] -> z [B, n].

        x is converted as `value_and_gradient` does. Returns a `QPAnswer` with status and residual of each sample: where
        no z meets the constraints of a program, or its objective falls without end, z is NaN and the others are as they
        would be alone. A sample with NaN or infinity in x is not run and has status NOT_FINITE_INPUT. With `strict`, by
        default what `load` was told, `CertificateError` is raised if any sample is not CONVERGED.

        Raises `InputError` for a wrong shape or dtype, or for a package of another kind.
        """
        started = time.perf_counter()
        self._demand_qp("solve_qp")
        X = batch(x, "x", self._dtype, self._x_shape)
        self._runner.check_open()
        finite = finite_rows(X)
        out, weights_id = self._runner.run("solve", {"x": X}, where=finite, fill={"status": QPStatus.NOT_FINITE_INPUT})
        out["status"] = statuses(out["status"])
        # Solved programs may be followed by layers that overflow.
        lost = ~np.isfinite(out["z"]).all(1) & (out["status"] == Status.CONVERGED)
        if lost.any():
            out["status"] = np.where(lost, np.int32(Status.NOT_FINITE), out["status"])
        info = {
            "providers": self.providers,
            "native": bool(finite.any()) and self._runner.ran_native("solve"),
            "seconds": time.perf_counter() - started,
        }
        answer = QPAnswer(X, out["z"], out["status"], out["residual"], info, weights_id)
        if self._is_strict(strict) and not answer.ok.all():
            failed = np.flatnonzero(~answer.ok)
            named = "; ".join(answer.advice(int(i)) for i in failed[:NAMED])
            more = f"; and {failed.size - NAMED} more" if failed.size > NAMED else ""
            raise CertificateError(
                f"strict: {failed.size} of {len(answer)} samples are not solved: {named}{more}. "
                "Pass strict=False to get the answer with a status for every sample."
            )
        return answer

    def _demand_qp(self, what: str) -> None:
        if self.manifest.kind != "qp":
            raise InputError(
                f"{what}: expected a package of kind 'qp', but {named(self.manifest.name)} is of kind "
                f"{self.manifest.kind!r}; use argmin, or export the network with kind='qp'."
            )

    def vjp(
        self, solution: Solution | QPAnswer, y_bar: object, *, adjoint: str = "exact", on_unsafe: str = "raise"
    ) -> Cotangents:
        """θ̄ and x̄ of a loss on y* with ȳ = ∂ℓ/∂y*, [B, n]: the vector-Jacobian product of `argmin`, or of `solve_qp`.

        solution:   what `argmin`, or `solve_qp`, of this session returned, or of another session with the same package
                    and weights
        y_bar:      array or nested lists of finite numbers, converted as `argmin` converts x
        adjoint:    "exact" (the derivative of the K-step algorithm) or "prop3" (the paper's, cheaper, right for
                    piecewise-linear energies); `icnnrt.serving.adjoint` explains both
        on_unsafe:  "raise", or "skip" to leave samples without a trustworthy gradient out of the sum. Those are
                    samples with status SOLVER, NOT_CONVEX or NOT_FINITE*, those where rounding leaves more than 1e-3
                    of the energy open, and for "exact" also those where any model on the way missed the residual
                    tolerance. GAP is safe: the gradient is that of the algorithm; and so is PRECISION up to that 1e-3

        Returns `Cotangents`: weights {name: θ̄} for every trainable weight, summed over the batch (not averaged),
        x [B, *x_shape], and of a box lower and upper [B, n]. Where the solver started counts as a constant, in a box as
        a constant part of the way from lower to upper, as its centre is. Skipped samples have x̄ = NaN and may have any
        ȳ, NaN too. If all are skipped, θ̄ is zero.

        Of `solve_qp` the unsafe samples are all that are not SOLVED, and `adjoint` has no say.

        Raises `CertificateError` naming unsafe samples, `InputError` for a solution of other weights or a y_bar of the
        wrong shape or dtype.
        """
        qp = self.manifest.kind == "qp"
        if not qp:
            self._solver("vjp")
        self._runner.check_open()
        if isinstance(solution, Solution | QPAnswer):
            self._runner.check_weights(solution.weights_id)

        def run(feeds: Mapping[str, NDArray[Any]], where: NDArray[np.bool_]) -> Mapping[str, NDArray[Any]]:
            role = "solve_adjoint" if qp else "adjoint"
            return self._runner.run(role, feeds, made_with=solution.weights_id, where=where)[0]

        if qp:
            return _adjoint.vjp_qp(run, self.manifest, solution, y_bar, on_unsafe=on_unsafe)
        return _adjoint.vjp(run, self.manifest, solution, y_bar, adjoint=adjoint, on_unsafe=on_unsafe)

    @each_call
    def argmin_polyhedron(
        self,
        x: object,
        *,
        G: object = None,
        h: object = None,
        A: object = None,
        b: object = None,
        lower: object = None,
        upper: object = None,
        mu: float | None = None,
        iterations: int | None = None,
        tolerance: float | None = None,
        y_init: object = None,
        strict: bool | None = None,
    ) -> PolyhedronSolution:
        """Solve y* = argmin of f(x, y) + (μ/2) ‖y‖² over {Gy <= h, Ay = b, lower <= y <= upper}, of any package.

        The package's own domain and regulariser, if it has any, play no part. Everything is float64 but f itself. A
        package that was exported with the head "polyhedron" runs one graph; others run the same method in Python, which
        takes several times as long, but starts each quadratic program from the last, and so may solve some more of
        badly scaled ones.

        x:             [B, *x_shape], converted to the package's dtype
        G, h, A, b:    [m, n], [m], [q, n], [q] for all samples, or with B in front
        lower, upper:  one number, [n] or [B, n]; infinite for none
        mu:            of the regulariser; with 0 the constraints have to bound y, or y is NaN and the status UNBOUNDED
        iterations:    the most cuts; a sample stops at its tolerance
        tolerance:     of the gap relative to max(1, |lower_bound|)
        y_init:        [B, n], where to start; its nearest feasible point is the first cut's. 0 by default
        strict:        raise `CertificateError` if any sample did not converge; by default what `load` was told

        What is left out of mu, iterations and tolerance is as the package was exported (`manifest.polyhedron`), else
        1, 100, and 1e-9 of a float64 package, 1e-5 of a float32 one.

        Returns a `PolyhedronSolution`: y*, gap and lower bound, multipliers of the constraints, a status per sample
        (INFEASIBLE where no y meets the constraints). Raises `InputError` for wrong arguments.
        """
        if "value" not in self.manifest.graphs:
            raise _no_value(self.manifest)
        given = {"G": G, "h": h, "A": A, "b": b, "lower": lower, "upper": upper}
        solution = _polyhedron.argmin(
            self, x, **given, mu=mu, iterations=iterations, tolerance=tolerance, y_init=y_init
        )
        if self._seen[0] == "violated":  # whether or not its cuts show it
            status = np.where(np.isin(solution.status, RESTS_ON_CONVEXITY), Status.NOT_CONVEX, solution.status)
            status, ray = status.astype(np.int8), np.zeros_like(solution.ray)
            trajectory = solution.trajectory._replace(status=status, ray=ray)
            solution = replace(solution, status=status, ray=ray, trajectory=trajectory)
        failed = np.flatnonzero(~solution.ok)
        if self._is_strict(strict) and failed.size:
            raise CertificateError(
                f"strict: {failed.size} of {len(solution)} samples did not converge: {solution.advice(int(failed[0]))}."
            )
        return solution

    @each_call
    def vjp_polyhedron(
        self, solution: PolyhedronSolution, y_bar: object, *, adjoint: str = "auto", on_unsafe: str = "raise"
    ) -> ConstraintCotangents:
        """The gradient of a loss on y* with ȳ = ∂ℓ/∂y* [B, n], by G, h, A, b, lower, upper, mu, x and the weights.

        adjoint:    "prop3" for energies of pieces, "implicit" (needs hessian.onnx) for smooth ones, "exact" (needs
                    pullback.onnx) for the derivative of the iterations; "auto" asks the graph which of the first two.
                    `icnnrt.serving.polyhedron` tells them apart
        on_unsafe:  "raise", or "skip" to leave out samples without a trustworthy gradient: those of status SOLVER,
                    NOT_CONVEX, NOT_FINITE* or UNBOUNDED, of "implicit" those of GAP too, and those with an inaccurate
                    model on the way

        x̄ and θ̄ need the head "polyhedron" or "pullback", and are None without. With the head "polyhedron" the adjoint
        that the manifest names, `manifest.polyhedron.adjoint`, is one graph, and "auto" takes it; the other two run in
        Python and need what is said above. Raises `CertificateError` naming unsafe samples.
        """
        return _polyhedron.vjp(self, solution, y_bar, adjoint=adjoint, on_unsafe=on_unsafe)

    @each_call
    def prove_convexity(self, x: object = None, *, seed: int = 0) -> Convexity:
        """Whether f is convex in y with the weights as they are now: proven, violated (with a witness) or unknown.

        The value graph itself is followed, see `icnnrt.convexity`. x [B, *x_shape] are contexts to look for violations
        at where nothing is proven; random normal ones by default. From then on, every answer of an energy that is
        violated is NOT_CONVEX, until another look finds otherwise: as it would be of a package written now. A package
        of a gradient alone is refused with `InputError`: it has no value to look at.
        """
        if self.manifest.kind != "energy":
            raise _no_value(self.manifest)
        seed = integer(seed, "seed", 0)
        X = None if x is None else batch(x, "x", self._dtype, self._x_shape)
        self._runner.check_open()
        weights = self._runner.weights  # one set for all, whatever is updated meanwhile

        def value(x: Floats, y: Floats) -> Floats:
            return self._evaluate("value", x, y, only=("f",), weights=weights)["f"]

        from icnnrt.convexity import prove  # which no session needs to answer

        found = prove(self._package.graphs["value"], weights.arrays, value=value, x_samples=X, seed=seed)
        stated = self.manifest.convexity
        if found.verdict == "proven" and stated is not None:
            # It was repeated with other numbers for the same weights, so it rests on the same.
            found = replace(found, rests_on=stated.rests_on)
        if weights is self._runner.weights:
            self._seen = (found.verdict, weights.id)
        return found

    def close(self) -> None:
        """Free the sessions. Calls under way in other threads end well; later ones raise `IcnnrtError`."""
        self._runner.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A session is pickled as the place of its package, a hash of it, and what it was opened with.

        It opens anew where it is unpickled, from the same place, and refuses another package there with `PackageError`.
        So Ray, Dask and multiprocessing take it. Raises `InputError` if the weights are no longer those of the package,
        which no other process can know.
        """
        self._runner.check_open()
        if self._runner.weights.id != self._runner.first_id:
            raise InputError(
                "session: expected the weights of the package, to be pickled, but they have been updated since; write "
                "them by FineTuner.write_package, and pickle a session of that package."
            )
        return _reopen, (str(self.path), self._package.identity, self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- How -------------------------------------------------------------------------------------

    @functools.cached_property
    def _kept_convex(self) -> KeptConvex:
        """What weights have to be that take the place of these, made by whoever changes them first."""
        manifest, train = self.manifest, self.manifest.train
        moved = train.weights if train else manifest.weights.trainable
        # Of the weights of the package: that is whose proof is kept.
        first = self._package.weights
        return call(self._limits, KeptConvex, manifest, self._package.graphs, first, moved)

    def _is_proven(self, weights_id: str) -> bool:
        """Whether f is proven convex with these weights: it was, and they are those of then, or have kept it so."""
        verdict, seen = self._seen
        return verdict == "proven" and (weights_id == seen or self._kept_convex.proven)

    def _is_strict(self, strict: bool | None) -> bool:
        return self._strict if strict is None else flag(strict, "strict")

    def _follow(self, present: WeightSet, new: Mapping[str, NDArray[Any]]) -> bool:
        """The same of weights with which `KeptConvex` finds no fault beside the present ones; False if others have come
        in the place of these."""
        try:
            self._runner.update_weights(new, made_with=present.id)
        except InputError:
            if self._runner.weights is present:
                raise
            return False
        return True

    def _update_weights(self, new: Mapping[str, NDArray[Any]]) -> None:
        """Write new weights in place, for every graph at once; solutions from before become stale.

        Shapes and dtypes are checked, signs are not: keeping the energy convex is the caller's.
        """
        if self._seen[0] == "proven":  # before they change, so that nothing proves these
            self._seen = ("unknown", "")
        self._runner.update_weights({name: np.array(a) if isinstance(a, np.ndarray) else a for name, a in new.items()})

    def _solver(self, what: str) -> SolverSpec:
        if self.manifest.kind == "qp":
            raise InputError(f"{what}: the package holds a network of quadratic programs, no energy; use `solve_qp`.")
        if self.manifest.solver is None:
            raise InputError(
                f"{what}: the package {named(self.manifest.name)} was exported without a solver, so it serves the "
                "energy and its derivatives alone; export it again with a solver."
            )
        return self.manifest.solver

    def _bounds(self, B: int, lower: object, upper: object) -> dict[str, Floats]:
        """lower and upper as [B, n] for a box, nothing for other domains."""
        domain = self.manifest.domain
        given = {"lower": lower, "upper": upper}
        if domain is None or domain.kind != "box":
            for name, value in given.items():
                if value is not None:
                    kind = domain.kind if domain else "none"
                    raise InputError(f"{name}: expected none, as the domain is {kind!r}, but got one; leave it out.")
            return {}
        bounds = {}
        for name, value in given.items():
            if value is None:
                raise InputError(f"{name}: expected the bounds of y, as the domain is a box, but got none; give both.")
            array = converted(value, name)
            if array.ndim < 2 and array.dtype.kind in "fiu" and array.shape in ((), (self._n,)):
                array = np.broadcast_to(array, (B, self._n))
            bounds[name] = batch(array, name, self._dtype, (self._n,), length=B)
        return bounds

    def _start(self, B: int, y_init: object, warm: Solution | None, bounds: Mapping[str, Floats]) -> Floats:
        shape = (self._n,)
        if y_init is not None and warm is not None:
            raise InputError("y_init, warm: expected at most one of the two, but got both; leave one out.")
        domain = self.manifest.domain
        assert domain is not None
        centre = self._centre(B, domain.kind, bounds)
        if warm is not None:
            if not isinstance(warm, Solution):
                raise InputError(
                    f"warm: expected a Solution, but got {type(warm).__name__}; pass an array as y_init instead."
                )
            Y = batch(warm.y, "warm", self._dtype, shape, length=B)
            Y = np.where(np.isnan(Y), centre, Y)
            return np.clip(Y, bounds["lower"], bounds["upper"]) if bounds else Y
        if y_init is None:
            return centre
        start = batch(y_init, "y_init", self._dtype, shape, length=B)
        if not B:
            return start
        low, high = {"unit_box": (0.0, 1.0), "simplex": (0.0, 1.0), "space": (-np.inf, np.inf)}.get(
            domain.kind, (bounds.get("lower", 0.0), bounds.get("upper", 1.0))
        )
        # NaN is outside. Samples whose bounds leave nothing are told by their status.
        inside = np.isfinite(start) & (start >= low) & (start <= high)
        if bounds:
            inside |= ~(bounds["lower"] <= bounds["upper"])
        if not inside.all():
            sample, entry = np.argwhere(~inside)[0]
            where = "finite numbers" if domain.kind == "space" else "numbers within the bounds"
            where = "numbers in [0, 1]" if domain.kind in ("unit_box", "simplex") else where
            raise InputError(
                f"y_init: expected {where}, but sample {sample} holds {start[sample, entry]}; "
                "clip it, or leave y_init out."
            )
        if domain.kind == "simplex":
            off = np.abs(start.astype(np.float64).sum(1) - 1.0)
            if not off.max() <= self._n * np.sqrt(np.finfo(self._dtype).eps):
                raise InputError(
                    f"y_init: expected rows of sum 1, but sample {int(off.argmax())} has {start[off.argmax()].sum()}; "
                    "divide each row by its sum, or leave y_init out."
                )
        return start

    def _centre(self, B: int, kind: str, bounds: Mapping[str, Floats]) -> Floats:
        if bounds:
            with np.errstate(invalid="ignore", over="ignore"):
                return np.asarray(bounds["lower"] + (bounds["upper"] - bounds["lower"]) / 2, self._dtype)
        at = {"unit_box": 0.5, "simplex": 1.0 / self._n, "space": 0.0}[kind]
        return np.full((B, self._n), at, self._dtype)


def _reopen(path: str, identity: str, options: dict[str, Any]) -> Session:
    """What a pickled session becomes."""
    # Wherever links lead to: the hash, which covers all files, says whether it is the same.
    package = Package.open(path, follow_links=True)
    if package.identity != identity:
        raise PackageError(
            f"{path}: expected the package of the session that was pickled, but this is another one, or it was changed "
            "since; pickle a session of this one, or put that one back."
        )
    return Session(package, **options)


def _no_value(manifest: Manifest) -> InputError:
    if manifest.kind == "qp":
        return InputError("value: the package holds a network of quadratic programs, no energy; use `solve_qp`.")
    return InputError(
        "value: the package holds the gradient of an energy alone; use `gradient`, or export the energy itself."
    )


class _Weights(Mapping[str, NDArray[Any]]):
    """One set of weights, read-only."""

    def __init__(self, weights: WeightSet) -> None:
        self._arrays = weights.arrays

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name].view()  # a view of what is read-only cannot be made writeable

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"<{len(self)} weights: {', '.join(map(named, self))}>"


def _demand(solution: Solution) -> None:
    failed = np.flatnonzero(~solution.ok)
    if not failed.size:
        return
    named = "; ".join(f"{Status(solution.status[i]).name}, {solution.advice(int(i))}" for i in failed[:NAMED])
    more = f"; and {failed.size - NAMED} more" if failed.size > NAMED else ""
    raise CertificateError(
        f"strict: {failed.size} of {len(solution)} samples did not converge: {named}{more}. "
        "Pass strict=False to get the solution with a status for every sample."
    )
