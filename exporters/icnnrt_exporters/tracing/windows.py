"""Convolution and pooling as products with 0/1 matrices, one dimension at a time.

Along one dimension of size N, a window of k taps with stride s, padding p and dilation d meets N' places:

    S_j [N, N']   S_j[o·s + j·d − p, o] = 1 where that is inside, tap j of every window
    S   [N, k·N'] all taps side by side

    patches       = x S  along every dimension         im2col; padding comes out as zero
    conv(x, W)    = patches · W                        one product over channels and taps
    convᵀ(v, W)   = (v · Wᵀ) Sᵀ                        its adjoint
    average(x)    = x A,  A = Σ_j S_j / count          exact for every padding, rounding and count
    maximum(x)    = max_j (x S_j + m_j)                m_j = −∞ where tap j is outside

ONNX Runtime has no float64 kernel for Conv and AveragePool, and ONNX none for what their derivatives are. These forms
have exact derivatives of every order in both dtypes, in products that every runtime has, for any batch. Against a
native convolution of 64×64 images they do two to three times the arithmetic.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Window = tuple[int, int, int, int, int, int]  # N, N', k, s, p, d


def convolved(N: int, k: int, s: int, p: int, d: int) -> int:
    """Places N' of a convolution's windows."""
    return (N + 2 * p - d * (k - 1) - 1) // s + 1


def taps(window: Window, dtype: torch.dtype) -> Tensor:
    """S_j for every tap, [k, N, N']."""
    N, places, k, s, p, d = window
    source = torch.arange(places) * s - p + torch.arange(k)[:, None] * d  # [k, N']
    return (source[:, None, :] == torch.arange(N)[:, None]).to(dtype)


def selection(window: Window, dtype: torch.dtype) -> Tensor:
    """S [N, k·N']."""
    N, places, k, *_ = window
    return taps(window, dtype).permute(1, 0, 2).reshape(N, k * places).contiguous()


def averaging(window: Window, count_pad: bool, dtype: torch.dtype) -> Tensor:
    """A [N, N'], every window divided by its own count; windows are cut at N + p, as torch cuts them."""
    N, places, k, s, p, _ = window
    S = taps(window, torch.float64).sum(0)
    start = torch.arange(places) * s - p
    padded = torch.clamp(start + k, max=N + p) - start
    return (S / (padded if count_pad else S.sum(0))).to(dtype)


def summing(window: Window, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · Σ_j S_j [N, N']: an average whose divisor is given."""
    return (taps(window, torch.float64).sum(0) * scale).to(dtype)


def adaptive_averaging(N: int, places: int, dtype: torch.dtype) -> Tensor:
    """A [N, N'] of windows from ⌊oN/N'⌋ to ⌈(o+1)N/N'⌉."""
    S = adaptive_taps(N, places, torch.float64).sum(0)
    return (S / S.sum(0)).to(dtype)


def adaptive_taps(N: int, places: int, dtype: torch.dtype) -> Tensor:
    """S_j [k, N, N'] of the adaptive windows; the shorter ones leave their last taps empty."""
    o = torch.arange(places)
    start, end = o * N // places, -(-(o + 1) * N // places)
    k = int((end - start).max())
    source = start + torch.arange(k)[:, None]
    inside = source < end
    return ((source[:, None, :] == torch.arange(N)[:, None]) & inside[:, None, :]).to(dtype)


def outside(S_j: Tensor) -> Tensor:
    """m_j [k, N']: −∞ where a tap selects nothing."""
    return torch.where(S_j.sum(1) > 0, 0.0, -torch.inf).to(S_j.dtype)


def along(x: Tensor, M: Tensor, dim: int) -> Tensor:
    """Σ_i x[..., i, ...] M[i, ·], the result in the place of dimension `dim`."""
    if dim == x.dim() - 1:
        return x @ M
    return (x.transpose(dim, -1) @ M).transpose(dim, -1)


def convolve(x: Tensor, W: Tensor, bias: Tensor | None, groups: int, k: Sequence[int], *S: Tensor) -> Tensor:
    """y [B, O, *N'] of x [B, C, *N], W [O, C/G, *k], and one S a dimension."""
    B, C, O, D = x.shape[0], x.shape[1], W.shape[0], len(S)  # noqa: E741
    places = [M.shape[1] // size for M, size in zip(S, k, strict=True)]
    for i, M in enumerate(S):
        x = along(x, M, 2 + i)
    # [B, G, C/G, k_1, N'_1, k_2, N'_2, ...] -> [G, B, *N', C/G, *k]
    x = x.reshape([B, groups, C // groups, *(n for pair in zip(k, places, strict=True) for n in pair)])
    x = x.permute([1, 0, *range(4, 4 + 2 * D, 2), 2, *range(3, 3 + 2 * D, 2)])
    L, taps_all = math.prod(places), C // groups * math.prod(k)
    if groups == 1:
        y = x.reshape(B * L, taps_all) @ W.reshape(O, taps_all).transpose(0, 1)
        y = y.reshape([B, *places, O])
        y = y.permute([0, D + 1, *range(1, D + 1)])
    else:
        y = torch.bmm(x.reshape(groups, B * L, taps_all), W.reshape(groups, O // groups, taps_all).transpose(1, 2))
        y = y.reshape([groups, B, *places, O // groups]).permute([1, 0, D + 2, *range(2, D + 2)])
        y = y.reshape([B, O, *places])
    return y if bias is None else y + bias.reshape([1, O, *[1] * D])


def convolve_transposed(v: Tensor, W: Tensor, bias: Tensor | None, groups: int, k: Sequence[int], *S: Tensor) -> Tensor:
    """x [B, O, *N] of v [B, C, *N'], W [C, O/G, *k]: the adjoint of `convolve`, with the same S."""
    B, C, places, D = v.shape[0], v.shape[1], list(v.shape[2:]), len(S)
    O_g, L = W.shape[1], math.prod(places)
    # [G, B·L, C/G] · [G, C/G, O/G·Πk]
    v = v.reshape([B, groups, C // groups, *places]).permute([1, 0, *range(3, 3 + D), 2])
    v = torch.bmm(v.reshape(groups, B * L, C // groups), W.reshape(groups, C // groups, O_g * math.prod(k)))
    # [G, B, *N', O/G, *k] -> [B, G·O/G, k_1·N'_1, k_2·N'_2, ...]
    v = v.reshape([groups, B, *places, O_g, *k])
    v = v.permute([1, 0, 2 + D, *(axis for i in range(D) for axis in (3 + D + i, 2 + i))])
    v = v.reshape([B, groups * O_g, *(a * b for a, b in zip(k, places, strict=True))])
    for i, M in enumerate(S):
        v = along(v, M.transpose(0, 1), 2 + i)
    return v if bias is None else v + bias.reshape([1, groups * O_g, *[1] * D])


def average(x: Tensor, *A: Tensor) -> Tensor:
    """Means over windows of the last dimensions, one A each."""
    for i, M in enumerate(A):
        x = along(x, M, x.dim() - len(A) + i)
    return x


def maximum(x: Tensor, taps_of: Sequence[int], *tables: Tensor) -> Tensor:
    """Maxima over windows of the last dimensions; `tables` holds S_j [N, N'] and m_j [N'] of every tap in turn.

    The last dimension goes first, and among equals the first tap wins: the order in which torch scans a window, so that
    the gradient goes to the same place.
    """
    D, end = len(taps_of), len(tables)
    for i in reversed(range(D)):
        begin = end - 2 * taps_of[i]
        dim = x.dim() - D + i
        best: Tensor | None = None
        for S_j, m_j in zip(tables[begin:end:2], tables[begin + 1 : end : 2], strict=True):
            candidate = along(x, S_j, dim) + m_j.reshape([-1, *[1] * (D - 1 - i)])
            best = candidate if best is None else torch.where(candidate > best, candidate, best)
        assert best is not None
        x, end = best, begin
    return x
