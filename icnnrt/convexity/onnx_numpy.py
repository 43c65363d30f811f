"""ONNX operators in plain numpy: slow, short, and independent of onnxruntime.

`operators[op_type](*inputs, **attributes)` on arrays, in the dtype of the inputs; an input that is left out is None.
The signature of each says what it covers: which inputs it needs, which attributes it knows. An operator that is not
here, or a use of one that is not covered, raises `Unsupported` in `run`; a wrong answer is worse than none.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.convexity.memory import Unsupported, again, check_numbers, check_size, take
from icnnrt.format.onnx_graph import DTYPES, MAX_ELEMENTS, Node

Tensor: TypeAlias = NDArray[Any]
Attributes: TypeAlias = Mapping[str, Any]
Inputs: TypeAlias = Sequence[Tensor | None]


def evaluate(
    nodes: Iterable[Node],
    environment: Mapping[str, Tensor],
    *,
    float64: bool = False,
    only: str | None = None,
) -> dict[str, Tensor]:
    """Every value that the nodes make, and what `environment` holds: graph inputs and initialisers.

    float64: compute in float64 throughout, whatever the graph says.
    only: the one value that is wanted; others are dropped once they have been used.
    """
    nodes = tuple(nodes)
    last = {} if only is None else {name: i for i, node in enumerate(nodes) for name in node.inputs if name != only}
    values = {name: promote(array) if float64 else array for name, array in environment.items()}
    with again(), np.errstate(all="ignore"):  # the caller keeps little of it
        for i, node in enumerate(nodes):
            if missing := [name for name in node.inputs if name and name not in values]:
                raise Unsupported(f"{missing[0][:80]!r} is an output that is not known here")
            outputs = run(node, [values[name] if name else None for name in node.inputs])
            for name, array in zip(node.outputs, outputs, strict=False):
                values[name] = promote(array) if float64 else array
                take(values[name].nbytes)
            for name in set(node.inputs) if only is not None else ():
                if last.get(name) == i and name in values and name not in environment:
                    take(-values.pop(name).nbytes)
    return values


def run(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs of one node; whatever does not fit raises `Unsupported`."""
    op = node.op_type[:40]
    operator = operators.get(node.op_type) if not node.domain else None
    if operator is None:
        raise Unsupported(f"the operator {op} is not known here")
    if any(value is None for value in node.attributes.values()):
        raise Unsupported(f"{op} has an attribute of a type that is not known here")
    needed, most, known = _covers(operator)
    if not needed <= len(inputs) <= most or any(array is None for array in inputs[:needed]):
        raise Unsupported(f"{op} has an input too few or too many")
    if known is not None and not known.issuperset(node.attributes):
        raise Unsupported(f"{op} has an attribute that is not known here")
    try:
        check_numbers(_numbers(node, inputs))
        made = operator(*inputs, **node.attributes)
    except Unsupported:
        raise
    except MemoryError as error:
        raise Unsupported(f"{op} takes more memory than there is") from error
    except Exception as error:  # attributes and inputs may be anything
        raise Unsupported(f"{op} cannot be computed ({str(error)[:120]})") from error
    result = tuple(np.asarray(o) for o in (made if isinstance(made, tuple) else (made,)))
    if any(o.size > MAX_ELEMENTS for o in result):
        raise Unsupported(f"{op} makes a value of more than {MAX_ELEMENTS} numbers")
    return result


@functools.cache
def _covers(operator: Callable[..., Any]) -> tuple[int, float, frozenset[str] | None]:
    """How many inputs an operator needs and takes, and which attributes it knows; None of one that looks itself."""
    if isinstance(operator, np.ufunc):  # which would write to an input too many
        return operator.nin, operator.nin, frozenset()
    parameters = inspect.signature(operator).parameters.values()
    kinds = {p.kind for p in parameters}
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return (
        sum(p.default is p.empty for p in places),
        math.inf if inspect.Parameter.VAR_POSITIONAL in kinds else len(places),
        None if inspect.Parameter.VAR_KEYWORD in kinds else named,
    )


_BROADCAST: Final = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Max", "Min", "Sum", "Where", "Clip", "LayerNormalization"),
        *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Xor"),
    )
)


def _numbers(node: Node, inputs: Inputs) -> int:
    """At most how many numbers a node makes at a time, unless its shape is a number that it is given: `check_size`."""
    op, attributes = node.op_type, node.attributes
    there = [array for array in inputs if array is not None]
    if op in ("MatMul", "Gemm"):
        a, b = gemm_operands(attributes, *there[:2]) if op == "Gemm" else there[:2]
        rows, columns = a.shape[-2:-1] or (1,), b.shape[-1:] if b.ndim > 1 else (1,)
        return math.prod((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *rows, *columns))
    if op == "Einsum":
        left, _, made = einsum_equation(attributes).partition("->")
        sizes: dict[str, int] = {}
        for part, array in zip(left.split(","), there, strict=True):
            sizes |= {i: max(s, sizes.get(i, 1)) for i, s in zip(part, array.shape, strict=True)}
        return math.prod(sizes[i] for i in made)
    if op == "Gather" and there[0].ndim:
        picked = there[0].shape[normal(attributes.get("axis", 0), there[0].ndim)]
        return there[1].size * (there[0].size // max(picked, 1))
    if op == "GatherND" and there[1].ndim:
        return there[1].size * math.prod(there[0].shape[there[1].shape[-1] :])
    if op in ("Conv", "AveragePool", "MaxPool"):
        kernel = there[1].shape[2:] if op == "Conv" else attributes["kernel_shape"]
        pads = attributes.get("pads", (0,) * (2 * len(kernel)))
        d = len(kernel)
        places = [s + pads[i] + pads[i + d] for i, s in enumerate(there[0].shape[2 : 2 + d])]
        taps = math.prod(kernel) if op == "Conv" else 1  # which a convolution multiplies with as a matrix
        return math.prod((*there[0].shape[:2], *places, taps))
    total = sum(array.size for array in there)
    if op in _BROADCAST:
        return max(total, math.prod(np.broadcast_shapes(*(array.shape for array in there))))
    return total


# --- What several operators share ----------------------------------------------------------------


def promote(array: Tensor) -> Tensor:
    return array.astype(np.float64) if array.dtype in (np.float32, np.float16) else array


def given(inputs: Inputs, index: int) -> Tensor:
    """An input that must be there."""
    array = optional(inputs, index)
    if array is None:
        raise Unsupported("an input is missing")
    return array


def optional(inputs: Inputs, index: int) -> Tensor | None:
    return inputs[index] if index < len(inputs) else None


def normal(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Unsupported(f"axis {axis} is outside of {rank} dimensions")
    return axis % rank


def axes_of(rank: int, *places: Iterable[int] | None) -> tuple[int, ...] | None:
    """Axes from where they are given: an input (of opset 13 or 18 on), an attribute before; None if nowhere."""
    axes = next((axes for axes in places if axes is not None), None)
    if axes is None:
        return None
    result = tuple(normal(int(a), rank) for a in np.ravel(np.asarray(axes)))
    if len(set(result)) < len(result):
        raise Unsupported("an axis is given twice")
    return result


def reduced_axes(attributes: Attributes, inputs: Inputs) -> tuple[int, ...]:
    """The axes a reduction runs over; () where it hands its input on."""
    rank = given(inputs, 0).ndim
    axes = axes_of(rank, optional(inputs, 1), attributes.get("axes"))
    if axes:
        return axes
    # One entry alone is still summed or normed; only the whole no-op hands it on.
    return () if attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))


def gemm_operands(attributes: Attributes, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if A.ndim != 2 or B.ndim != 2:
        raise Unsupported("Gemm takes matrices")
    return (A.T if attributes.get("transA", 0) else A), (B.T if attributes.get("transB", 0) else B)


def einsum_equation(attributes: Attributes) -> str:
    equation = str(attributes["equation"].decode()).replace(" ", "")
    if "." in equation or "->" not in equation:
        raise Unsupported("Einsum is known here with every index written out alone")
    return equation


def windows(z: Tensor, attributes: Attributes, kernel: Sequence[int], fill: float) -> Tensor:
    """[N, C, *spatial] -> [N, C, *out, *kernel], padded with `fill`."""
    d = len(kernel)
    strides = attributes.get("strides", (1,) * d)
    dilations = attributes.get("dilations", (1,) * d)
    pads = attributes.get("pads", (0,) * (2 * d))
    if (
        attributes.get("auto_pad", b"NOTSET") != b"NOTSET"
        or attributes.get("ceil_mode", 0)
        or z.ndim != d + 2
        or min((*strides, *dilations, *kernel), default=0) < 1
        or min(pads, default=0) < 0
        or not len(strides) == len(dilations) == d == len(pads) // 2
    ):
        raise Unsupported("a convolution or pooling with automatic, negative or rounded-up padding")
    padded_shape = (*z.shape[:2], *(s + pads[i] + pads[i + d] for i, s in enumerate(z.shape[2:])))
    check_size(padded_shape)
    z = np.pad(z, [(0, 0), (0, 0), *((pads[i], pads[i + d]) for i in range(d))], constant_values=fill)
    reach = [(k - 1) * s + 1 for k, s in zip(kernel, dilations, strict=True)]
    if any(r > s for r, s in zip(reach, z.shape[2:], strict=True)):
        raise Unsupported("a kernel is larger than what it runs over")
    view = np.lib.stride_tricks.sliding_window_view(z, reach, axis=tuple(range(2, 2 + d)))
    step = tuple(slice(None, None, s) for s in strides)
    within = tuple(slice(None, None, s) for s in dilations)
    return view[(slice(None), slice(None), *step, *within)]


def convolve(z: Tensor, W: Tensor, attributes: Attributes) -> Tensor:
    groups, d = attributes.get("group", 1), W.ndim - 2
    if d < 1 or groups < 1 or W.shape[0] % groups or z.shape[1] != W.shape[1] * groups:
        raise Unsupported("Conv has channels that do not fit")
    view = windows(z, attributes, W.shape[2:], 0)
    # [N, C, *out, *kernel] x [O, C, *kernel] -> [N, *out, O], group by group
    inner = ([1, *range(2 + d, 2 + 2 * d)], [1, *range(2, 2 + d)])
    parts = zip(np.split(view, groups, 1), np.split(W, groups), strict=True)
    return np.concatenate([np.moveaxis(np.tensordot(part, kernels, inner), -1, 1) for part, kernels in parts], 1)


def along_channels(array: Tensor, rank: int) -> Tensor:
    """One number a channel, for [N, C, *spatial] of so many dimensions."""
    return array.reshape(-1, *(1,) * (rank - 2))


# --- The operators -------------------------------------------------------------------------------


def _sigmoid(z: Tensor) -> Tensor:
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, e) / (1 + e)


_erf = np.vectorize(math.erf, otypes=[float])


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.kind not in "iu":
        return a / b
    if np.any(b == 0):
        raise Unsupported("an integer is divided by zero")
    return np.trunc(a / b).astype(a.dtype)


def _elu(z: Tensor, alpha: float, scale: float) -> Tensor:
    return np.where(z > 0, z, z.dtype.type(alpha) * np.expm1(np.minimum(z, 0) / z.dtype.type(scale)))


def _clip(z: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    z = z if low is None else np.maximum(z, low)
    return z if high is None else np.minimum(z, high)


def _is_infinite(z: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    return np.isinf(z) & np.where(z > 0, bool(detect_positive), bool(detect_negative))


def _softmax(z: Tensor, *, axis: int = -1) -> Tensor:
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _log_softmax(z: Tensor, *, axis: int = -1) -> Tensor:
    z = z - z.max(axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis, keepdims=True))


def _dtype(number: int) -> np.dtype[Any]:
    if number not in DTYPES:
        raise Unsupported("Cast to a data type that is not known here")
    return DTYPES[number]


def _constant(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
) -> Tensor:
    found: list[Tensor] = [np.asarray(v, np.float32) for v in (value_float, value_floats) if v is not None]
    found += [np.asarray(v, np.int64) for v in (value_int, value_ints) if v is not None]
    (tensor,) = found if value is None else [*found, value]
    return tensor


def _constant_of_shape(shape: Tensor, *, value: Tensor = np.zeros(1, np.float32)) -> Tensor:  # noqa: B008
    return np.full(check_size(shape), value.reshape(-1)[0], value.dtype)


def _reshape(z: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    return z.reshape([z.shape[i] if s == 0 and not allowzero else int(s) for i, s in enumerate(shape)])


def _flatten(z: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + z.ndim if axis < 0 else axis
    return z.reshape(math.prod(z.shape[:axis]), math.prod(z.shape[axis:]))


def _unsqueeze(z: Tensor, given: Tensor | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    added = given if given is not None else np.array(axes)
    return np.expand_dims(z, axes_of(z.ndim + added.size, added) or ())


def _tile(z: Tensor, repeats: Tensor) -> Tensor:
    check_size(s * int(r) for s, r in zip(z.shape, repeats, strict=True))
    return np.tile(z, repeats)


def _slice(z: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    taken = [slice(None)] * z.ndim
    where = axes_of(z.ndim, axes) or tuple(range(len(starts)))
    steps = np.ones_like(starts) if steps is None else steps
    for axis, start, end, step in zip(where, starts, ends, steps, strict=True):
        # As Python slices, but a start before the first entry is that entry, backwards too.
        taken[axis] = slice(max(int(start), -z.shape[axis]), int(end), int(step))
    return z[tuple(taken)]


def _split(z: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    whole = z.shape[normal(axis, z.ndim)]
    if sizes is None:
        if not 1 <= num_outputs <= max(whole, 1):
            raise Unsupported("Split has more parts than there is to split")
        each = -(-whole // num_outputs)
        return tuple(np.split(z, [each * i for i in range(1, num_outputs)], axis))
    if sizes.sum() != whole or np.any(sizes < 0):
        raise Unsupported("the parts of a Split do not make up the whole")
    return tuple(np.split(z, np.cumsum(sizes)[:-1], axis))


def _gather_nd(z: Tensor, index: Tensor, *, batch_dims: int = 0) -> Tensor:
    if index.dtype.kind not in "iu" or not 0 <= batch_dims < min(z.ndim, index.ndim):
        raise Unsupported("the indices of a GatherND are not integers, or its batch dimensions not there")
    if z.shape[:batch_dims] != index.shape[:batch_dims] or not 1 <= index.shape[-1] <= z.ndim - batch_dims:
        raise Unsupported("the indices of a GatherND do not fit what they pick from")
    return z[(*np.ogrid[tuple(map(slice, index.shape[:-1]))][:batch_dims], *np.moveaxis(index, -1, 0))]


def _scatter_nd(z: Tensor, index: Tensor, put: Tensor, *, reduction: bytes = b"none") -> Tensor:
    if reduction != b"none" or index.dtype.kind not in "iu" or not index.ndim:
        raise Unsupported("ScatterND is known here in its plain form alone")
    depth = index.shape[-1]
    if not 1 <= depth <= z.ndim or put.shape != (*index.shape[:-1], *z.shape[depth:]):
        raise Unsupported("the indices and updates of a ScatterND do not fit what they change")
    places = index.reshape(-1, depth) % np.array(z.shape[:depth]) if z.size else index.reshape(-1, depth)
    if len(np.unique(places, axis=0)) < len(places):
        raise Unsupported("ScatterND writes to one place twice")
    result = z.copy()
    result[tuple(np.moveaxis(index, -1, 0))] = put
    return result


def _eye_like(z: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    if z.ndim != 2:
        raise Unsupported("EyeLike takes a matrix")
    return np.eye(z.shape[0], z.shape[1], k).astype(z.dtype if dtype is None else _dtype(dtype))


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, end, step = (array.reshape(-1)[0] for array in (start, limit, delta))
    if step == 0:
        raise Unsupported("Range has a step of zero")
    (count,) = check_size([max(math.ceil((end - first) / step), 0)])
    return (first + np.arange(count) * step).astype(first.dtype)


def _top_k(z: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, ...]:
    count = int(k.reshape(-1)[0])
    if z.dtype.kind != "f" or not 0 <= count <= z.shape[normal(axis, z.ndim)] or not sorted:
        raise Unsupported("TopK is known here of sorted real numbers alone")
    order = np.argsort(-z if largest else z, axis, kind="stable").take(range(count), axis)
    return np.take_along_axis(z, order, axis), order


def _pad(
    z: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: bytes = b"constant"
) -> Tensor:
    if mode != b"constant" or np.any(pads < 0):
        raise Unsupported("Pad adds something else than a constant")
    where = axes_of(z.ndim, axes) or tuple(range(z.ndim))
    widths = [(0, 0)] * z.ndim
    for i, axis in enumerate(where):
        widths[axis] = (int(pads[i]), int(pads[i + len(where)]))
    check_size(s + a + b for s, (a, b) in zip(z.shape, widths, strict=True))
    return np.pad(z, widths, constant_values=0 if value is None else value.reshape(-1)[0])


def _trilu(z: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    return (np.triu if upper else np.tril)(z, 0 if k is None else int(k.reshape(-1)[0]))


def _gemm(A: Tensor, B: Tensor, C: Tensor | None = None, /, **attributes: Any) -> Tensor:
    alpha, beta = (A.dtype.type(attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    P, Q = gemm_operands(attributes, A, B)
    return (P @ Q) * alpha if C is None else (P @ Q) * alpha + C * beta


def _reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reduction from function(z, axis=, keepdims=)."""

    def operator(
        z: Tensor,
        given: Tensor | None = None,
        *,
        axes: Sequence[int] | None = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        over = reduced_axes({"axes": axes, "noop_with_empty_axes": noop_with_empty_axes}, [z, given])
        return function(z, axis=over, keepdims=bool(keepdims)) if over != () else z

    return operator


def _log_sum_exp(z: Tensor, axis: Any, keepdims: bool) -> Tensor:
    shift = z.max(axis, keepdims=True)
    result = shift + np.log(np.exp(z - shift).sum(axis, keepdims=True))
    return result if keepdims else np.squeeze(result, axis)


def _mean(z: Tensor, axis: Any, keepdims: bool) -> Tensor:
    return z.mean(axis=axis, keepdims=keepdims, dtype=z.dtype)


def _conv(z: Tensor, W: Tensor, b: Tensor | None = None, /, **attributes: Any) -> Tensor:
    made = convolve(z, W, attributes)
    return made if b is None else made + along_channels(b, made.ndim)


def _average_pool(z: Tensor, /, **attributes: Any) -> Tensor:
    kernel = attributes["kernel_shape"]
    inner = tuple(range(-len(kernel), 0))
    total = windows(z, attributes, kernel, 0).sum(inner)
    if attributes.get("count_include_pad", 0):
        return total / z.dtype.type(math.prod(kernel))
    return total / windows(np.ones_like(z), attributes, kernel, 0).sum(inner)


def _max_pool(z: Tensor, /, **attributes: Any) -> Tensor:
    kernel = attributes["kernel_shape"]
    lowest = -np.inf if z.dtype.kind == "f" else 0
    return windows(z, attributes, kernel, lowest).max(tuple(range(-len(kernel), 0)))


def _batch_norm(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    if training_mode:
        raise Unsupported("BatchNormalization in training mode mixes samples")
    scale, shift, mean, variance = (along_channels(array, z.ndim) for array in (scale, shift, mean, variance))
    return (z - mean) / np.sqrt(variance + z.dtype.type(epsilon)) * scale + shift


def _layer_norm(
    z: Tensor, scale: Tensor, shift: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    axes = tuple(range(normal(axis, z.ndim), z.ndim))
    centred = z - z.mean(axes, keepdims=True)
    variance = np.square(centred).mean(axes, keepdims=True)
    made = centred / np.sqrt(variance + z.dtype.type(epsilon)) * scale
    return made if shift is None else made + shift


def _cumsum(z: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    if exclusive or reverse:
        raise Unsupported("CumSum is known here in its plain form alone")
    return np.cumsum(z, normal(int(axis.reshape(-1)[0]), z.ndim), dtype=z.dtype)


operators: Final[dict[str, Callable[..., Any]]] = {
    "Abs": np.absolute,
    "Neg": np.negative,
    "Exp": np.exp,
    "Log": np.log,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Relu": lambda z: np.maximum(z, z.dtype.type(0)),
    "Softplus": lambda z: np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))),
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
    "Erf": lambda z: _erf(z).astype(z.dtype),
    "Sin": np.sin,
    "Cos": np.cos,
    "Tan": np.tan,
    "Asin": np.arcsin,
    "Acos": np.arccos,
    "Atan": np.arctan,
    "Sinh": np.sinh,
    "Cosh": np.cosh,
    "Asinh": np.arcsinh,
    "Acosh": np.arccosh,
    "Atanh": np.arctanh,
    "Softsign": lambda z: z / (1 + np.abs(z)),
    "Round": np.rint,
    "Sign": np.sign,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Identity": lambda z: z,
    "Not": np.logical_not,
    "IsNaN": np.isnan,
    "IsInf": _is_infinite,
    "Elu": lambda z, *, alpha=1.0: _elu(z, alpha, 1.0),
    "Celu": lambda z, *, alpha=1.0: _elu(z, alpha, alpha),
    "LeakyRelu": lambda z, *, alpha=0.01: np.where(z < 0, z * z.dtype.type(alpha), z),
    "PRelu": lambda z, slope: np.where(z < 0, z * slope, z),
    "Clip": _clip,
    "Cast": lambda z, *, to, saturate=1: z.astype(_dtype(to)),
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _divide,
    "Pow": lambda a, b: np.power(a, b).astype(a.dtype),
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Equal": np.equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
    "Max": lambda first, *rest: functools.reduce(np.maximum, rest, first),
    "Min": lambda first, *rest: functools.reduce(np.minimum, rest, first),
    "Sum": lambda first, *rest: functools.reduce(np.add, rest, first),
    "Where": lambda condition, a, b: np.where(condition, a, b),
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Shape": lambda z, *, start=0, end=None: np.array(z.shape[start:end], np.int64),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": lambda z, given=None, *, axes=None: np.squeeze(z, axes_of(z.ndim, given, axes)),
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda z, *, perm=None: np.transpose(z, perm),
    "Expand": lambda z, shape: np.broadcast_to(z, check_size(np.broadcast_shapes(z.shape, check_size(shape)))),
    "Tile": _tile,
    "Concat": lambda first, *rest, axis: np.concatenate((first, *rest), axis),
    "Slice": _slice,
    "Split": _split,
    "Gather": lambda z, index, *, axis=0: np.take(z, index, axis),
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
    "EyeLike": _eye_like,
    "Range": _range,
    "Pad": _pad,
    "Trilu": _trilu,
    "MatMul": np.matmul,
    "Gemm": _gemm,
    "Einsum": lambda *several, equation: np.einsum(einsum_equation({"equation": equation}), *several),
    "Conv": _conv,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": lambda z: _mean(z, tuple(range(2, z.ndim)), True),
    "GlobalMaxPool": lambda z: z.max(tuple(range(2, z.ndim)), keepdims=True),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "CumSum": _cumsum,
    "ReduceSum": _reduction(np.sum),
    "ReduceMean": _reduction(_mean),
    "ReduceMax": _reduction(np.max),
    "ReduceMin": _reduction(np.min),
    "ReduceProd": _reduction(np.prod),
    "ReduceL1": _reduction(lambda z, axis, keepdims: np.abs(z).sum(axis, keepdims=keepdims)),
    "ReduceL2": _reduction(lambda z, axis, keepdims: np.sqrt(np.square(z).sum(axis, keepdims=keepdims))),
    "ReduceSumSquare": _reduction(lambda z, axis, keepdims: np.square(z).sum(axis, keepdims=keepdims)),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
}
