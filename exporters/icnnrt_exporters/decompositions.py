"""Rules that rewrite aten operators into ones that ONNX has, in float32 and float64 alike.

ONNX Runtime has no float64 CPU kernel for Softplus, LeakyRelu, Elu and their like, and ONNX has no backward operators
at all. Torch's own rules serve where they exist; the ones here either do not exist there or overflow. A rule refuses
what it does not cover.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table, get_decompositions

aten = torch.ops.aten

# Forward operators to be lowered, besides everything named *backward*.
FORWARD = (
    aten.leaky_relu,
    aten.elu,
    aten.celu,
    aten.selu,
    aten.gelu,
    aten.silu,
    aten.mish,
    aten.hardtanh,
    aten.log_sigmoid_forward,
    aten.native_layer_norm,
    aten.native_group_norm,
    aten._native_batch_norm_legit_no_training,
    aten._native_batch_norm_legit,
    aten.native_batch_norm,
    aten.addcmul,
    aten.addcdiv,
    aten.addmv,
    aten.lerp,
    aten.var_mean,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.zeros_like,
    aten.ones_like,
    aten.sgn,
    aten.square,
    aten.masked_fill,
    # The exporter's own translation has no total weight, which the gradient of a mean divides by.
    aten.nll_loss_forward,
    aten.nll_loss2d_forward,
    aten.threshold,
)


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """torch's softplus: log(1 + e^{βx}) / β, and x itself where βx > threshold."""
    z = x * beta if beta != 1 else x
    smooth = torch.clamp(z, min=0) + torch.log1p(torch.exp(-torch.abs(z)))
    if beta != 1:
        smooth = smooth / beta
    # Above 37 the two agree to the last bit of float64, and the choice would cost two operators for nothing.
    return smooth if threshold >= 37 else torch.where(z > threshold, x, smooth)


def softplus_backward(grad_output: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    """∂softplus: σ(βx), and 1 where βx > threshold. Torch's own rule forms e^{βx}, which overflows."""
    z = x * beta if beta != 1 else x
    slope = grad_output * torch.sigmoid(z)
    return slope if threshold >= 37 else torch.where(z > threshold, grad_output, slope)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^−x) in float64: ONNX Runtime's own Sigmoid is 1 − 1/(1 + e^x) there and loses the lower tail."""
    return torch.reciprocal(1.0 + torch.exp(-x)) if x.dtype == torch.float64 else NotImplemented


def mv(A: Tensor, v: Tensor) -> Tensor:
    """A v as a product of matrices: ONNX Runtime (1.31, all optimisations) fuses a transpose into MatMul with a vector
    and computes it wrongly."""
    return torch.mm(A, v.unsqueeze(1)).squeeze(1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a'b without a product of vectors, for the same reason."""
    return (a * b).sum()


def expm1(x: Tensor) -> Tensor:
    """e^x − 1 as 2 tanh(x/2) / (1 − tanh(x/2)), which does not cancel near 0, unlike Exp and Sub."""
    t = torch.tanh(x * 0.5)
    return 2.0 * t / (1.0 - t)


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """The whole table, by operator overload."""
    backward = [op for op in decomposition_table if "backward" in str(op)]
    table: dict[Any, Callable[..., Any]] = dict(get_decompositions([*backward, *FORWARD]))
    table[aten.softplus.default] = softplus
    table[aten.softplus_backward.default] = softplus_backward
    table[aten.expm1.default] = expm1
    table[aten.mv.default] = mv
    table[aten.dot.default] = dot
    table[aten.sigmoid.default] = sigmoid
    return table
