"""Rules that rewrite aten operators into ones that ONNX has, in float32 and float64 alike.

ONNX Runtime has no float64 CPU kernel for Softplus, LeakyRelu, Elu and their like, and ONNX has no backward operators
at all. Torch's own rules serve where they exist; the ones here either do not exist there, or overflow, or cancel. What
must be rewritten before derivatives are taken stands in `lowering`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table, get_decompositions

from icnnrt_exporters.tracing.convolution import convolution_backward
from icnnrt_exporters.tracing.error_function import erf, erfc

aten = torch.ops.aten

# Forward operators to be lowered, besides everything named *backward*.
FORWARD = (
    *(aten.leaky_relu, aten.gelu, aten.silu, aten.mish, aten.hardtanh, aten.log_sigmoid_forward, aten.threshold),
    *(aten._prelu_kernel, aten.hardswish, aten.hardsigmoid, aten.softshrink, aten.hardshrink, aten.glu),
    *(aten.native_layer_norm, aten.native_group_norm, aten.native_batch_norm, aten._native_batch_norm_legit),
    *(aten._native_batch_norm_legit_no_training, aten.linalg_vector_norm, aten.norm, aten.var_mean),
    *(aten.addcmul, aten.addcdiv, aten.addmv, aten.lerp, aten.trace, aten.sgn, aten.square, aten.masked_fill),
    *(aten.new_zeros, aten.new_ones, aten.new_full, aten.zeros_like, aten.ones_like),
    *(aten.logaddexp2, aten.logsumexp, aten.huber_loss, aten.mse_loss),
    # The exporter's own translation has no total weight, which the gradient of a mean divides by.
    *(aten.nll_loss_forward, aten.nll_loss2d_forward),
    *(aten.im2col, aten.roll, aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle),
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
    """e^x − 1, by the form below up to 1, where subtracting begins to be harmless."""
    return torch.where(x > 1.0, torch.exp(x) - 1.0, _expm1_below(x))


def _expm1_below(x: Tensor) -> Tensor:
    """2 tanh(x/2) / (1 − tanh(x/2)), which does not cancel near 0, unlike Exp and Sub. For x <= 1."""
    t = torch.tanh(x * 0.5)
    return 2.0 * t / (1.0 - t)


def elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """scale·x for x > 0, scale·α (e^{βx} − 1) below, β = input_scale."""
    below = _expm1_below(x if input_scale == 1 else x * input_scale) * (alpha * scale)
    return torch.where(x > 0, x if scale == 1 else x * scale, below)


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """x for x > 0, α (e^{x/α} − 1) below."""
    return torch.where(x > 0, x, _expm1_below(x if alpha == 1 else x / alpha) * alpha)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b) as the log-sum-exp of both, which is seen to be convex; torch's own rule chooses by a >= b."""
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(a, b), dim=-1), dim=-1)


def selu(x: Tensor) -> Tensor:
    """ELU with the α and scale of self-normalising networks."""
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def sinh(x: Tensor) -> Tensor:
    """½ (m + m/(1 + m)), m = e^x − 1, in float64, where ONNX Runtime has none."""
    if x.dtype != torch.float64:
        return NotImplemented
    m = expm1(x.abs().clamp(max=700.0))  # sinh overflows at 710
    return torch.sign(x) * 0.5 * (m + m / (1.0 + m))


def cosh(x: Tensor) -> Tensor:
    """½ (e^x + e^−x), in float64."""
    return 0.5 * (torch.exp(x) + torch.exp(-x)) if x.dtype == torch.float64 else NotImplemented


def tan(x: Tensor) -> Tensor:
    """sin x / cos x, in float64."""
    return torch.sin(x) / torch.cos(x) if x.dtype == torch.float64 else NotImplemented


def asinh(x: Tensor) -> Tensor:
    """± log(1 + a + a²/(1 + √(1 + a²))), a = |x|, which does not cancel; in float64."""
    if x.dtype != torch.float64:
        return NotImplemented
    a = x.abs()
    return torch.sign(x) * torch.log1p(a + a * (a / (1.0 + torch.sqrt(1.0 + a * a))))


def acosh(x: Tensor) -> Tensor:
    """log(x + √((x − 1)(x + 1))), in float64."""
    return torch.log(x + torch.sqrt((x - 1.0) * (x + 1.0))) if x.dtype == torch.float64 else NotImplemented


def atanh(x: Tensor) -> Tensor:
    """½ log((1 + x)/(1 − x)), in float64."""
    return 0.5 * (torch.log1p(x) - torch.log1p(-x)) if x.dtype == torch.float64 else NotImplemented


def addmm(b: Tensor, A: Tensor, B: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """βb + αAB: ONNX keeps the factors of Gemm in float32."""
    if beta == 1 and alpha == 1:
        return NotImplemented
    return b * beta + torch.mm(A, B) * alpha


def add(a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
    """a + αb, the factor as an operand of its own, which can be lifted."""
    return a + b * alpha if isinstance(alpha, float) and alpha != 1 else NotImplemented


def sub(a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
    """a − αb."""
    return a - b * alpha if isinstance(alpha, float) and alpha != 1 else NotImplemented


def var(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    """Σ (x − mean)² / (count − correction)."""
    dims = list(dim) if dim else list(range(x.dim()))
    apart = x - x.mean(dims, keepdim=True)
    count = 1
    for d in dims:
        count = count * x.shape[d]
    return (apart * apart).sum(dims, keepdim=keepdim) / (count - (1 if correction is None else correction))


def std(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    """√var."""
    return torch.sqrt(var(x, dim, correction=correction, keepdim=keepdim))


def squeeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Several dimensions of size 1 taken out, one by one."""
    for d in sorted((d % x.dim() for d in dims), reverse=True):
        x = x.squeeze(d)
    return x


def broadcast_in_dim(x: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """x with its dimensions put at `dims` of `shape`; some of torch's own rules end in this primitive."""
    for i in range(len(shape)):
        if i not in dims:
            x = x.unsqueeze(i)
    return x.expand(shape)


def bucketize(x: Tensor, bounds: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """How many bounds lie below each entry (right: or equal it), which is its place among them."""
    below = bounds <= x.unsqueeze(-1) if right else bounds < x.unsqueeze(-1)
    return below.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def searchsorted(
    bounds: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """The same with bounds of shape [k], or one row of bounds for every row of entries."""
    if sorter is not None:
        return NotImplemented
    rows = bounds if bounds.dim() == 1 else bounds.unsqueeze(-2)
    return bucketize(x, rows, out_int32=out_int32, right=right or side == "right")


def rsub(b: Tensor, a: Any, alpha: float = 1) -> Tensor:
    """a − alpha b, by the operator that ONNX has: torch.onnx would decompose the whole graph for this one."""
    if not isinstance(a, Tensor):
        a = torch.full((), a, dtype=b.dtype, device=b.device)
    return torch.sub(a, b, alpha=alpha)


def eye(n: int, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
    """The identity by comparing places, for the same reason."""
    places = torch.arange(n, device=device)
    return (places.unsqueeze(1) == places).to(dtype or torch.get_default_dtype())


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """The whole table, by operator overload."""
    backward = [op for op in decomposition_table if "backward" in str(op)]
    table: dict[Any, Callable[..., Any]] = dict(get_decompositions([*backward, *FORWARD]))
    mine: list[Callable[..., Any]] = [softplus, softplus_backward, expm1, mv, dot, sigmoid, convolution_backward, erf]
    mine += [erfc, sinh, cosh, tan, asinh, acosh, atanh, elu, celu, selu, logaddexp, addmm, eye]
    table |= {getattr(aten, rule.__name__).default: rule for rule in mine}
    table |= {aten.add.Tensor: add, aten.sub.Tensor: sub, aten.rsub.Scalar: rsub, aten.rsub.Tensor: rsub}
    table |= {aten.var.correction: var, aten.std.correction: std, aten.squeeze.dims: squeeze}
    table |= {aten.bucketize.Tensor: bucketize, aten.searchsorted.Tensor: searchsorted}
    table[torch.ops.prims.broadcast_in_dim.default] = broadcast_in_dim
    return table
