"""The data of quadratic programs and polyhedra as tensors: checked, and with a leading axis, of B or 1."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from icnnrt.arguments import refused, shown
from icnnrt.mathematics.qp_data import NUMBERS, SHAPES, Sizes, check_shapes

__all__ = ["filled", "leading", "owned"]


def leading(
    given: Mapping[str, Any], like: Tensor, owner: str, *, exact: bool, n: int | None = None, B: Any = None
) -> tuple[dict[str, Tensor], Sizes]:
    """Every datum in `given` as `icnnrt.mathematics.qp_data` has them, absent ones without rows or columns.

    Bounds may be one number. All are floats on the device of `like`, the argument `owner`; with `exact` of its dtype
    too. n and B where they are known otherwise. h is infinite where G has h_lower alone. Raises `InputError`.
    """
    tensors = {name: _tensor(name, value, like, owner, exact) for name, value in given.items()}
    sizes = check_shapes({name: None if a is None else _shape(a) for name, a in tensors.items()}, n, B)

    def whole(name: str, a: Tensor | None) -> Tensor:
        rank, wanted = len(SHAPES[name]), [getattr(sizes, letter) for letter in SHAPES[name]]
        if a is None:
            if name == "h":
                return like.new_full((1, sizes.m), torch.inf)
            return like.new_zeros((1, 0, *wanted[1:]))
        if a.dim() < rank:  # one number
            return a.expand(1, *wanted)
        return a.unsqueeze(0) if a.dim() == rank else a

    return {name: whole(name, a) for name, a in tensors.items()}, sizes


def filled(bound: Tensor, like: Tensor, none: float) -> Tensor:
    """The bound, or that number in the rows of `like` where there is no bound."""
    return bound if bound.shape[1] == like.shape[1] else torch.full_like(like, none)


def owned(a: Tensor, dtype: torch.dtype) -> Tensor:
    """In memory of its own, as an operator of torch gives it."""
    return a.to(dtype).clone(memory_format=torch.contiguous_format)


def _tensor(name: str, value: Any, like: Tensor, owner: str, exact: bool) -> Tensor | None:
    if value is None:
        return None
    vector = name in NUMBERS
    made = f"pass torch.as_tensor({name}, dtype={like.dtype}, device={owner}.device)"
    if vector and isinstance(value, int | float) and not isinstance(value, bool):
        return like.new_full((), float(value))
    if not isinstance(value, Tensor):
        raise refused(name, f"a tensor{', or one number' * vector}", shown(value), made)
    if value.device != like.device or not value.is_floating_point() or (exact and value.dtype != like.dtype):
        wanted = f"{like.dtype if exact else 'floats'} on {like.device}, as {owner} is"
        raise refused(
            name, wanted, f"{value.dtype} on {value.device}", f"convert it with .to({owner})" if exact else made
        )
    return value


def _shape(a: Tensor) -> tuple[Any, ...]:
    # In a trace of torch.jit sizes are tensors; of those of the data, the trace holds the numbers.
    return tuple(map(int, a.shape)) if torch.jit.is_tracing() else tuple(a.shape)
