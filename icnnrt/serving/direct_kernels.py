"""One quadratic program solved, or differentiated, by the native library itself.

A call of a session of onnxruntime takes five to ten microseconds whatever runs in it, which is several times what a
program of ten variables takes. So where there is one program, on arrays that stay where they are, the library is called
without it. The kernels, and with them every bit of the answers, are those of the operators;
native/library/quadratic_program.cpp has the same structs.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.errors import MissingDependencyError
from icnnrt.mathematics.interior_point import STEPS
from icnnrt.native_library import ops_library

__all__ = ["Bound", "adjoint_call", "solve_call"]

Arrays = Mapping[str, NDArray[Any]]
Bound = tuple[Callable[..., None], list[Any]]  # the call, and what it works on, which has to last as long
ALIGNMENT: Final = 64  # of the workspace; native/core/kernels.h has the same

_SIZES: Final = [(name, ctypes.c_size_t) for name in ("itemsize", "n", "m", "q")]


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class _SolveCall(ctypes.Structure):
    _fields_ = (
        *_SIZES,
        ("most_steps", ctypes.c_size_t),
        *((name, ctypes.c_double) for name in ("tolerance", "seconds")),
        *_pointers("Q p G h_lower h A b lower upper start"),
        *_pointers("z lam nu mu slack box_slack residual status ray steps workspace"),
    )


class _AdjointCall(ctypes.Structure):
    _fields_ = (
        *_SIZES,
        *_pointers("Q G A lam mu slack box_slack status z_bar lam_bar nu_bar mu_bar"),
        *_pointers("d_z d_lam d_nu d_mu share weak workspace"),
    )


def solve_call(inputs: Arrays, outputs: Arrays) -> Bound | None:
    """A call of QuadraticProgram's kernel on these arrays of a batch of one, by the operator's names.

    Inputs that are absent are not among them, and settings are read now. Where there is a `start`, every call writes
    into it what z, lam, nu and mu hold, and starts from that. None where the sizes are too large to count.
    """
    return _bound("icnnrt_qp_solve", _SolveCall(most_steps=STEPS), inputs, outputs)


def adjoint_call(inputs: Arrays, outputs: Arrays) -> Bound | None:
    """The same of QPSensitivity's kernel."""
    return _bound("icnnrt_qp_adjoint", _AdjointCall(), inputs, outputs)


@functools.cache
def _library() -> ctypes.CDLL:
    path = ops_library()
    library = ctypes.CDLL(path)
    try:
        library.icnnrt_qp_workspace_bytes.argtypes = (ctypes.c_size_t,) * 3
        library.icnnrt_qp_workspace_bytes.restype = ctypes.c_size_t
        for function in (library.icnnrt_qp_solve, library.icnnrt_qp_adjoint):
            function.argtypes, function.restype = (ctypes.c_void_p,), None
    except AttributeError as error:
        raise MissingDependencyError(
            f"native: {path} is of another version of icnnrt ({error}); install icnnrt anew, or pass native=False."
        ) from error
    return library


def _bound(name: str, call: Any, inputs: Arrays, outputs: Arrays) -> Bound | None:
    library = _library()
    _, n, _ = inputs["Q"].shape
    call.itemsize, call.n, call.m, call.q = inputs["Q"].itemsize, n, inputs["G"].shape[1], inputs["A"].shape[1]
    size = library.icnnrt_qp_workspace_bytes(call.n, call.m, call.q)
    if size == 0:
        return None
    workspace = np.empty(size + ALIGNMENT, np.uint8)
    call.workspace = -(-workspace.ctypes.data // ALIGNMENT) * ALIGNMENT
    for field, array in {**inputs, **outputs}.items():
        setattr(call, field, array.ctypes.data if array.ndim else array.item())
    return functools.partial(getattr(library, name), ctypes.addressof(call)), [call, workspace, inputs, outputs]
