"""The namespace of `icnnrt.mathematics.namespace` on tensors: of any device with float64, traced or not.

Nothing here names a device or reads a size into Python, so what torch.jit or torch.export traces of a statement holds
for every one of them. (torch.jit notes the device of ones_like and its kin.)
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from icnnrt.mathematics.namespace import RIDGE, TINY, Eager

__all__ = ["TORCH", "Torch"]


class Torch(Eager):
    """As `icnnrt.mathematics.namespace.Numpy`, of tensors."""

    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    log1p = staticmethod(torch.log1p)
    sqrt = staticmethod(torch.sqrt)
    sigmoid = staticmethod(torch.sigmoid)

    @staticmethod
    def x_log_x(a: Tensor) -> Tensor:
        return torch.xlogy(a, a)

    @staticmethod
    def maximum(a: Tensor, b: Tensor | float) -> Tensor:
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)

    @staticmethod
    def minimum(a: Tensor, b: Tensor | float) -> Tensor:
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)

    @staticmethod
    def clip(a: Tensor, low: Any, high: Any) -> Tensor:
        return torch.clamp(a, low, high)

    @staticmethod
    def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition, a, b)

    @staticmethod
    def sum(a: Tensor) -> Tensor:
        return a.sum(-1, keepdim=True)

    @staticmethod
    def max(a: Tensor) -> Tensor:
        return a.amax(-1, keepdim=True)

    @staticmethod
    def min(a: Tensor) -> Tensor:
        return a.amin(-1, keepdim=True)

    @staticmethod
    def total(M: Tensor) -> Tensor:
        return M.sum((-2, -1), keepdim=True)

    @staticmethod
    def largest(M: Tensor) -> Tensor:
        return M.abs().amax((-2, -1), keepdim=True)

    @staticmethod
    def isfinite(a: Tensor) -> Tensor:
        return torch.isfinite(a)

    @staticmethod
    def indicator(condition: Tensor) -> Tensor:
        return condition.to(torch.float64)

    @staticmethod
    def power_of_2(a: Tensor) -> Tensor:
        return torch.exp2(torch.round(torch.log2(a)))

    @staticmethod
    def all(condition: Tensor) -> Tensor:
        return condition.all(-1, keepdim=True)

    @staticmethod
    def pick(which: Tensor, a: Tensor) -> Tensor:
        return a[which[:, 0, 0]]

    @staticmethod
    def put(which: Tensor, found: Tensor, among: Tensor) -> Tensor:
        return among.index_put((which[:, 0, 0],), found)

    @staticmethod
    def positive_definite(M: Tensor, eye: Tensor) -> Tensor:
        return (torch.linalg.eigvalsh(M)[:, :1] > 0.0)[:, None]

    @staticmethod
    def mean(a: Tensor) -> Tensor:
        return a.mean(-1, keepdim=True)

    @staticmethod
    def count(a: Tensor) -> Tensor:
        return _filled(a, 1.0).sum(-1, keepdim=True)

    @staticmethod
    def mT(a: Tensor) -> Tensor:
        return a.mT

    @staticmethod
    def argmin1(a: Tensor) -> Tensor:
        return a.argmin(1, keepdim=True)

    @staticmethod
    def pick1(a: Tensor, i: Tensor) -> Tensor:
        return a.gather(1, i.expand(-1, -1, a.shape[2]))

    @staticmethod
    def ones_like(a: Tensor) -> Tensor:
        return _filled(a, 1.0)

    @staticmethod
    def eye(row: Tensor) -> Tensor:
        """From the places of the entries, as there may be no sample to read a row of."""
        place = torch.cumsum(_filled(row.sum((0, 1)), 1.0), 0)
        return (place[:, None] == place).to(row.dtype)

    @classmethod
    def eyes(cls, row: Tensor) -> Tensor:
        return cls.eye(row).expand(row.shape[0], -1, -1)

    @staticmethod
    def zeros(like: Tensor, *sizes: int) -> Tensor:
        one = like.sum(tuple(range(1, like.dim()))) if like.dim() > 1 else like
        return _filled(one.reshape(-1, *[1] * len(sizes)), 0.0).expand(-1, *sizes)

    @staticmethod
    def places(a: Tensor) -> Tensor:
        return torch.cumsum(_filled(a, 1.0), -1) - 1.0

    @staticmethod
    def backwards(a: Tensor) -> Tensor:
        return a.flip(1)

    @staticmethod
    def rows(numbers: Sequence[float], like: Tensor) -> Tensor:
        one = _filled(like[:, :1, :1], 1.0)
        return torch.cat([number * one for number in numbers], dim=1)

    @staticmethod
    def extended(row: Tensor, like: Tensor) -> Tensor:
        return torch.cat([row, _filled(like[..., row.shape[-1] :], 0.0)], dim=-1)

    @staticmethod
    def concat(arrays: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(arrays), dim=-1)

    @staticmethod
    def concat_rows(arrays: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(arrays), dim=1)

    @staticmethod
    def halves(row: Tensor) -> Sequence[Tensor]:
        return row.chunk(2, dim=-1)

    def parts(self, row: Tensor, like: Sequence[Tensor | None]) -> Sequence[Tensor]:
        return row.split(self._lengths(row, like), dim=-1)

    @staticmethod
    def stack(arrays: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(arrays), dim=1)

    @staticmethod
    def double(a: Tensor) -> Tensor:
        return a.double()

    @staticmethod
    def like(a: Tensor, other: Tensor) -> Tensor:
        return a.to(other.dtype)

    @staticmethod
    def inverse_spd(A: Tensor, eye: Tensor) -> Callable[[Tensor], Tensor]:
        """By LU and not Cholesky, as rounding may leave a tiny negative eigenvalue. Nothing raises: NaN gives NaN."""
        scale = A.diagonal(dim1=1, dim2=2).clamp(min=TINY).rsqrt()[:, None]
        LU, pivots, _ = torch.linalg.lu_factor_ex(A * scale * scale.mT + RIDGE * eye)
        return lambda r: torch.linalg.lu_solve(LU, pivots, (r * scale).mT).mT * scale

    factor_spd = inverse_spd

    @staticmethod
    def any(a: Tensor) -> Tensor:
        return a.any()


TORCH: Final = Torch()


def _filled(a: Tensor, number: float) -> Tensor:
    """A tensor as a is, with one number everywhere."""
    return torch.nan_to_num(a).clamp(number, number)
