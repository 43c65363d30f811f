"""f, ∇f, ∇²f and their pull-back by torch, as what a package gives is held against."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

Doubles = NDArray[np.float64]


def value_and_slope(energy: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """f(x, y) and ∇_y f as numbers; a slope of 0 where y does not reach f."""
    leaf = y.detach().clone().requires_grad_()
    f = energy(x, leaf)
    if not f.requires_grad:
        return f, torch.zeros_like(y)
    (g,) = torch.autograd.grad(f.sum(), leaf, materialize_grads=True)
    return f.detach(), g


def of_arrays(judge: nn.Module, x: Tensor) -> Callable[[Doubles], tuple[Doubles, Doubles]]:
    """y -> f(x, y) and ∇_y f, as the methods in numpy ask for it."""

    def value_and_gradient(y: Doubles) -> tuple[Doubles, Doubles]:
        f, g = value_and_slope(judge, x, _tensor(y))
        return f.numpy(), g.numpy()

    return value_and_gradient


def gradient(judge: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """f(x, y) and ∇_y f, which autograd followed from the leaf y."""
    f = judge(x, y)
    (g,) = torch.autograd.grad(f.sum(), y, create_graph=True, materialize_grads=True)
    return f, g


def hessian(g: Tensor, y: Tensor) -> Tensor:
    """[B, n, n], of g = ∇f(y) [B, n], which autograd followed from the leaf y.

    Row i of sample b is ∂g_bi/∂y_b: samples do not meet, so each column of the batch is one backward pass.
    """
    n = y.shape[1]
    if not g.requires_grad:
        return y.new_zeros((len(y), n, n))
    rows = [torch.autograd.grad(g[:, i].sum(), y, retain_graph=True, materialize_grads=True)[0] for i in range(n)]
    return torch.stack(rows, 1)


def hessian_product(judge: nn.Module, x: Tensor, y: Doubles, s: Doubles) -> Doubles:
    """∇²_y f s [B, n]."""
    leaf = _tensor(y).requires_grad_()
    g = gradient(judge, x, leaf)[1]
    if not g.requires_grad:
        return np.zeros_like(s)
    (product,) = torch.autograd.grad(g, leaf, _tensor(s), materialize_grads=True)
    return product.numpy()


def slopes(judge: nn.Module, x: Tensor, points: Doubles) -> Doubles:
    """∇_y f at all points [B, K, n]."""
    B, K, n = points.shape
    return of_arrays(judge, x.repeat_interleave(K, 0))(points.reshape(B * K, n))[1].reshape(B, K, n)


def same_slopes(met: Doubles, cuts: NDArray[Any], dtype: DTypeLike) -> NDArray[np.bool_]:
    """[B] bool: torch met the slopes [B, K, n] of the cuts, up to the root of a rounding of `dtype`.

    Where a cut stands on a kink to the last bit, torch may meet the other face: no figure of the package's.
    """
    apart = np.abs(met - cuts).max((1, 2)) / np.maximum(1.0, np.abs(met).max((1, 2)))
    return np.asarray(apart <= np.sqrt(np.finfo(dtype).eps))


def pushed(
    judge: nn.Module, x: Tensor, points: Doubles, offset_bar: Doubles, seed: Doubles, names: Sequence[str]
) -> tuple[list[Tensor], Tensor, Doubles]:
    """θ̄ of the weights of these names, summed, and x̄, of Σ_i [ ē_i f(y_i) + s_i'∇_y f(y_i) ] at points [B, K, n]; and
    the slopes ∇_y f(y_i)."""
    B, K, n = points.shape
    context = x.detach().clone().requires_grad_()
    leaf = _tensor(points.reshape(B * K, n)).requires_grad_()
    f, g = gradient(judge, context.repeat_interleave(K, 0), leaf)
    paired = (_tensor(offset_bar.reshape(-1)) * f).sum() + (_tensor(seed.reshape(B * K, n)) * g).sum()
    parameters = dict(judge.named_parameters(remove_duplicate=False))
    leaves = [*(parameters[name] for name in names), context]
    *theta_bar, x_bar = torch.autograd.grad(paired, leaves, materialize_grads=True)
    return theta_bar, x_bar, g.detach().numpy().reshape(B, K, n)


def _tensor(a: NDArray[Any]) -> Tensor:
    """The same numbers, of any strides."""
    return torch.from_numpy(np.ascontiguousarray(a))
