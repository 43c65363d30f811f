"""The fully input convex network of Amos, Xu, Kolter, "Input Convex Neural Networks" (ICML 2017), equation 2."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from icnnrt.arguments import integer
from icnnrt_models.networks.activations import ConvexActivation
from icnnrt_models.networks.convex_network import ConvexNetwork, check_context, check_input, check_place, draw_z_path
from icnnrt_models.networks.initialisation import draw_skip, gaussian_moments
from icnnrt_models.networks.nonnegative import NonNegativeLinear, Positivity


class FICNNLayer(nn.Module):
    """The parameters of one line of equation 2: W^(x), W^(y), b, and from the second layer on W^(z)."""

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        z_dim: int,
        out: int,
        positivity: Positivity,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

        # Without a context there is no W^(x) at all: matrices of zero columns survive torch but few exporters.
        self.W_x: nn.Parameter | None
        self.register_parameter("W_x", empty(out, x_dim) if x_dim else None)
        self.W_y = empty(out, y_dim)
        self.b = empty(out)
        # z_0 = 0, so the first layer needs no W^(z).
        self.W_z = NonNegativeLinear(z_dim, out, positivity, dtype=dtype, device=device) if z_dim else None

    def context(self, x: Float[Tensor, "batch x_dim"]) -> Float[Tensor, "batch out"]:
        """W^(x) x + b."""
        if self.W_x is None:
            return self.b.expand(x.shape[0], -1)
        return F.linear(x, self.W_x, self.b)


class FICNN(ConvexNetwork):
    """An energy jointly convex in its whole input (x, y).

    Equation 2, on the concatenated input (x, y), i = 0..k−1 with k = len(hidden) + 1:

        z_{i+1} = g_i(W_i^(z) z_i + W_i^(x) x + W_i^(y) y + b_i),   f(x, y; θ) = z_k,   z_0 = 0,   W^(z) >= 0

    with g_i convex and non-decreasing, g_{k−1} the identity. Keeping W^(x) and W^(y) apart changes nothing in the
    function and lets `context` compute W_i^(x) x + b_i once for a whole argmin over y.

    Args:
        x_dim: columns of x; 0 for an energy of y alone, x is then [batch, 0].
        y_dim: columns of y.
        hidden: widths of z_1 .. z_{k−1}.
        activation: "relu", "softplus", "leaky_relu", "celu", or a `ConvexActivation`.
        positivity: how W^(z) >= 0 is kept, see `NonNegativeLinear`.
        generator: source of the initial values (see `initialisation`; x and y are taken to have mean square 1). The
            same seed gives the same network in every dtype and on every device.
        dtype, device: of all parameters.

    Raises:
        InputError: a sentence with the argument, what was expected, what came, and the remedy.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: Sequence[int] = (200, 200),
        activation: str | ConvexActivation = "softplus",
        positivity: Positivity = "projection",
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        remedy = "give the number of columns of x, 0 for none"
        super().__init__(integer(x_dim, "x_dim", 0, remedy=remedy), y_dim, hidden, activation, positivity)
        check_place(dtype, device, generator)
        widths = (0, *self.hidden, 1)  # of z_0 .. z_k
        self.layers = nn.ModuleList(
            FICNNLayer(self.x_dim, self.y_dim, z_dim, out, self.positivity, dtype, device)
            for z_dim, out in pairwise(widths)
        )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters afresh, as `initialisation` describes."""
        moments = gaussian_moments(self.activation)
        for layer in self._layers():
            out = layer.b.shape[0]
            v = draw_z_path(layer.W_z, layer.b, moments, len(self.hidden), generator)
            skip = math.sqrt(v) * draw_skip((out, self.x_dim + self.y_dim), 1.0, generator)
            if layer.W_x is not None:
                layer.W_x.copy_(skip[:, : self.x_dim])
            layer.W_y.copy_(skip[:, self.x_dim :])

    def context(self, x: Float[Tensor, "batch x_dim"]) -> tuple[Tensor, ...]:
        """(W_0^(x) x + b_0, .., W_{k−1}^(x) x + b_{k−1}): k tensors."""
        layers = self._layers()
        check_input("x", x, self.x_dim, layers[0].b)
        return tuple(layer.context(x) for layer in layers)

    def value(self, context: tuple[Tensor, ...], y: Float[Tensor, "batch y_dim"]) -> Float[Tensor, " batch"]:
        """f(x, y) from context(x)."""
        layers = self._layers()
        check_input("y", y, self.y_dim, layers[0].b)
        check_context(context, len(layers))
        z = y  # stands for z_0 = 0, which no layer reads
        for i, (layer, bias) in enumerate(zip(layers, context, strict=True)):
            s = bias + F.linear(y, layer.W_y)
            if layer.W_z is not None:
                s = s + layer.W_z(z)
            z = self.activation(s) if i < len(layers) - 1 else s
        return z.squeeze(1)

    def _layers(self) -> list[FICNNLayer]:
        return [cast(FICNNLayer, layer) for layer in self.layers]
