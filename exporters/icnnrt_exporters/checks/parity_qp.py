"""The check of a network of quadratic programs: its answers and its adjoint against the module in float64."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import icnnrt

Figure = tuple[str, NDArray[Any], Tensor]


def figures(session: icnnrt.QPSession, judge: nn.Module, batches: Sequence[Tensor]) -> tuple[list[Figure], float]:
    """(name, what the package gives, what it should be) of samples that both solved, and the share of the others."""
    found: list[Figure] = []
    unsolved, count = 0, 0
    for x in batches:
        X = x.detach().double().clone()
        with torch.no_grad():
            z = judge(X)
        solution = session.solve_qp(x.detach().numpy())
        count += len(solution)
        unsolved += int((~solution.ok).sum())
        keep = solution.ok & np.isfinite(z.numpy()).all(1)
        if not keep.any():
            continue
        rows = torch.from_numpy(keep)
        found.append(("z", solution.z[keep], z[rows]))
        bar = torch.cos(torch.arange(z.numel(), dtype=torch.float64)).reshape(z.shape)[rows]
        # A second pass of the kept rows alone: the gradient of weights is a sum, which others would make NaN.
        kept_x = X[rows].requires_grad_()
        wanted = {name: p for name, p in judge.named_parameters() if p.requires_grad}
        bars = torch.autograd.grad(
            (judge(kept_x) * bar).sum(), [kept_x, *wanted.values()], materialize_grads=True, allow_unused=True
        )
        mine = session.vjp(solution[keep], bar.numpy())
        found.append(("vjp", mine.x, bars[0]))
        found += [
            ("vjp", mine.weights[name], true)
            for name, true in zip(wanted, bars[1:], strict=True)
            if name in mine.weights
        ]
    return found, unsolved / count
