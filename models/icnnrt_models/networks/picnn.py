"""The partially input convex network of Amos, Xu, Kolter, "Input Convex Neural Networks" (ICML 2017), equation 3."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from icnnrt.arguments import flag, integer, refused
from icnnrt_models.networks.activations import ConvexActivation, free_activation
from icnnrt_models.networks.convex_network import (
    ConvexNetwork,
    check_context,
    check_input,
    check_place,
    check_widths,
    draw_z_path,
)
from icnnrt_models.networks.initialisation import draw_free, draw_skip, gaussian_moments
from icnnrt_models.networks.nonnegative import NonNegativeLinear, Positivity

# Initial variance of the gates around 1. Small, so that the first forward passes see the plain convex network for which
# the weights are drawn; not zero, so that x acts on the gates, and gradients reach the x path through them, at once.
GATE_VARIANCE = 0.01


class PICNNLayer(nn.Module):
    """The parameters of one line of equation 3, from (u_i, z_i, y) to z_{i+1}."""

    def __init__(
        self,
        u_dim: int,
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

        self.W_yu = empty(y_dim, u_dim)
        self.b_y = empty(y_dim)
        self.W_y = empty(out, y_dim)
        self.W_u = empty(out, u_dim)
        self.b = empty(out)
        # z_0 = 0, so the first layer needs no W^(z) and no gate for it.
        self.W_zu: nn.Parameter | None
        self.b_z: nn.Parameter | None
        self.register_parameter("W_zu", empty(z_dim, u_dim) if z_dim else None)
        self.register_parameter("b_z", empty(z_dim) if z_dim else None)
        self.W_z = NonNegativeLinear(z_dim, out, positivity, dtype=dtype, device=device) if z_dim else None

    def context(self, u: Float[Tensor, "batch u_dim"]) -> tuple[Tensor, ...]:
        """(W^(yu) u + b^(y), [W^(zu) u + b^(z)]_+, W^(u) u + b), without the middle one in the first layer."""
        gate_y = F.linear(u, self.W_yu, self.b_y)
        bias = F.linear(u, self.W_u, self.b)
        if self.W_zu is None:
            return gate_y, bias
        gate_z = F.relu(F.linear(u, self.W_zu, self.b_z))
        return gate_y, gate_z, bias


class ContextLayer(nn.Module):
    """u -> BatchNorm(g̃(W̃ u + b̃)), the batch norm only if asked for."""

    def __init__(
        self,
        in_dim: int,
        out: int,
        activation: nn.Module,
        batch_norm: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(out, in_dim, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.empty(out, dtype=dtype, device=device))
        self.activation = activation
        self.norm = nn.BatchNorm1d(out, dtype=dtype, device=device) if batch_norm else None

    def forward(self, u: Float[Tensor, "batch in_dim"]) -> Float[Tensor, "batch out"]:
        u = self.activation(F.linear(u, self.W, self.b))
        return u if self.norm is None else self.norm(u)


class PICNN(ConvexNetwork):
    """An energy convex in y, with any dependence on the context x.

    Equation 3, i = 0..k−1 with k = len(hidden) + 1:

        u_{i+1} = g̃_i(W̃_i u_i + b̃_i)
        z_{i+1} = g_i( W_i^(z) (z_i ∘ [W_i^(zu) u_i + b_i^(z)]_+)
                     + W_i^(y) (y ∘ (W_i^(yu) u_i + b_i^(y)))
                     + W_i^(u) u_i + b_i )
        f(x, y; θ) = z_k,   u_0 = x,   z_0 = 0,   W^(z) >= 0

    with g_i convex and non-decreasing, g_{k−1} the identity, g̃_i free.

    Args:
        x_dim: columns of x, at least 1.
        context_hidden: widths of u_1 .. u_{k−1}, as many as `hidden`; None takes `hidden`.
        context_activation: g̃, also "tanh", "silu", or any parameter-free module that acts entry by entry.
        batch_norm: normalise u_1 .. u_{k−1} over the batch, after g̃. Call `eval()` before solving for y or exporting:
            in training mode a row's energy depends on the other rows of x.
        linear_context_output: the last context layer u_{k−1} without g̃ and batch norm, as in the authors' code for
            multi-label classification, where that layer is a feed-forward network's logits.
        y_dim, hidden, activation, positivity, generator, dtype, device: as of `FICNN`; activation is g.

    Raises:
        InputError: a sentence with the argument, what was expected, what came, and the remedy.
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        hidden: Sequence[int] = (200, 200),
        context_hidden: Sequence[int] | None = None,
        activation: str | ConvexActivation = "softplus",
        context_activation: str | nn.Module = "relu",
        batch_norm: bool = False,
        positivity: Positivity = "projection",
        *,
        linear_context_output: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        remedy = "give the number of columns of x, or use FICNN(0, y_dim) if there is no context"
        super().__init__(integer(x_dim, "x_dim", 1, remedy=remedy), y_dim, hidden, activation, positivity)
        self.context_hidden = check_widths("context_hidden", self.hidden if context_hidden is None else context_hidden)
        if len(self.context_hidden) != len(self.hidden):
            expected = f"as many widths as hidden has, {len(self.hidden)}"
            remedy = "equation 3 pairs u_i with z_i, so give one width for each hidden layer"
            raise refused("context_hidden", expected, len(self.context_hidden), remedy)
        self.context_activation = free_activation(context_activation)
        self.batch_norm = flag(batch_norm, "batch_norm")
        self.linear_context_output = flag(linear_context_output, "linear_context_output")
        check_place(dtype, device, generator)
        u_widths = (self.x_dim, *self.context_hidden)  # of u_0 .. u_{k−1}
        z_widths = (0, *self.hidden, 1)  # of z_0 .. z_k
        linear = [linear_context_output and i == len(self.hidden) - 1 for i in range(len(self.hidden))]
        self.context_layers = nn.ModuleList(
            ContextLayer(
                in_dim,
                out,
                nn.Identity() if is_linear else self.context_activation,
                batch_norm and not is_linear,
                dtype,
                device,
            )
            for in_dim, out, is_linear in zip(u_widths[:-1], u_widths[1:], linear, strict=True)
        )
        self.layers = nn.ModuleList(
            PICNNLayer(u_dim, self.y_dim, z_dim, out, self.positivity, dtype, device)
            for u_dim, z_dim, out in zip(u_widths, z_widths[:-1], z_widths[1:], strict=True)
        )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters afresh, as `initialisation` describes; the gates start near 1."""
        u_squares = [1.0]  # E[u_i²]
        for c in self._context_layers():
            c.W.copy_(draw_free((c.W.shape[0], c.W.shape[1]), 1.0, u_squares[-1], generator))
            c.b.zero_()
            if c.norm is not None:
                c.norm.reset_running_stats()
                c.norm.reset_parameters()
            u_squares.append(1.0 if c.norm is not None else gaussian_moments(c.activation).square)

        moments = gaussian_moments(self.activation)
        for layer, u_square in zip(self._layers(), u_squares, strict=True):
            out, u_dim = layer.W_u.shape
            v = draw_z_path(layer.W_z, layer.b, moments, len(self.hidden), generator)
            if layer.W_zu is not None and layer.b_z is not None:
                layer.W_zu.copy_(draw_free((layer.W_zu.shape[0], u_dim), GATE_VARIANCE, u_square, generator))
                layer.b_z.fill_(1.0)
            # y and u each carry half of the skip's variance.
            layer.W_y.copy_(math.sqrt(v / 2) * draw_skip((out, self.y_dim), 1.0, generator))
            layer.W_u.copy_(math.sqrt(v / 2) * draw_skip((out, u_dim), u_square, generator))
            layer.W_yu.copy_(draw_free((self.y_dim, u_dim), GATE_VARIANCE, u_square, generator))
            layer.b_y.fill_(1.0)

    def context(self, x: Float[Tensor, "batch x_dim"]) -> tuple[Tensor, ...]:
        """The 3k − 1 tensors that depend on x alone, layer after layer.

        gate_y_0, bias_0, then gate_y_i, gate_z_i, bias_i for i = 1..k−1, where gate_y_i = W_i^(yu) u_i + b_i^(y),
        gate_z_i = [W_i^(zu) u_i + b_i^(z)]_+ and bias_i = W_i^(u) u_i + b_i.
        """
        layers = self._layers()
        check_input("x", x, self.x_dim, layers[0].b)
        u = x
        context = layers[0].context(u)
        for context_layer, layer in zip(self.context_layers, layers[1:], strict=True):
            u = context_layer(u)
            context += layer.context(u)
        return context

    def value(self, context: tuple[Tensor, ...], y: Float[Tensor, "batch y_dim"]) -> Float[Tensor, " batch"]:
        """f(x, y) from context(x)."""
        layers = self._layers()
        check_input("y", y, self.y_dim, layers[0].b)
        check_context(context, 3 * len(layers) - 1)
        gate_y, bias, *rest = context
        z = bias + F.linear(y * gate_y, layers[0].W_y)
        for layer, gate_y, gate_z, bias in zip(layers[1:], rest[0::3], rest[1::3], rest[2::3], strict=True):
            assert layer.W_z is not None
            z = self.activation(z)  # g of the layer before: the last layer's g is the identity
            z = layer.W_z(z * gate_z) + F.linear(y * gate_y, layer.W_y) + bias
        return z.squeeze(1)

    def _layers(self) -> list[PICNNLayer]:
        return [cast(PICNNLayer, layer) for layer in self.layers]

    def _context_layers(self) -> list[ContextLayer]:
        return [cast(ContextLayer, layer) for layer in self.context_layers]
