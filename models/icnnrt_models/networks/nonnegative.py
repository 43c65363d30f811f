"""A linear map with non-negative weights, W >= 0, the part of an ICNN that carries convexity from layer to layer."""

from typing import Final, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from icnnrt.arguments import choice, integer
from icnnrt_models.networks.activations import SOFTPLUS_THRESHOLD

Positivity = Literal["projection", "softplus"]


class NonNegativeLinear(nn.Module):
    """z -> W z with W >= 0 of shape [out_features, in_features], and no bias.

    positivity="projection": the parameter `weight` is W itself, and `project_()` clamps it at zero after each
    optimiser step, as in the paper.
    positivity="softplus": the parameter `raw_weight` is free and W = softplus(raw_weight) > 0, so any optimiser keeps
    W positive, at the price that W cannot reach zero.

    The weights come uninitialised: call `set_weight_`.
    """

    threshold: Final[float] = SOFTPLUS_THRESHOLD  # TorchScript reads final attributes, not the globals of a module

    def __init__(
        self,
        in_features: int,
        out_features: int,
        positivity: Positivity = "projection",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = integer(in_features, "in_features", 1)
        self.out_features = integer(out_features, "out_features", 1)
        self.positivity = check_positivity(positivity)
        free = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        # Both attributes always exist, the unused one as None: TorchScript resolves the branch in forward by it.
        self.weight: nn.Parameter | None
        self.raw_weight: nn.Parameter | None
        self.register_parameter("weight", free if positivity == "projection" else None)
        self.register_parameter("raw_weight", free if positivity == "softplus" else None)

    def nonnegative_weight(self) -> Tensor:
        """W, as the forward pass uses it."""
        if self.weight is not None:
            return self.weight
        assert self.raw_weight is not None
        return F.softplus(self.raw_weight, threshold=self.threshold)

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.nonnegative_weight())

    @torch.no_grad()
    def set_weight_(self, weight: Float[Tensor, "out_features in_features"]) -> None:
        """Give W these values, all >= 0."""
        if self.weight is not None:
            self.weight.copy_(weight)
        elif self.raw_weight is not None:
            self.raw_weight.copy_(inverse_softplus(weight))

    @torch.no_grad()
    def project_(self) -> None:
        """weight <- max(weight, 0); nothing to do under softplus."""
        if self.weight is not None:
            self.weight.clamp_(min=0)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, positivity={self.positivity!r}"


def inverse_softplus(w: Tensor) -> Tensor:
    """The r with softplus(r) = w, for w > 0.

    r = log(exp(w) − 1) = w + log(1 − exp(−w)). The second form neither overflows for large w nor, through expm1,
    cancels for small w. Zero has no inverse and becomes the smallest normal number.
    """
    w = w.clamp(min=torch.finfo(w.dtype).tiny)
    return w + torch.log(-torch.expm1(-w))


def check_positivity(positivity: object) -> Positivity:
    """Refuse anything but the two parametrisations."""
    remedy = (
        "choose 'projection' to clamp with project_() after each step as in the paper, 'softplus' for weights that are "
        "positive by construction"
    )
    return cast(Positivity, choice(positivity, "positivity", get_args(Positivity), remedy))
