"""A package in use: energies, their argmin with a certificate on every sample, and gradients through it."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from icnnrt import adjoint as _adjoint
from icnnrt import certificate
from icnnrt._arguments import batch, finite_rows
from icnnrt._runner import SIGNATURES, Provider, Runner, arrays_of
from icnnrt.certificate import Tolerances
from icnnrt.errors import CertificateError, InputError
from icnnrt.manifest import Manifest
from icnnrt.package import Package
from icnnrt.solution import Cotangents, Solution
from icnnrt.status import Status

Floats = NDArray[Any]  # float32 or float64: the package's dtype
NAMED: Final = 3  # how many samples an error names


def load(
    path: str | os.PathLike[str] | Package,
    *,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    native: bool | None = None,
    strict: bool = False,
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

    A graph is handed to onnxruntime when it is first used, so this is fast and the first call of each method slow.

    Raises `PackageError` for a damaged package, `ProviderError` for a missing provider, `MissingDependencyError`
    without onnxruntime or the kernels that were demanded, `InputError` for other arguments.
    """
    package = path if isinstance(path, Package) else Package.open(path)
    return Session(package, providers=providers, threads=threads, native=native, strict=strict)


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
    ) -> None:
        self._package = package
        self._runner = Runner(package, providers, threads, native)
        self._strict = strict
        manifest = package.manifest
        self._dtype = np.dtype(manifest.dtype)
        self._x_shape, (self._n,), self._K = manifest.x_shape, manifest.y_shape, manifest.solver.iterations
        self._tolerances = Tolerances(manifest.solver.gap_tolerance, manifest.solver.residual_tolerance)
        self._weights = _Weights(self._runner)

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
        """name -> the weight as it is now: a read-only copy at every access."""
        return self._weights

    @property
    def weights_id(self) -> str:
        """Changes whenever the weights do; a `Solution` bears the one it was computed with."""
        return self._runner.weights_id

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"<Session of {m.name}: x {list(m.x_shape)}, y {list(m.y_shape)}, {m.dtype}, {', '.join(self.providers)}"
            f"{', native' if self.native else ''}>"
        )

    # --- What it does ----------------------------------------------------------------------------

    def value_and_gradient(self, x: object, y: object) -> tuple[Floats, Floats]:
        """f(x, y) and ∇_y f(x, y) for a batch: ([B], [B, n]) in the package's dtype.

        x [B, *x_shape] and y [B, n] are arrays or nested lists of numbers; y may lie anywhere, not only in the box.
        Floats of another width are converted; integers and booleans must convert exactly. A sample with NaN or
        infinity in x or y gets NaN and leaves the others as they are.

        Raises `InputError` for a wrong shape or dtype.
        """
        X = batch(x, "x", self._dtype, self._x_shape)
        Y = batch(y, "y", self._dtype, (self._n,), length=len(X))
        self._runner.check_open()
        finite = finite_rows(X) & finite_rows(Y)
        every = bool(finite.all())
        if every and len(X):
            out, _ = self._runner.run("value", {"x": X, "y": Y})
            return out["f"], out["gradient"]
        f = np.full(len(X), np.nan, self._dtype)
        gradient = np.full((len(X), self._n), np.nan, self._dtype)
        if finite.any():
            out, _ = self._runner.run("value", {"x": X[finite], "y": Y[finite]})
            f[finite], gradient[finite] = out["f"], out["gradient"]
        return f, gradient

    def argmin(
        self, x: object, *, y_init: object = None, warm: Solution | None = None, strict: bool | None = None
    ) -> Solution:
        """Solve y* = argmin over y in [0,1]^n of f(x, y) − H(y) for a batch of contexts x [B, *x_shape].

        x:       array or nested lists of numbers, converted to the package's dtype as `value_and_gradient` does
        y_init:  where the solver starts, [B, n] within [0, 1]; ½ by default
        warm:    a solution of B earlier samples (of any weights): its y is where the solver starts, ½ where it is NaN.
                 K cuts are made all the same, so a good start makes the answer better, not faster
        strict:  raise `CertificateError` if any sample did not converge; by default what `load` was told

        Returns a `Solution` of B samples, each with status, gap and residual. A batch of none is fine. A sample with
        NaN or infinity in x is not run and has status NOT_FINITE_INPUT; the others' answers do not depend on it, up to
        the rounding that another batch size brings.

        Raises `InputError` for a wrong shape, dtype or range.
        """
        started = time.perf_counter()
        X = batch(x, "x", self._dtype, self._x_shape)
        B = len(X)
        start = self._start(B, y_init, warm)
        self._runner.check_open()
        finite = finite_rows(X)
        if B and finite.all():
            out, weights_id = self._runner.run("argmin", {"x": X, "y_init": start})
        else:
            out, weights_id = self._nothing(B), self._runner.weights_id
            if finite.any():
                some, weights_id = self._runner.run("argmin", {"x": X[finite], "y_init": start[finite]})
                for name, array in some.items():
                    out[name][finite] = array
        status = certificate.status_of(
            finite,
            out["y"],
            out["energy"],
            out["lower_bound"],
            out["gap"],
            out["residual"],
            self._tolerances,
            rounding=certificate.rounding(out["energy"], out["slopes"], out["offsets"]),
            violation=certificate.convexity_violation(out["slopes"], out["offsets"], out["cut_points"]),
        )
        info = {
            "providers": self.providers,
            "native": bool(finite.any()) and self._runner.ran_native("argmin"),
            "iterations": self._K,
            "steps": self.manifest.solver.steps,
            "gap_tolerance": self._tolerances.gap,
            "residual_tolerance": self._tolerances.residual,
            "seconds": time.perf_counter() - started,
        }
        solution = Solution(x=X, **out, status=status, info=info, weights_id=weights_id)
        if self._strict if strict is None else strict:
            _demand(solution)
        return solution

    def vjp(self, solution: Solution, y_bar: object, *, adjoint: str = "exact", on_unsafe: str = "raise") -> Cotangents:
        """θ̄ and x̄ of a loss on y* with ȳ = ∂ℓ/∂y*, [B, n]: the vector-Jacobian product of `argmin`.

        solution:   what `argmin` of this session returned, or of another session with the same package and weights
        y_bar:      array or nested lists of finite numbers, converted as `argmin` converts x
        adjoint:    "exact" (the derivative of the K-step algorithm) or "prop3" (the paper's, cheaper, right for
                    piecewise-linear energies); `icnnrt.adjoint` explains both
        on_unsafe:  "raise", or "skip" to leave samples without a trustworthy gradient out of the sum. Those are
                    samples with status SOLVER, NOT_CONVEX or NOT_FINITE*, and for "exact" also those where any model
                    on the way missed the residual tolerance. GAP is safe: the gradient is that of the algorithm

        Returns `Cotangents`: weights {name: θ̄} for every trainable weight, summed over the batch (not averaged), and
        x [B, *x_shape]. Skipped samples have x̄ = NaN and may have any ȳ, NaN too. If all are skipped, θ̄ is zero.

        Raises `CertificateError` naming unsafe samples, `InputError` for a solution of other weights or a y_bar of the
        wrong shape or dtype.
        """
        self._runner.check_open()
        if isinstance(solution, Solution):
            self._runner.check_weights(solution.weights_id)

        def run(feeds: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
            return self._runner.run("adjoint", feeds, made_with=solution.weights_id)[0]

        return _adjoint.vjp(run, self.manifest, solution, y_bar, adjoint=adjoint, on_unsafe=on_unsafe)

    def close(self) -> None:
        """Free the sessions. Calls under way in other threads end well; later ones raise `IcnnrtError`."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- How -------------------------------------------------------------------------------------

    def _update_weights(self, new: Mapping[str, NDArray[Any]]) -> None:
        """Write new weights in place, for every graph at once; solutions from before become stale.

        Shapes and dtypes are checked, signs are not: keeping the energy convex is the caller's.
        """
        self._runner.update_weights(new)

    def _start(self, B: int, y_init: object, warm: Solution | None) -> Floats:
        shape = (self._n,)
        if y_init is not None and warm is not None:
            raise InputError("y_init, warm: expected at most one of the two, but got both; leave one out.")
        if warm is not None:
            if not isinstance(warm, Solution):
                raise InputError(
                    f"warm: expected a Solution, but got {type(warm).__name__}; pass an array as y_init instead."
                )
            Y = batch(warm.y, "warm", self._dtype, shape, length=B)
            np.nan_to_num(Y, copy=False, nan=0.5)
            return Y
        if y_init is None:
            return np.full((B, self._n), 0.5, self._dtype)
        Y = batch(y_init, "y_init", self._dtype, shape, length=B)
        inside = (Y >= 0) & (Y <= 1)  # NaN is outside
        if not inside.all():
            sample, entry = np.argwhere(~inside)[0]
            raise InputError(
                f"y_init: expected numbers in [0, 1], but sample {sample} holds {Y[sample, entry]}; "
                "clip it, or leave y_init out."
            )
        return Y

    def _nothing(self, B: int) -> dict[str, NDArray[Any]]:
        """The outputs of argmin.onnx for B samples, all NaN."""
        arrays = arrays_of(self.manifest)
        nothing = {}
        for name in SIGNATURES["argmin"][1]:
            dtype, (_, *shape) = arrays[name]
            nothing[name] = np.full((B, *map(int, shape)), math.nan, dtype)
        return nothing


class _Weights(Mapping[str, NDArray[Any]]):
    """The weights of a session as a read-only mapping of copies."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._runner.read_weights(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._runner.weights)

    def __len__(self) -> int:
        return len(self._runner.weights)

    def __repr__(self) -> str:
        return f"<{len(self)} weights: {', '.join(self)}>"


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
