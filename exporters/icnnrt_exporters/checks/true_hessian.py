"""∇f and ∇²f by torch, as what a package gives is held against."""

import torch
from torch import Tensor, nn


def true_gradient(judge: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """f(x, y) and ∇_y f, which autograd followed from the leaf y."""
    f = judge(x, y)
    (g,) = torch.autograd.grad(f.sum(), y, create_graph=True, materialize_grads=True)
    return f, g


def true_hessian(g: Tensor, y: Tensor) -> Tensor:
    """[B, n, n], of g = ∇f(y) [B, n], which autograd followed from the leaf y.

    Row i of sample b is ∂g_bi/∂y_b: samples do not meet, so each column of the batch is one backward pass.
    """
    n = y.shape[1]
    if not g.requires_grad:
        return y.new_zeros((len(y), n, n))
    rows = [torch.autograd.grad(g[:, i].sum(), y, retain_graph=True, materialize_grads=True)[0] for i in range(n)]
    return torch.stack(rows, 1)
