"""What an energy f(x, y; θ) -> [B] promises."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


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
