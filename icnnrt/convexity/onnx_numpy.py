"""ONNX operators in plain numpy: slow, short, and independent of onnxruntime.

`operators[op_type](attributes, inputs) -> outputs` on arrays, in the dtype of the inputs. An operator that is not here,
or a use of one that is not covered, raises `Unsupported`; a wrong answer is worse than none.

A graph of a few bytes can ask for any amount of memory. In a call by `call_bounded`, all values that are kept share
one bound, and a value that would take more than a part of what is left is refused before it is made.
"""

import contextvars
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from icnnrt.format.onnx_graph import DTYPES, MAX_ELEMENTS, Node

Tensor: TypeAlias = NDArray[Any]
Attributes: TypeAlias = Mapping[str, Any]
Inputs: TypeAlias = Sequence[Tensor | None]
Operator: TypeAlias = Callable[[Attributes, Inputs], tuple[Tensor, ...]]


class Unsupported(Exception):
    """An operator, or a use of one, that this reading of ONNX does not cover; the text says which."""


# --- Memory --------------------------------------------------------------------------------------

# Bytes that the values of one evaluation may take together: as many for any graph, and so many times what its own
# tensors and weights take, which somebody had to store.
MEMORY: Final = 1 << 30
SHARE: Final = 16
# Of what is left, the part that one value may take: what an operator makes on its way is a few times its result.
PART: Final = 4


class _Memory:
    """What is left of the bound."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise Unsupported("all values up to here take more memory than is given to them")

    @property
    def numbers(self) -> int:
        """How many numbers one value may have."""
        return self.left // (8 * PART)


_memory: ContextVar[_Memory | None] = ContextVar("memory", default=None)


P = ParamSpec("P")
R = TypeVar("R")


def call_bounded(given: Iterable[Tensor], function: Callable[P, R], *args: P.args, **keywords: P.kwargs) -> R:
    """Call a function with a bound on the values that it makes; `given` are the tensors that there are."""
    context = contextvars.copy_context()  # which nothing has to undo, whatever interrupts the call
    context.run(_memory.set, _Memory(MEMORY + SHARE * sum(array.nbytes for array in given)))
    return context.run(function, *args, **keywords)


@contextmanager
def again() -> Iterator[None]:
    """What the block keeps is given back at its end."""
    memory = _memory.get()
    before = memory.left if memory else 0
    try:
        yield
    finally:
        if memory:
            memory.left = before


def take(size: int) -> None:
    """Count bytes that will be kept; `Unsupported` where they are too many."""
    memory = _memory.get()
    if memory is not None:
        memory.take(size)


# --- Evaluation ----------------------------------------------------------------------------------


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
    """The outputs of one node; whatever does not fit raises Unsupported."""
    operator = operators.get(node.op_type) if not node.domain else None
    if operator is None:
        raise Unsupported(f"the operator {node.op_type[:40]} is not known here")
    if any(value is None for value in node.attributes.values()):
        raise Unsupported(f"{node.op_type[:40]} has an attribute of a type that is not known here")
    try:
        check_numbers(_numbers(node, inputs))
        outputs = operator(node.attributes, inputs)
    except Unsupported:
        raise
    except MemoryError as error:
        raise Unsupported(f"{node.op_type[:40]} takes more memory than there is") from error
    except Exception as error:  # attributes and inputs may be anything
        raise Unsupported(f"{node.op_type[:40]} cannot be computed ({str(error)[:120]})") from error
    result = tuple(np.asarray(o) for o in outputs)
    if any(o.size > MAX_ELEMENTS for o in result):
        raise Unsupported(f"{node.op_type[:40]} makes a value of more than {MAX_ELEMENTS} numbers")
    return result


def _numbers(node: Node, inputs: Inputs) -> int:
    """At most how many numbers a node makes at a time, unless its shape is a number that it is given: `check_size`."""
    op, attributes = node.op_type, node.attributes
    there = [array for array in inputs if array is not None]
    if op in ("MatMul", "Gemm") and len(there) >= 2:
        a, b = gemm_operands(attributes, inputs) if op == "Gemm" else there[:2]
        rows, columns = a.shape[-2:-1] or (1,), b.shape[-1:] if b.ndim > 1 else (1,)
        return math.prod((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *rows, *columns))
    if op == "Einsum":
        equation = einsum_equation(attributes)
        left, _, made = equation.partition("->")
        sizes: dict[str, int] = {}
        for part, array in zip(left.split(","), there, strict=True):
            sizes |= {i: max(s, sizes.get(i, 1)) for i, s in zip(part, array.shape, strict=True)}
        return math.prod(sizes[i] for i in made)
    if op == "Gather" and len(there) == 2 and there[0].ndim:
        picked = there[0].shape[normal(attributes.get("axis", 0), there[0].ndim)]
        return there[1].size * (there[0].size // max(picked, 1))
    if op == "GatherND" and len(there) == 2 and there[1].ndim:
        return there[1].size * math.prod(there[0].shape[there[1].shape[-1] :])
    if op in ("Conv", "AveragePool", "MaxPool") and there:
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


_BROADCAST: Final = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Max", "Min", "Sum", "Where", "Clip", "LayerNormalization"),
        *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Xor"),
    )
)


def promote(array: Tensor) -> Tensor:
    return array.astype(np.float64) if array.dtype in (np.float32, np.float16) else array


def given(inputs: Inputs, index: int) -> Tensor:
    """An input that must be there."""
    if index >= len(inputs):
        raise Unsupported("an input is missing")
    array = inputs[index]
    if array is None:
        raise Unsupported("an input is missing")
    return array


def optional(inputs: Inputs, index: int) -> Tensor | None:
    return inputs[index] if index < len(inputs) else None


def axes_of(attributes: Attributes, inputs: Inputs, rank: int, index: int = 1) -> tuple[int, ...] | None:
    """Axes from the input (opset 13 and 18 on) or the attribute before; None where they are left out."""
    array = optional(inputs, index)
    axes = attributes.get("axes") if array is None else tuple(int(a) for a in array.reshape(-1))
    if axes is None:
        return None
    result = tuple(normal(a, rank) for a in axes)
    if len(set(result)) < len(result):
        raise Unsupported("an axis is given twice")
    return result


def normal(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Unsupported(f"axis {axis} is outside of {rank} dimensions")
    return axis % rank


def check_size(shape: Iterable[int]) -> tuple[int, ...]:
    """Refuse a size before it is allocated."""
    sizes = tuple(int(s) for s in shape)
    numbers = math.prod(max(s, 1) for s in sizes)
    if any(s < 0 for s in sizes) or numbers > MAX_ELEMENTS:
        raise Unsupported(f"the shape {str(sizes)[:80]} is impossible")
    check_numbers(numbers)
    return sizes


def check_numbers(numbers: int) -> None:
    """Refuse a value of so many numbers before it is made."""
    memory = _memory.get()
    if numbers > MAX_ELEMENTS or (memory is not None and numbers > memory.numbers):
        raise Unsupported(f"a value of {numbers} numbers takes more memory than is given to it")


# --- Entry by entry ------------------------------------------------------------------------------


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda attributes, inputs: (function(given(inputs, 0)),)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def operator(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
        a, b = given(inputs, 0), given(inputs, 1)
        check_size(np.broadcast_shapes(a.shape, b.shape))
        return (function(a, b),)

    return operator


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def operator(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
        result = given(inputs, 0)
        for i in range(1, len(inputs)):
            result = function(result, given(inputs, i))
        return (result,)

    return operator


def softplus(z: Tensor) -> Tensor:
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def sigmoid(z: Tensor) -> Tensor:
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, e) / (1 + e)


_erf = np.vectorize(math.erf, otypes=[float])


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.kind in "iu":
        return np.trunc(a / b).astype(a.dtype) if np.all(b != 0) else _zero_divisor()
    return a / b


def _zero_divisor() -> Tensor:
    raise Unsupported("an integer is divided by zero")


def _elu(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, alpha = given(inputs, 0), z_type(inputs, attributes.get("alpha", 1.0))
    return (np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0))),)


def _celu(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, alpha = given(inputs, 0), z_type(inputs, attributes.get("alpha", 1.0))
    return (np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0) / alpha)),)


def _leaky(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z = given(inputs, 0)
    return (np.where(z < 0, z * z_type(inputs, attributes.get("alpha", 0.01)), z),)


def z_type(inputs: Inputs, number: float) -> Any:
    return given(inputs, 0).dtype.type(number)


def _clip(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, low, high = given(inputs, 0), optional(inputs, 1), optional(inputs, 2)
    for bound, function in ((low, np.maximum), (high, np.minimum)):
        z = z if bound is None else function(z, bound)
    return (z,)


def _where(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    return (np.where(given(inputs, 0), given(inputs, 1), given(inputs, 2)),)


def _softmax(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, axis = given(inputs, 0), attributes.get("axis", -1)
    e = np.exp(z - z.max(axis, keepdims=True))
    return (e / e.sum(axis, keepdims=True),)


def _log_softmax(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, axis = given(inputs, 0), attributes.get("axis", -1)
    z = z - z.max(axis, keepdims=True)
    return (z - np.log(np.exp(z).sum(axis, keepdims=True)),)


def _cast(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    dtype = DTYPES.get(attributes["to"])
    if dtype is None:
        raise Unsupported("Cast to a data type that is not known here")
    return (given(inputs, 0).astype(dtype),)


# --- Shapes and places ---------------------------------------------------------------------------


def _constant(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    for key, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        if key in attributes:
            return (np.array(attributes[key], dtype),)
    for key, dtype in (("value_floats", np.float32), ("value_ints", np.int64)):
        if key in attributes:
            return (np.array(attributes[key], dtype),)
    return (attributes["value"],)


def _constant_of_shape(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    value = attributes.get("value", np.zeros(1, np.float32))
    return (np.full(check_size(given(inputs, 0)), value.reshape(-1)[0], value.dtype),)


def _shape(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    shape = given(inputs, 0).shape
    return (np.array(shape[attributes.get("start", 0) : attributes.get("end", len(shape))], np.int64),)


def _reshape(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, wanted = given(inputs, 0), [int(s) for s in given(inputs, 1)]
    if not attributes.get("allowzero", 0):
        wanted = [z.shape[i] if s == 0 else s for i, s in enumerate(wanted)]
    return (z.reshape(wanted),)


def _flatten(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, axis = given(inputs, 0), attributes.get("axis", 1)
    axis = axis + z.ndim if axis < 0 else axis
    return (z.reshape(math.prod(z.shape[:axis]), math.prod(z.shape[axis:])),)


def _squeeze(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z = given(inputs, 0)
    return (np.squeeze(z, axes_of(attributes, inputs, z.ndim)),)


def _unsqueeze(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z = given(inputs, 0)
    array = optional(inputs, 1)
    count = len(attributes["axes"]) if array is None else array.size
    return (np.expand_dims(z, axes_of(attributes, inputs, z.ndim + count) or ()),)


def _transpose(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    return (np.transpose(given(inputs, 0), attributes.get("perm")),)


def _expand(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z = given(inputs, 0)
    shape = np.broadcast_shapes(z.shape, check_size(given(inputs, 1)))
    return (np.broadcast_to(z, check_size(shape)),)


def _tile(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, repeats = given(inputs, 0), [int(r) for r in given(inputs, 1)]
    check_size(s * r for s, r in zip(z.shape, repeats, strict=True))
    return (np.tile(z, repeats),)


def _concat(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    return (np.concatenate([given(inputs, i) for i in range(len(inputs))], attributes["axis"]),)


def slices(attributes: Attributes, inputs: Inputs) -> tuple[slice, ...]:
    """What a Slice takes, one slice an axis; a whole slice(None) where it names none."""
    z, starts, ends = given(inputs, 0), given(inputs, 1), given(inputs, 2)
    axes = axes_of({}, inputs, z.ndim, 3) or tuple(range(len(starts)))
    steps = optional(inputs, 4)
    taken = [slice(None)] * z.ndim
    for i, axis in enumerate(axes):
        step, size = 1 if steps is None else int(steps[i]), z.shape[axis]
        start, end = int(starts[i]), int(ends[i])
        if step == 0:
            raise Unsupported("Slice has a step of zero")
        start, end = (v + size if v < 0 else v for v in (start, end))
        if step > 0:
            taken[axis] = slice(min(max(start, 0), size), min(max(end, 0), size), step)
        else:
            end = min(max(end, -1), size - 1)
            taken[axis] = slice(min(max(start, 0), size - 1), None if end < 0 else end, step)
    return tuple(taken)


def _slice(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    return (given(inputs, 0)[slices(attributes, inputs)],)


def _split(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z = given(inputs, 0)
    axis = normal(attributes.get("axis", 0), z.ndim)
    sizes = optional(inputs, 1)
    if sizes is None:
        parts = attributes["num_outputs"]
        if not 1 <= parts <= max(z.shape[axis], 1):
            raise Unsupported("Split has more parts than there is to split")
        each = -(-z.shape[axis] // parts)
        cuts = [each * i for i in range(1, parts)]
    else:
        if sizes.sum() != z.shape[axis] or np.any(sizes < 0):
            raise Unsupported("the parts of a Split do not make up the whole")
        cuts = list(np.cumsum(sizes)[:-1])
    return tuple(np.split(z, cuts, axis))


def _gather(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, index = given(inputs, 0), given(inputs, 1)
    axis = normal(attributes.get("axis", 0), z.ndim)
    if index.dtype.kind not in "iu":
        raise Unsupported("the indices of a Gather are not integers")
    return (np.take(z, index, axis),)


def _gather_nd(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, index, batch = given(inputs, 0), given(inputs, 1), attributes.get("batch_dims", 0)
    if index.dtype.kind not in "iu" or not 0 <= batch < min(z.ndim, index.ndim):
        raise Unsupported("the indices of a GatherND are not integers, or its batch dimensions not there")
    if z.shape[:batch] != index.shape[:batch] or not 1 <= index.shape[-1] <= z.ndim - batch:
        raise Unsupported("the indices of a GatherND do not fit what they pick from")
    places = [*np.ogrid[tuple(slice(s) for s in index.shape[:-1])][:batch], *np.moveaxis(index, -1, 0)]
    return (z[tuple(places)],)


def _scatter_nd(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, index, put = (given(inputs, i) for i in range(3))
    if attributes.get("reduction", b"none") != b"none" or index.dtype.kind not in "iu" or not index.ndim:
        raise Unsupported("ScatterND is known here in its plain form alone")
    depth = index.shape[-1]
    if not 1 <= depth <= z.ndim or put.shape != (*index.shape[:-1], *z.shape[depth:]):
        raise Unsupported("the indices and updates of a ScatterND do not fit what they change")
    places = index.reshape(-1, depth) % np.array(z.shape[:depth]) if z.size else index.reshape(-1, depth)
    if len(np.unique(places, axis=0)) < len(places):
        raise Unsupported("ScatterND writes to one place twice")
    result = z.copy()
    result[tuple(np.moveaxis(index, -1, 0))] = put
    return (result,)


def _eye_like(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z = given(inputs, 0)
    dtype = DTYPES.get(attributes["dtype"]) if "dtype" in attributes else z.dtype
    if z.ndim != 2 or dtype is None:
        raise Unsupported("EyeLike takes a matrix, and data types that are known here")
    return (np.eye(z.shape[0], z.shape[1], attributes.get("k", 0)).astype(dtype),)


def _range(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    start, limit, delta = (given(inputs, i).reshape(-1)[0] for i in range(3))
    if delta == 0:
        raise Unsupported("Range has a step of zero")
    (count,) = check_size([max(math.ceil((limit - start) / delta), 0)])
    return ((start + np.arange(count) * delta).astype(start.dtype),)


def _top_k(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, k = given(inputs, 0), int(given(inputs, 1).reshape(-1)[0])
    axis = normal(attributes.get("axis", -1), z.ndim)
    if z.dtype.kind != "f" or not 0 <= k <= z.shape[axis] or not attributes.get("sorted", 1):
        raise Unsupported("TopK is known here of sorted real numbers alone")
    order = np.argsort(-z if attributes.get("largest", 1) else z, axis, kind="stable").take(range(k), axis)
    return np.take_along_axis(z, order, axis), order


def _pad(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, pads, value = given(inputs, 0), given(inputs, 1), optional(inputs, 2)
    if attributes.get("mode", b"constant") != b"constant" or np.any(pads < 0):
        raise Unsupported("Pad adds something else than a constant")
    axes = axes_of({}, inputs, z.ndim, 3) or tuple(range(z.ndim))
    widths = [(0, 0)] * z.ndim
    for i, axis in enumerate(axes):
        widths[axis] = (int(pads[i]), int(pads[i + len(axes)]))
    check_size(s + a + b for s, (a, b) in zip(z.shape, widths, strict=True))
    return (np.pad(z, widths, constant_values=0 if value is None else value.reshape(-1)[0]),)


def _trilu(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, k = given(inputs, 0), optional(inputs, 1)
    part = np.triu if attributes.get("upper", 1) else np.tril
    return (part(z, 0 if k is None else int(k.reshape(-1)[0])),)


# --- Sums of products ----------------------------------------------------------------------------


def _matmul(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    return (np.matmul(given(inputs, 0), given(inputs, 1)),)


def _gemm(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    A, B = gemm_operands(attributes, inputs)
    result = (A @ B) * z_type(inputs, attributes.get("alpha", 1.0))
    C = optional(inputs, 2)
    return (result if C is None else result + C * z_type(inputs, attributes.get("beta", 1.0)),)


def gemm_operands(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, Tensor]:
    A, B = given(inputs, 0), given(inputs, 1)
    if A.ndim != 2 or B.ndim != 2:
        raise Unsupported("Gemm takes matrices")
    return (A.T if attributes.get("transA", 0) else A), (B.T if attributes.get("transB", 0) else B)


def einsum_equation(attributes: Attributes) -> str:
    equation = str(attributes["equation"].decode()).replace(" ", "")
    if "." in equation or "->" not in equation:
        raise Unsupported("Einsum is known here with every index written out alone")
    return equation


def _einsum(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    return (np.einsum(einsum_equation(attributes), *(given(inputs, i) for i in range(len(inputs)))),)


def reduction(function: Callable[..., Tensor]) -> Operator:
    """A reduction from function(z, axis=, keepdims=)."""

    def operator(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
        z = given(inputs, 0)
        axes = reduced_axes(attributes, inputs)
        return (function(z, axis=axes, keepdims=bool(attributes.get("keepdims", 1))),) if axes != () else (z,)

    return operator


def reduced_axes(attributes: Attributes, inputs: Inputs) -> tuple[int, ...]:
    """The axes a reduction runs over; () where it hands its input on."""
    rank = given(inputs, 0).ndim
    axes = axes_of(attributes, inputs, rank)
    if axes:
        return axes
    # One entry alone is still summed or normed; only the whole no-op hands it on.
    return () if attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))


def _log_sum_exp(z: Tensor, axis: Any, keepdims: bool) -> Tensor:
    shift = z.max(axis, keepdims=True)
    result = shift + np.log(np.exp(z - shift).sum(axis, keepdims=True))
    return result if keepdims else np.squeeze(result, axis)


def _mean_of(z: Tensor, axis: Any, keepdims: bool) -> Tensor:
    return z.mean(axis=axis, keepdims=keepdims, dtype=z.dtype)


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
    out = []
    for g in range(groups):
        channels = slice(g * W.shape[1], (g + 1) * W.shape[1])
        kernels = W[g * (W.shape[0] // groups) : (g + 1) * (W.shape[0] // groups)]
        # [N, C, *out, *kernel] x [O, C, *kernel] -> [N, *out, O]
        inner = [1, *range(2 + d, 2 + 2 * d)]
        out.append(np.moveaxis(np.tensordot(view[:, channels], kernels, (inner, [1, *range(2, 2 + d)])), -1, 1))
    return np.concatenate(out, 1)


def _conv(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z = convolve(given(inputs, 0), given(inputs, 1), attributes)
    b = optional(inputs, 2)
    return (z if b is None else z + b.reshape(-1, *(1,) * (z.ndim - 2)),)


def _average_pool(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, kernel = given(inputs, 0), attributes["kernel_shape"]
    inner = tuple(range(-len(kernel), 0))
    total = windows(z, attributes, kernel, 0).sum(inner)
    if attributes.get("count_include_pad", 0):
        return (total / z.dtype.type(math.prod(kernel)),)
    return (total / windows(np.ones_like(z), attributes, kernel, 0).sum(inner),)


def _max_pool(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, kernel = given(inputs, 0), attributes["kernel_shape"]
    lowest = -np.inf if z.dtype.kind == "f" else 0
    return (windows(z, attributes, kernel, lowest).max(tuple(range(-len(kernel), 0))),)


def _global(function: Callable[..., Tensor]) -> Operator:
    def operator(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
        z = given(inputs, 0)
        return (function(z, axis=tuple(range(2, z.ndim)), keepdims=True),)

    return operator


def _batch_norm(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    if attributes.get("training_mode", 0):
        raise Unsupported("BatchNormalization in training mode mixes samples")
    z = given(inputs, 0)
    scale, shift, mean, variance = (given(inputs, i).reshape(-1, *(1,) * (z.ndim - 2)) for i in range(1, 5))
    return ((z - mean) / np.sqrt(variance + z_type(inputs, attributes.get("epsilon", 1e-5))) * scale + shift,)


def _layer_norm(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    z, scale, shift = given(inputs, 0), given(inputs, 1), optional(inputs, 2)
    axes = tuple(range(normal(attributes.get("axis", -1), z.ndim), z.ndim))
    mean = z.mean(axes, keepdims=True)
    variance = np.square(z - mean).mean(axes, keepdims=True)
    z = (z - mean) / np.sqrt(variance + z_type(inputs, attributes.get("epsilon", 1e-5))) * scale
    return (z if shift is None else z + shift,)


def _cumsum(attributes: Attributes, inputs: Inputs) -> tuple[Tensor, ...]:
    if attributes.get("exclusive", 0) or attributes.get("reverse", 0):
        raise Unsupported("CumSum is known here in its plain form alone")
    z = given(inputs, 0)
    return (np.cumsum(z, normal(int(given(inputs, 1).reshape(-1)[0]), z.ndim), dtype=z.dtype),)


operators: Final[dict[str, Operator]] = {
    "Abs": _unary(np.abs),
    "Neg": _unary(np.negative),
    "Exp": _unary(np.exp),
    "Log": _unary(np.log),
    "Sqrt": _unary(np.sqrt),
    "Reciprocal": _unary(np.reciprocal),
    "Relu": _unary(lambda z: np.maximum(z, z.dtype.type(0))),
    "Softplus": _unary(softplus),
    "Sigmoid": _unary(sigmoid),
    "Tanh": _unary(np.tanh),
    "Erf": _unary(lambda z: _erf(z).astype(z.dtype)),
    "Sin": _unary(np.sin),
    "Cos": _unary(np.cos),
    "Tan": _unary(np.tan),
    "Asin": _unary(np.arcsin),
    "Acos": _unary(np.arccos),
    "Atan": _unary(np.arctan),
    "Sinh": _unary(np.sinh),
    "Cosh": _unary(np.cosh),
    "Asinh": _unary(np.arcsinh),
    "Acosh": _unary(np.arccosh),
    "Atanh": _unary(np.arctanh),
    "Softsign": _unary(lambda z: z / (1 + np.abs(z))),
    "Round": _unary(np.round),
    "Sign": _unary(np.sign),
    "Floor": _unary(np.floor),
    "Ceil": _unary(np.ceil),
    "Identity": _unary(lambda z: z),
    "Not": _unary(np.logical_not),
    "IsNaN": _unary(np.isnan),
    "IsInf": _unary(np.isinf),
    "Elu": _elu,
    "Celu": _celu,
    "LeakyRelu": _leaky,
    "Clip": _clip,
    "Cast": _cast,
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _binary(_divide),
    "Pow": _binary(lambda a, b: np.power(a, b).astype(a.dtype)),
    "PRelu": _binary(lambda z, slope: np.where(z < 0, z * slope, z)),
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Equal": _binary(np.equal),
    "And": _binary(np.logical_and),
    "Or": _binary(np.logical_or),
    "Xor": _binary(np.logical_xor),
    "Max": _many(np.maximum),
    "Min": _many(np.minimum),
    "Sum": _many(np.add),
    "Where": _where,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Shape": _shape,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
    "EyeLike": _eye_like,
    "Range": _range,
    "Pad": _pad,
    "Trilu": _trilu,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Conv": _conv,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": _global(_mean_of),
    "GlobalMaxPool": _global(np.max),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "CumSum": _cumsum,
    "ReduceSum": reduction(np.sum),
    "ReduceMean": reduction(_mean_of),
    "ReduceMax": reduction(np.max),
    "ReduceMin": reduction(np.min),
    "ReduceProd": reduction(np.prod),
    "ReduceL1": reduction(lambda z, axis, keepdims: np.abs(z).sum(axis, keepdims=keepdims)),
    "ReduceL2": reduction(lambda z, axis, keepdims: np.sqrt(np.square(z).sum(axis, keepdims=keepdims))),
    "ReduceSumSquare": reduction(lambda z, axis, keepdims: np.square(z).sum(axis, keepdims=keepdims)),
    "ReduceLogSumExp": reduction(_log_sum_exp),
}
