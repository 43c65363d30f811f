"""A package in use, whatever it holds: what it is, its weights, its end; `energy_session` and `qp_session` answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import flag, instance, refused
from icnnrt.errors import InputError, PackageError
from icnnrt.format.manifest import Manifest
from icnnrt.format.package import Package
from icnnrt.limits import Limits, checked_limits
from icnnrt.ort import Provider
from icnnrt.printable import named
from icnnrt.serving.kept_convex import KnownConvexity
from icnnrt.serving.runner import Runner
from icnnrt.serving.solution import S, demand_converged


class Session:
    """Serves one package: `load` makes an `EnergySession` of an energy, a `QPSession` of a network of programs.

    Every method may be called from several threads at once; they run in parallel. Use it as a context manager, or call
    `close`, to free the memory at a given moment.
    """

    _KINDS: tuple[str, ...] = ()
    """Of packages that it serves."""

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
        if package.manifest.kind not in self._KINDS:
            kinds = " or ".join(map(repr, self._KINDS))
            came = f"one of kind {package.manifest.kind!r}"
            raise refused("package", f"one of kind {kinds}", came, "call icnnrt.load, which tells sessions apart")
        self._runner = Runner(package, providers, threads, native, memory, checked_limits(limits))
        self._memory = memory
        self._strict = flag(strict, "strict")
        self._dtype = np.dtype(package.manifest.dtype)
        self._convexity = KnownConvexity(self._runner)

    # --- What it is ------------------------------------------------------------------------------

    @property
    def package(self) -> Package:
        """The package, with the weights that it was opened with."""
        return self._runner.package

    @property
    def manifest(self) -> Manifest:
        """What the package says of itself."""
        return self._runner.package.manifest

    @property
    def path(self) -> Path:
        """The package folder, absolute."""
        return self._runner.package.path

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
    def limits(self) -> Limits | None:
        """What each call may take; None for as much as there is."""
        return self._runner.limits

    @property
    def options(self) -> Mapping[str, Any]:
        """What it was opened with, by the names of `load`'s arguments."""
        return {**self._runner.options, "strict": self._strict, "memory": self._memory, "limits": self.limits}

    @property
    def runner(self) -> Runner:
        """What runs the graphs and holds the weights: for icnnrt's own modules."""
        return self._runner

    @property
    def convexity(self) -> KnownConvexity:
        """What is known of f's convexity with the weights in use: for icnnrt's own modules."""
        return self._convexity

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"<{type(self).__name__} of {named(m.name)}: x {list(m.x_shape)}, y {list(m.y_shape)}, {m.dtype}, "
            f"{', '.join(self.providers)}{', native' if self.native else ''}>"
        )

    # --- Its weights -----------------------------------------------------------------------------

    @property
    def weights(self) -> Mapping[str, NDArray[Any]]:
        """name -> weight: the weights as they are now, all of one time, read-only; later updates do not reach them."""
        self._runner.check_open()
        return self._runner.weights.arrays

    @property
    def weights_id(self) -> str:
        """Changes whenever the weights do; a `Solution` bears the one it was computed with."""
        return self._runner.weights.id

    def update_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Put new values in the place of some weights, for every graph at once; solutions from before become stale.

        Shapes and dtypes are checked, signs are not: to keep the energy convex is the caller's, and what was proven of
        it is not known any more. `icnnrt.federated.set_weights` takes nothing but what keeps it so.

        Raises `InputError` for a weight that the package has not, of another shape or dtype, or that was exported as a
        constant; then none has changed.
        """
        instance(weights, "weights", Mapping, "arrays by name", "see `Session.weights`")
        self._convexity.forget()  # before they change, so that nothing proves these
        self._runner.update_weights(
            {name: np.array(a) if isinstance(a, np.ndarray) else a for name, a in weights.items()}
        )

    # --- Its end, and its pickles ----------------------------------------------------------------

    def close(self) -> None:
        """Free the sessions. Calls under way in other threads end well; later ones raise `IcnnrtError`."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        return _reopen, (type(self), str(self.path), self.package.identity, self.options)

    def _judged(self, solution: S, strict: bool | None) -> S:
        """The solution, unless all samples have to converge and some have not."""
        if self._strict if strict is None else flag(strict, "strict"):
            demand_converged(solution)
        return solution


def _reopen(kind: type[Session], path: str, identity: str, options: dict[str, Any]) -> Session:
    """What a pickled session becomes."""
    # Wherever links lead to: the hash, which covers all files, says whether it is the same.
    package = Package.open(path, follow_links=True)
    if package.identity != identity:
        raise PackageError(
            f"{path}: expected the package of the session that was pickled, but this is another one, or it was changed "
            "since; pickle a session of this one, or put that one back."
        )
    return kind(package, **options)
