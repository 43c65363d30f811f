"""Activations g that keep a network convex: each one convex and non-decreasing.

If g is convex and non-decreasing and s is convex in y, then g(s) is convex in y; a sum of such terms with
non-negative weights is convex again. This is the induction behind Amos, Xu, Kolter, "Input Convex Neural
Networks" (ICML 2017), proposition 1. Every kink lies at s = 0, which the quadrature of `initialisation` relies on.
"""

from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from icnnrt.arguments import choice, number

# Above it torch's softplus answers s itself. At torch's default, 20, that is a step down of 2e-9, which breaks
# convexity beyond rounding in float64; at 40 the step, 4e-18, is below rounding, and exp(40) is far from overflow in
# float32.
SOFTPLUS_THRESHOLD = 40.0


class ConvexActivation(nn.Module):
    """Base of the activations g: R -> R, applied entry by entry, that are convex and non-decreasing."""


class ReLU(ConvexActivation):
    """g(s) = max(s, 0): the larger of two non-decreasing affine functions, so convex and non-decreasing."""

    def forward(self, s: Tensor) -> Tensor:
        return F.relu(s)


class Softplus(ConvexActivation):
    """g(s) = log(1 + exp(s)): g' = σ(s) lies in (0, 1) and increases, so g is convex and non-decreasing."""

    threshold: Final[float] = SOFTPLUS_THRESHOLD  # TorchScript reads final attributes, not the globals of a module

    def forward(self, s: Tensor) -> Tensor:
        return F.softplus(s, threshold=self.threshold)


class LeakyReLU(ConvexActivation):
    """g(s) = max(s, slope·s), 0 <= slope < 1: the larger of two non-decreasing affine functions.

    A slope above 1 would make it the smaller of the two, which is concave; a negative one makes it decrease below 0.
    """

    def __init__(self, slope: float = 0.01) -> None:
        super().__init__()
        remedy = "beyond it leaky ReLU breaks convexity in y"
        self.slope = number(slope, "slope", least=0.0, below=1.0, remedy=remedy)

    def forward(self, s: Tensor) -> Tensor:
        return F.leaky_relu(s, self.slope)

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


class CELU(ConvexActivation):
    """g(s) = s for s > 0, alpha·(exp(s/alpha) − 1) below, alpha > 0.

    g'(s) = min(1, exp(s/alpha)) lies in (0, 1] and never decreases, so g is convex and non-decreasing for every
    alpha > 0. (ELU, whose slope jumps from alpha to 1 at zero, has that property for alpha <= 1 only.)
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = number(alpha, "alpha", above=0.0, remedy="g is undefined at 0 and not convex below it")

    def forward(self, s: Tensor) -> Tensor:
        return F.celu(s, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


_CONVEX: dict[str, type[ConvexActivation]] = {
    "relu": ReLU,
    "softplus": Softplus,
    "leaky_relu": LeakyReLU,
    "celu": CELU,
}
# On the x path g̃ is free: f need not be convex in x.
_CONTEXT: dict[str, type[nn.Module]] = {**_CONVEX, "tanh": nn.Tanh, "silu": nn.SiLU}


def convex_activation(activation: str | ConvexActivation) -> ConvexActivation:
    """The activation of the z path, by name or as an instance of this module's classes."""
    if isinstance(activation, ConvexActivation):
        return activation
    remedy = (
        "only convex, non-decreasing activations keep f convex in y, so subclass ConvexActivation to vouch for another"
    )
    return _CONVEX[choice(activation, "activation", tuple(_CONVEX), remedy, also="a ConvexActivation")]()


def free_activation(activation: str | nn.Module) -> nn.Module:
    """The activation of the x path, by name or as any parameter-free module that acts entry by entry."""
    if isinstance(activation, nn.Module):
        return activation
    remedy = "pass a module for any other activation"
    return _CONTEXT[choice(activation, "context_activation", tuple(_CONTEXT), remedy, also="a torch.nn.Module")]()
