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
    from icnnrt.mathematics.status import Status
    from icnnrt.native_library import ops_library
    from icnnrt.serving.qp_solver import QPData, QPSolver
    from icnnrt.serving.quadratic_program import QPGradients, QPSolution, qp
    from icnnrt.serving.session import Session, load
    from icnnrt.serving.solution import Cotangents, Solution
    from icnnrt.tuning.finetune import EpochReport, FineTuner, FitReport, StepReport

    __version__: str

__all__ = [
    "CertificateError",
    "Cotangents",
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
    "ProviderError",
    "QPData",
    "QPGradients",
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
_HOME = {
    "Cotangents": "serving.solution",
    "EpochReport": "tuning.finetune",
    "FineTuner": "tuning.finetune",
    "FitReport": "tuning.finetune",
    "Limits": "limits",
    "Package": "format.package",
    "QPData": "serving.qp_solver",
    "QPGradients": "serving.quadratic_program",
    "QPSolution": "serving.quadratic_program",
    "QPSolver": "serving.qp_solver",
    "Session": "serving.session",
    "Solution": "serving.solution",
    "Status": "mathematics.status",
    "StepReport": "tuning.finetune",
    "load": "serving.session",
    "ops_library": "native_library",
    "qp": "serving.quadratic_program",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            value: Any = metadata.version("icnnrt")
        except metadata.PackageNotFoundError:  # run from a source tree that was never installed
            value = "0+unknown"
    elif name in __all__:
        value = getattr(importlib.import_module(f"icnnrt.{_HOME.get(name, 'errors')}"), name)
    else:
        raise AttributeError(f"module 'icnnrt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
