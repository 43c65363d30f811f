"""What an energy f(x, y; θ) -> [B] promises, and the checks its inputs pass through."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["ContextEnergy", "Energy"]


@runtime_checkable
class Energy(Protocol):
    """A batch of scalar functions, convex in the decision variable y for every context x."""

    x_dim: int
    y_dim: int

    def forward(self, x: Float[Tensor, "batch x_dim"], y: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """f(x, y), one number per row."""
        ...

    def project_(self) -> None:
        """Clamp the weights of `nonnegative_weights()` at zero, in place and unseen by autograd.

        Call it after every optimiser step. It does nothing where positivity is built into the parametrisation.
        """
        ...

    def nonnegative_weights(self) -> tuple[str, ...]:
        """The `state_dict` names whose entries must stay >= 0 for f to be convex in y; empty if none need watching."""
        ...


@runtime_checkable
class ContextEnergy(Energy, Protocol):
    """An energy whose x path can be computed once and reused for every y of an argmin.

    On every input `forward(x, y) == value(context(x), y)`.
    """

    def context(self, x: Float[Tensor, "batch x_dim"]) -> tuple[Tensor, ...]:
        """Everything that depends on x alone, as a flat tuple of tensors with leading dimension `batch`."""
        ...

    def value(self, context: tuple[Tensor, ...], y: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """f(x, y) from `context(x)`."""
        ...


def check_input(name: str, tensor: Tensor, width: int, like: Tensor) -> None:
    """Refuse an input that is not [batch, width] in the dtype of the parameter `like`.

    Only static sizes are looked at: a comparison of batch sizes would specialise the batch of an exported graph.
    """
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        # In a trace sizes are traced values, and a branch on one would be recorded as a constant.
        return
    if tensor.dim() != 2 or tensor.shape[1] != width:
        remedy = "add the batch dimension with .unsqueeze(0)" if tensor.dim() == 1 else "pass one row per sample"
        raise ValueError(f"{name} must have shape [batch, {width}], got {list(tensor.shape)}: {remedy}.")
    if tensor.dtype != like.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise ValueError(
            f"{name} must have the dtype of the weights, {like.dtype}, got {tensor.dtype}: "
            f"convert {name} with .to({like.dtype}), or build the energy with dtype={tensor.dtype}."
        )


def check_context(context: tuple[Tensor, ...], length: int) -> None:
    """Refuse a context that another energy made."""
    if len(context) != length:
        raise ValueError(
            f"context must hold the {length} tensors that context(x) of this energy returns, got {len(context)}: "
            "pass the result of context(x) unchanged."
        )


def check_size(name: str, size: int, at_least: int, remedy: str) -> None:
    """Refuse a dimension that is not an integer >= at_least."""
    if not isinstance(size, int) or isinstance(size, bool) or size < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {size!r}: {remedy}.")


def check_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    """The layer widths as a tuple, each an integer >= 1."""
    if isinstance(widths, (int, str)):
        raise ValueError(f"{name} must be a sequence of layer widths, got {widths!r}: write {name}=({widths},).")
    for i, width in enumerate(widths):
        check_size(f"{name}[{i}]", width, 1, "give every hidden layer at least one unit")
    return tuple(widths)
