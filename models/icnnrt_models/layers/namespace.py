"""The namespace of `icnnrt.mathematics.namespace` on tensors: of any device with float64, traced or not.

Nothing here names a device or reads a size into Python, so what torch.jit or torch.export traces of a statement holds
for every one of them. (torch.jit notes the device of ones_like and its kin.)
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from icnnrt.mathematics.namespace import RIDGE, TINY, Eager


class Torch(Eager):
    """As `icnnrt.mathematics.namespace.Numpy`, of tensors."""

    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    log1p = staticmethod(torch.log1p)
    sqrt = staticmethod(torch.sqrt)
    sigmoid = staticmethod(torch.sigmoid)
    x_log_x = staticmethod(lambda a: torch.xlogy(a, a))
    maximum = staticmethod(lambda a, b: torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b))
    minimum = staticmethod(lambda a, b: torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b))
    clip = staticmethod(lambda a, low, high: torch.clamp(a, low, high))
    where = staticmethod(lambda condition, a, b: torch.where(condition, a, b))
    isfinite = staticmethod(torch.isfinite)
    indicator = staticmethod(lambda condition: condition.to(torch.float64))
    power_of_2 = staticmethod(lambda a: torch.exp2(torch.round(torch.log2(a))))

    sum = staticmethod(lambda a: a.sum(-1, keepdim=True))
    max = staticmethod(lambda a: a.amax(-1, keepdim=True))
    min = staticmethod(lambda a: a.amin(-1, keepdim=True))
    mean = staticmethod(lambda a: a.mean(-1, keepdim=True))
    all = staticmethod(lambda condition: condition.all(-1, keepdim=True))
    any = staticmethod(lambda a: a.any())
    total = staticmethod(lambda M: M.sum((-2, -1), keepdim=True))
    largest = staticmethod(lambda M: M.abs().amax((-2, -1), keepdim=True))
    count = staticmethod(lambda a: _filled(a, 1.0).sum(-1, keepdim=True))
    argmin1 = staticmethod(lambda a: a.argmin(1, keepdim=True))
    pick1 = staticmethod(lambda a, i: a.gather(1, i.expand(-1, -1, a.shape[2])))
    pick = staticmethod(lambda which, a: a[which[:, 0, 0]])
    put = staticmethod(lambda which, found, among: among.index_put((which[:, 0, 0],), found))

    mT = staticmethod(lambda a: a.mT)
    backwards = staticmethod(lambda a: a.flip(1))
    concat = staticmethod(lambda arrays: torch.cat(list(arrays), dim=-1))
    concat_rows = staticmethod(lambda arrays: torch.cat(list(arrays), dim=1))
    stack = staticmethod(lambda arrays: torch.stack(list(arrays), dim=1))
    halves = staticmethod(lambda row: row.chunk(2, dim=-1))
    extended = staticmethod(lambda row, like: torch.cat([row, _filled(like[..., row.shape[-1] :], 0.0)], dim=-1))

    ones_like = staticmethod(lambda a: _filled(a, 1.0))
    places = staticmethod(lambda a: torch.cumsum(_filled(a, 1.0), -1) - 1.0)
    double = staticmethod(lambda a: a.double())
    like = staticmethod(lambda a, other: a.to(other.dtype))

    def eye(self, row: Tensor) -> Tensor:
        """From the places of the entries, as there may be no sample to read a row of."""
        place = torch.cumsum(_filled(row.sum((0, 1)), 1.0), 0)
        return (place[:, None] == place).to(row.dtype)

    def eyes(self, row: Tensor) -> Tensor:
        return self.eye(row).expand(row.shape[0], -1, -1)

    def zeros(self, like: Tensor, *sizes: int) -> Tensor:
        one = like.sum(tuple(range(1, like.dim()))) if like.dim() > 1 else like
        return _filled(one.reshape(-1, *[1] * len(sizes)), 0.0).expand(-1, *sizes)

    def rows(self, numbers: Sequence[float], like: Tensor) -> Tensor:
        one = _filled(like[:, :1, :1], 1.0)
        return torch.cat([number * one for number in numbers], dim=1)

    def parts(self, row: Tensor, like: Sequence[Tensor | None]) -> Sequence[Tensor]:
        return row.split(self._lengths(row, like), dim=-1)

    def positive_definite(self, M: Tensor, eye: Tensor) -> Tensor:
        return (torch.linalg.eigvalsh(M)[:, :1] > 0.0)[:, None]

    def inverse_spd(self, A: Tensor, eye: Tensor) -> Callable[[Tensor], Tensor]:
        """By LU and not Cholesky, as rounding may leave a tiny negative eigenvalue. Nothing raises: NaN gives NaN."""
        scale = A.diagonal(dim1=1, dim2=2).clamp(min=TINY).rsqrt()[:, None]
        LU, pivots, _ = torch.linalg.lu_factor_ex(A * scale * scale.mT + RIDGE * eye)
        return lambda r: torch.linalg.lu_solve(LU, pivots, (r * scale).mT).mT * scale

    factor_spd = inverse_spd


TORCH: Final = Torch()


def _filled(a: Tensor, number: float) -> Tensor:
    """A tensor as a is, with one number everywhere."""
    return torch.nan_to_num(a).clamp(number, number)
