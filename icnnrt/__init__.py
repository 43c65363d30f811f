"""Input-convex networks at run time: energies, their argmin with a certificate, and gradients through it.

    session = icnnrt.load("model.icnn")
    solution = session.argmin(x)                    # y* for a batch, with status, gap and residual of every sample
    cotangents = session.vjp(solution, y_bar)       # gradients by the weights and by x, without torch
    report = icnnrt.FineTuner(session).step(x, y)   # adapt the weights on the device; the energy stays convex
    solution = icnnrt.qp(Q, p, G, h)                # quadratic programs, with solution.vjp(z_bar)

Needs numpy, safetensors and onnxruntime; the last only once a session is made.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icnnrt.errors import (
        CertificateError,
        ExportError,
        IcnnrtError,
        InputError,
        LimitError,
        MissingDependencyError,
        PackageError,
        ProviderError,
        SampleError,
    )
    from icnnrt.format.package import Package
    from icnnrt.limits import Limits
    from icnnrt.mathematics.qp_pattern import QPPattern
    from icnnrt.mathematics.status import Status
    from icnnrt.native_library import ops_library
    from icnnrt.serving.adjoint import Cotangents
    from icnnrt.serving.argmin import ArgminSolution
    from icnnrt.serving.energy_session import EnergySession
    from icnnrt.serving.load import load
    from icnnrt.serving.polyhedron import PolyhedronSolution
    from icnnrt.serving.qp_session import QPNetworkSolution, QPSession
    from icnnrt.serving.qp_solver import QPData, QPSolver
    from icnnrt.serving.quadratic_program import QPGradients, QPSolution, qp
    from icnnrt.serving.session import Session
    from icnnrt.serving.solution import Solution
    from icnnrt.tuning.finetune import FineTuner
    from icnnrt.tuning.reports import EpochReport, FitReport, StepReport

    __version__: str

__all__ = [
    "ArgminSolution",
    "CertificateError",
    "Cotangents",
    "EnergySession",
    "EpochReport",
    "ExportError",
    "FineTuner",
    "FitReport",
    "IcnnrtError",
    "InputError",
    "LimitError",
    "Limits",
    "MissingDependencyError",
    "Package",
    "PackageError",
    "PolyhedronSolution",
    "ProviderError",
    "QPData",
    "QPGradients",
    "QPNetworkSolution",
    "QPPattern",
    "QPSession",
    "QPSolution",
    "QPSolver",
    "SampleError",
    "Session",
    "Solution",
    "Status",
    "StepReport",
    "__version__",
    "load",
    "ops_library",
    "qp",
]

# Imported when first used, so that `import icnnrt` (and with it the command line) takes no time.
_HOMES = {
    "errors": "CertificateError ExportError IcnnrtError InputError LimitError MissingDependencyError PackageError "
    "ProviderError SampleError",
    "format.package": "Package",
    "limits": "Limits",
    "mathematics.qp_pattern": "QPPattern",
    "mathematics.status": "Status",
    "native_library": "ops_library",
    "serving.adjoint": "Cotangents",
    "serving.argmin": "ArgminSolution",
    "serving.energy_session": "EnergySession",
    "serving.load": "load",
    "serving.polyhedron": "PolyhedronSolution",
    "serving.qp_session": "QPNetworkSolution QPSession",
    "serving.qp_solver": "QPData QPSolver",
    "serving.quadratic_program": "QPGradients QPSolution qp",
    "serving.session": "Session",
    "serving.solution": "Solution",
    "tuning.finetune": "FineTuner",
    "tuning.reports": "EpochReport FitReport StepReport",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            value: Any = metadata.version("icnnrt")
        except metadata.PackageNotFoundError:  # run from a source tree that was never installed
            value = "0+unknown"
    elif name in _HOME:
        value = getattr(importlib.import_module(f"icnnrt.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'icnnrt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
