"""One operator of ai.icnnrt as a session of onnxruntime's: the graphs of one node each in icnnrt/graphs."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from icnnrt import native_library
from icnnrt.arguments import flag
from icnnrt.errors import IcnnrtError, LimitError, MissingDependencyError
from icnnrt.format import wire
from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.ort import checked_providers, checked_threads, native_operators, onnxruntime, open_session, session_options
from icnnrt.serving.once import Once

__all__ = ["OPERATORS", "operator_session", "stopped_after"]

T = TypeVar("T")

GRAPHS: Final = Path(__file__).parents[1] / "graphs"
# What the files are called -> the operator in it. Those of the bundle method hold no bodies: kernels alone run them.
OPERATORS: Final = {
    "qp_solve": "QuadraticProgram",
    "qp_adjoint": "QPAdjoint",
    "qp_sensitivity": "QPSensitivity",
    "sparse_qp_solve": "SparseQuadraticProgram",
    "sparse_qp_sensitivity": "SparseQPSensitivity",
    "bundle_entropy_solve": "BundleEntropySolve",
    "bundle_entropy_adjoint": "BundleEntropyAdjoint",
    "bundle_simplex_solve": "BundleSimplexSolve",
    "bundle_simplex_adjoint": "BundleSimplexAdjoint",
    "bundle_quadratic_solve": "BundleQuadraticSolve",
    "bundle_quadratic_adjoint": "BundleQuadraticAdjoint",
}

MOST_SECONDS: Final = min(1e9, threading.TIMEOUT_MAX)  # of a timer, which knows no greater number; nobody waits for it

sessions: Once[tuple[Any, bool]] = Once()


def operator_session(
    role: str, dtype: str, native: Any = None, providers: Any = None, threads: Any = None
) -> tuple[Any, bool]:
    """The session of one operator, made once, and whether its native kernel runs in it.

    role is one of `OPERATORS`, dtype "float32" or "float64" ("float64" alone for the bundle method's); native,
    providers and threads are as `icnnrt.load` takes them. Raises `MissingDependencyError` where a kernel is needed and
    there is none, and what `icnnrt.load` raises.
    """
    # Before the look-up, where True would be found as 1, and where a list cannot be looked up at all.
    threads, native = checked_threads(threads), None if native is None else flag(native, "native")
    key = (role, dtype, native, threads, None if providers is None else repr(providers))
    return sessions.find(key) or sessions.get(key, lambda: _make(role, dtype, native, providers, threads))


def _make(role: str, dtype: str, native: Any, providers: Any, threads: Any) -> tuple[Any, bool]:
    ort = onnxruntime()
    wanted = checked_providers(ort, providers)
    operator = OPERATORS[role]
    has_kernel = operator in native_operators(ort, native)
    file = f"{role}_{dtype}.onnx"
    data = (GRAPHS / file).read_bytes()
    bodies = frozenset(name for domain, name in wire.survey(data, file).functions if domain == OP_DOMAIN)
    if not has_kernel and (native or not bodies):
        raise MissingDependencyError(
            f"native: the native library of this icnnrt has no kernel for {operator}; install icnnrt anew"
            f"{', or pass native=False' if bodies else ''}."
        )
    options = session_options(ort, threads)
    if has_kernel:
        native_library.register(options)
        # Without the bodies a session that can be made at all runs the kernels.
        data = wire.without_functions(data, OP_DOMAIN, bodies, file)

    def refused(why: str) -> IcnnrtError:
        return IcnnrtError(
            f"{file}: onnxruntime cannot load it ({why}); upgrade onnxruntime{' or try native=False' * has_kernel}."
        )

    session = open_session(ort, data, options, wanted, file, refused)
    return session, has_kernel


def stopped_after(seconds: float, run: Callable[[Any], T]) -> T:
    """run(RunOptions), for graphs that know no clock: onnxruntime stops between two nodes, which is a `LimitError`."""
    options = onnxruntime().RunOptions()
    timer = threading.Timer(min(seconds, MOST_SECONDS), setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        return run(options)
    except Exception as error:
        if not options.terminate:
            raise
        raise LimitError(
            f"seconds: the portable operators were stopped after {seconds:g} s, with no answer for any sample; give "
            "more, smaller batches, or native operators, which end each sample where it stands."
        ) from error
    finally:
        timer.cancel()
