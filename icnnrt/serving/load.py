"""Opening a package: the one way to a session."""

import os
from collections.abc import Sequence
from typing import TypeAlias

from icnnrt.format.package import Package
from icnnrt.limits import Limits
from icnnrt.ort import Provider
from icnnrt.serving.energy_session import EnergySession
from icnnrt.serving.qp_session import QPSession

AnySession: TypeAlias = EnergySession | QPSession


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
) -> AnySession:
    """Open the package at `path`, check it, and return a session that serves it: an `EnergySession`, or of a package of
    kind "qp" a `QPSession`.

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
    strict:     let `argmin` or `solve_qp` raise when any sample did not converge, unless it is told otherwise
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
    kind = QPSession if package.manifest.kind == "qp" else EnergySession
    return kind(
        package, providers=providers, threads=threads, native=native, strict=strict, memory=memory, limits=limits
    )
