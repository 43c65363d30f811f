"""Whether an energy is piecewise linear in y, told by the operators of its autograd graph between f and y.

Every function of affine maps and of maxima, minima and choices of entries is piecewise linear; a product is, where one
factor does not depend on y. What is neither on the list of those operators nor on that of smooth ones is not guessed.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


# Linear in all of their inputs, or a choice among them.
_PIECES: Final = _names(
    "Add Sub Rsub Neg Sum Mean Trace Cumsum View UnsafeView ReshapeAlias T Transpose Permute Expand Squeeze",
    "Unsqueeze Slice Select Index UnsafeIndex IndexSelect Gather Take Cat Stack Split SplitWithSizes UnsafeSplit",
    "Unbind Chunk Clone ToCopy Alias Diagonal DiagEmbed Flip Roll Rot90 Repeat AsStrided Unfold Im2Col Col2Im",
    "Tril Triu ConstantPadNd ReflectionPad1D ReflectionPad2D ReplicationPad1D ReplicationPad2D AvgPool2D",
    "AvgPool3D AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D UpsampleNearest1D UpsampleNearest2D UpsampleBilinear2D",
    "UpsampleLinear1D PixelShuffle PixelUnshuffle ChannelShuffle Scatter ScatterAdd SliceScatter SelectScatter",
    "IndexAdd IndexPut IndexPutImpl IndexFill IndexCopy Fill MaskedFill MaskedSelect MaskedScatter Where",
    "NativeBatchNormLegitNoTraining Relu LeakyRelu Threshold Hardtanh Softshrink Abs Maximum Minimum Fmax Fmin",
    "Max Min Amax Amin Aminmax Clamp ClampMin ClampMax MaxPool2D MaxPool2DWithIndices MaxPool3DWithIndices",
    "AdaptiveMaxPool2D Sort Topk Kthvalue Median Cummax Cummin",
)
# Linear in each of two inputs: which they are.
_PRODUCTS: Final = {
    **dict.fromkeys(("Mul", "Mm", "Bmm", "Mv", "Dot", "Vdot", "Matmul", "PreluKernel"), (0, 1)),
    **dict.fromkeys(("Convolution", "CudnnConvolution", "MkldnnConvolution", "SlowConv2D", "Linear"), (0, 1)),
    **dict.fromkeys(("Addmm", "Addbmm", "Baddbmm", "Addmv", "Addr", "Addcmul"), (1, 2)),
}
_SMOOTH: Final = _names(
    "Softplus Exp Exp2 Expm1 Log Log1P Log2 Log10 Logsumexp Logaddexp Logaddexp2 Logcumsumexp Pow Sqrt Rsqrt",
    "Reciprocal Sigmoid LogSigmoid Tanh Elu Celu Silu Gelu Mish Softmax LogSoftmax Norm LinalgVectorNorm Prod Sin",
    "Cos Tan Sinh Cosh Atan Asinh Atan2 Erf Erfc Hypot HuberLoss SmoothL1Loss MseLoss Var VarMean Std StdMean",
    "NativeLayerNorm NativeGroupNorm Cdist Xlogy SpecialEntr",
)
_NORMS: Final = frozenset(("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"))
_COPY: Final = "CopyBackwards"  # into another tensor; it has no number. CopySlices hides what it does to a view.


def is_piecewise_linear(f: Tensor, y: Tensor) -> bool | str:
    """Whether f, which autograd followed from the leaf y, is; or the operator that leaves it open."""
    depends: dict[Any, bool] = {}
    unknown = ""
    for node in _from_the_leaves(f.grad_fn):
        before = [before is not None and depends[before] for before, _ in node.next_functions]
        depends[node] = any(before) or getattr(node, "variable", None) is y
        if not any(before):
            continue
        name = type(node).__name__
        operator = re.fullmatch(r"(\w+?)Backward\d+", name)
        kind = operator[1] if operator else name
        if kind in _SMOOTH:
            return False
        if kind in _PRODUCTS:
            first, second = _PRODUCTS[kind]
            if before[first] and before[second]:
                return False
        elif kind == "Div":
            if before[1]:
                return False
        elif kind in _NORMS:
            if node._saved_training:
                return False
        elif kind not in _PIECES and name != _COPY:
            unknown = unknown or name
    return unknown or True


def _from_the_leaves(root: Any) -> Iterator[Any]:
    """Every node of the graph, after all that it reads."""
    seen: set[Any] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((before, False) for before, _ in node.next_functions)
