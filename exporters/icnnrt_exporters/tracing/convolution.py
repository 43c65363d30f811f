"""The backward pass of a convolution, written as convolutions again.

With y = conv(x, W; stride s, padding p, dilation d, groups G), x [B, C, *N], W [O, C/G, *k], ȳ [B, O, *N']:

    x̄ = convᵀ(ȳ, W; s, p, d, G)                        output padding: what the stride left over of N
    W̄ = conv(xᵀ, ȳᵀ; stride d, padding p, dilation s)   xᵀ: batch and channels swapped; cropped to k
    b̄ = Σ ȳ                                            over batch and places

A transposed convolution is the x̄ of a plain one, so its own rules are these with x and ȳ swapped. Every rule holds for
any number of spatial dimensions, and its own derivatives are convolutions again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def convolution_backward(
    y_bar: Tensor,
    x: Tensor,
    W: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(x̄, W̄, b̄), each where the mask asks for it."""
    D = x.dim() - 2
    s, p, d = (list(v) * D if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    zeros = [0] * D
    x_bar = W_bar = b_bar = None
    if output_mask[0] and transposed:
        x_bar = aten.convolution.default(y_bar, W, None, s, p, d, False, zeros, groups)
    elif output_mask[0]:
        left_over = [
            x.shape[2 + i] - ((y_bar.shape[2 + i] - 1) * s[i] - 2 * p[i] + d[i] * (W.shape[2 + i] - 1) + 1)
            for i in range(D)
        ]
        x_bar = aten.convolution.default(y_bar, W, None, s, p, d, True, left_over, groups)
    if output_mask[1]:
        wide, narrow = (y_bar, x) if transposed else (x, y_bar)
        W_bar = _weight_bar(wide, narrow, list(W.shape[2:]), s, p, d, groups)
    if output_mask[2]:
        b_bar = y_bar.sum([0, *range(2, y_bar.dim())])
    return x_bar, W_bar, b_bar


def _weight_bar(
    x: Tensor, y_bar: Tensor, k: list[int], s: list[int], p: list[int], d: list[int], groups: int
) -> Tensor:
    """W̄ [O, C/G, *k] of a plain convolution; the batch becomes the channels that are summed over."""
    B, C, *N = x.shape
    x_t = x.transpose(0, 1)
    if groups > 1:
        # [C/G, G·B, *N]: the channels of one group, at the place of the batch, meet that group's outputs alone.
        x_t = x_t.reshape(groups, C // groups, B, *N).transpose(0, 1).reshape(C // groups, groups * B, *N)
    zeros = [0] * len(k)
    # Stride and dilation change places; the last rows that the stride skipped would show as a longer kernel.
    W_bar = aten.convolution.default(x_t, y_bar.transpose(0, 1), None, d, p, s, False, zeros, groups).transpose(0, 1)
    for i, size in enumerate(k):
        if W_bar.shape[2 + i] != size:
            W_bar = W_bar.narrow(2 + i, 0, size)
    return W_bar
