"""The native kernels behind torch's layers, and when they may answer in the place of torch.

One rule: where a layer runs eagerly on the CPU, its problems are solved by the operators of ai.icnnrt, as in a package.
Off the CPU, and where there is no native library, the same method runs in torch. Where torch traces, exports, compiles
or transforms a layer over cuts (`eager_on_cpu` tells), it runs in torch too, which sees every step of it. Quadratic
programs are the exception: `qp_operators` hides them in an operator that torch does not look into, so that the kernel
answers under torch.compile and torch.func.vmap as well, and torch.export keeps the operator; torch.jit.trace alone
sees their method. `bundle_entropy.bundle_entropy_solve` and `bundle_entropy.kkt_adjoint` branch on `eager_on_cpu`,
`qp_operators.qp_solve` and `qp_operators.qp_sensitivity` on `qp_operators.kernels` for data on the CPU.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from icnnrt.errors import IcnnrtError
from icnnrt.mathematics.qp_names import SOLVE_INPUTS
from icnnrt.serving.operators import operator_session

# numpy arrays, inputs to outputs in the operator's order; and by their names, those that have a default
Kernel = Callable[..., Sequence[Any]]


def eager_on_cpu(*tensors: Tensor) -> bool:
    """Whether these are numbers on the CPU at this moment, and nothing watches what becomes of them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first, as Dynamo cannot follow the rest
        return False
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
        and _get_current_dispatch_mode() is None
    )


@functools.cache
def kernel(role: str, dtype: str) -> Kernel | None:
    """The operator of this name in `icnnrt.serving.operators`, for numpy arrays of this dtype; None without a kernel.

    Arrays pass through it without a copy, if they are contiguous.
    """
    try:
        session, native = operator_session(role, dtype)
    except IcnnrtError:
        return None
    if not native:
        return None
    # Some of those have a default, and are not listed then; a plan comes by its name.
    listed = [node.name for node in session.get_inputs() if node.name != "plan"]
    names = SOLVE_INPUTS if role.endswith("qp_solve") else listed

    def run(arrays: Sequence[Any], **settings: Any) -> Sequence[Any]:
        session, _ = operator_session(role, dtype)  # asked for each time, as a forked child has another one
        feeds = dict(zip(names, map(np.ascontiguousarray, arrays), strict=True))
        found: Sequence[Any] = session.run(None, feeds | settings)
        return found

    return run


def run_on(kernel: Kernel, tensors: Sequence[Tensor], settings: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
    """What a kernel makes of tensors on the CPU, which share their memory with the arrays that it sees."""
    found = kernel([t.detach().resolve_neg().numpy() for t in tensors], **(settings or {}))
    return tuple(map(torch.from_numpy, found))
