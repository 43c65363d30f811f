"""The native kernels behind torch's layers, and when they may answer in the place of torch.

One rule: where a layer runs eagerly on the CPU, its problems are solved by the operators of ai.icnnrt, as in a package.
Where torch traces, exports, compiles or transforms it, off the CPU, and where there is no native library, the same
method runs in torch.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from icnnrt.errors import IcnnrtError
from icnnrt.serving.operators import operator_session

__all__ = ["Kernel", "eager_on_cpu", "kernel"]

Kernel = Callable[..., tuple[Tensor, ...]]  # tensors on the CPU, inputs to outputs in the operator's order


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
    """The operator of this name in `icnnrt.serving.operators`, for tensors of this dtype; None without a kernel.

    Their memory is read without a copy, if it is contiguous.
    """
    try:
        session, native = operator_session(role, dtype)
    except IcnnrtError:
        return None
    if not native:
        return None
    names = [node.name for node in session.get_inputs()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        session, _ = operator_session(role, dtype)  # asked for each time, as a forked child has another one
        arrays = [np.ascontiguousarray(t.detach().resolve_neg().numpy()) for t in tensors]
        return tuple(map(torch.from_numpy, session.run(None, dict(zip(names, arrays, strict=True)))))

    return run
