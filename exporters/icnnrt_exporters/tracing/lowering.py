"""Operators that are rewritten in the traced energy, before any derivative is taken.

A rewritten operator needs no backward rule of its own: its derivatives are those of what it became.

- convolutions, plain and transposed, in float64 (ONNX Runtime has no such kernel) and with groups (whose second
  derivative in torch fixes the batch); others stay Conv, with the rule of `convolution`;
- pooling: mean, maximum, and their adaptive forms;
- interpolation, and padding by reflection or replication: all linear, one matrix a dimension;
- quadratic programs, whose operator torch.func cannot differentiate as it stands;
- batch norm in its eval form, the absolute value, and steps (sign, floor, ...), whose second derivatives in torch fix
  the batch too;
- softplus with torch's threshold of 20, see `smooth_softplus`: the step down at the threshold is not convex.

The matrices are constants of the graph: they join the tensors that the forward creates itself.
"""

import operator as python
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from icnnrt.errors import ExportError
from icnnrt_exporters.tracing import windows
from icnnrt_exporters.tracing.place import operator, place
from icnnrt_exporters.tracing.smooth_softplus import smooth_threshold
from icnnrt_models.layers.qp_operators import differentiable, whole

aten = torch.ops.aten

CONVOLUTION = aten.convolution.default


def _by_dimensions(names: Iterable[str]) -> dict[Any, int]:
    return {getattr(aten, name).default: D for D, name in enumerate(names, 1)}


AVERAGE_POOLS = _by_dimensions(("avg_pool1d", "avg_pool2d", "avg_pool3d"))
ADAPTIVE_AVERAGES = _by_dimensions(("adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"))
MAXIMUM_POOLS = _by_dimensions(f"max_pool{D}d_with_indices" for D in (1, 2, 3))
ADAPTIVE_MAXIMA = _by_dimensions(f"adaptive_max_pool{D}d" for D in (1, 2, 3))
PADS = _by_dimensions(f"reflection_pad{D}d" for D in (1, 2, 3))
PADS |= _by_dimensions(f"replication_pad{D}d" for D in (1, 2, 3))
# Number of dimensions, and whether the operator has align_corners; both overloads of each.
INTERPOLATIONS = {
    overload: kind
    for packet, kind in (
        (aten.upsample_nearest1d, (1, False)),
        (aten.upsample_nearest2d, (2, False)),
        (aten.upsample_nearest3d, (3, False)),
        (aten.upsample_linear1d, (1, True)),
        (aten.upsample_bilinear2d, (2, True)),
        (aten.upsample_trilinear3d, (3, True)),
        (aten.upsample_bicubic2d, (2, True)),
    )
    for overload in (packet.default, packet.vec)
}
# Piecewise constant: their derivative is zero.
STEPS = frozenset(
    {aten.sign.default, aten.sgn.default, aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default}
)

# Composite operators that torch.export keeps whole, to be opened so that the ones above show.
COMPOSITE = (
    aten.conv1d,
    aten.conv2d,
    aten.conv3d,
    aten.conv_transpose1d,
    aten.conv_transpose2d,
    aten.conv_transpose3d,
    aten.max_pool1d,
    aten.max_pool2d,
    aten.max_pool3d,
    aten.adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d,
    aten.pad,
    aten._pad_enum,
)


def opened() -> dict[Any, Callable[..., Any]]:
    """The table for torch.export's run_decompositions that opens composite operators."""
    table = torch.export.default_decompositions()
    overloads = [getattr(packet, name) for packet in COMPOSITE for name in packet.overloads()]
    return {overload: table[overload] for overload in overloads if overload in table}


def lower(module: fx.GraphModule) -> None:
    """Rewrite, in place, every node of `module` that the lists above name.

    Raises ExportError where the form of an operator is not covered.
    """
    constants = _Constants(module)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.view.default:
            # What a rewritten operator returns need not lie in memory as the operator's own result did.
            node.target = aten.reshape.default
        elif node.target is CONVOLUTION:
            _convolution(node, constants)
        elif node.target is aten.abs.default:
            _become(node, absolute, node.args)
        elif node.target in STEPS:
            _become(node, partial(_flat, node.target), node.args)
        elif node.target is aten.softplus.default:
            a = _arguments(node)
            node.args, node.kwargs = (*(a[name] for name in ("self", "beta")), smooth_threshold(a["threshold"])), {}
        elif node.target is torch.ops.icnnrt.qp_solve.default:
            # Under the transforms of torch.func too; what is exported has the gradient at the answer, none smoothed.
            _become(node, differentiable, whole(node.args)[:14])
        elif node.target in (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default):
            _batch_norm(node)
        elif node.target in INTERPOLATIONS:
            _interpolation(node, constants, *INTERPOLATIONS[node.target])
        else:
            for dimensions, rewrite in BY_MATRICES:
                if node.target in dimensions:
                    rewrite(node, constants, dimensions[node.target])
                    break


class _Constants:
    """Matrices put into the graph as get_attr nodes, equal ones once."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._names: dict[tuple[Any, ...], str] = {}

    def __call__(self, before: fx.Node, key: tuple[Any, ...], make: Callable[[], Tensor]) -> fx.Node:
        if key not in self._names:
            count = len(self._names)
            while hasattr(self._module, f"_window_{count}"):
                count += 1
            self._names[key] = f"_window_{count}"
            self._module.register_buffer(self._names[key], make())
        name = self._names[key]
        with self._module.graph.inserting_before(before):
            constant = self._module.graph.get_attr(name)
        constant.meta["val"] = self._module.get_buffer(name)
        return constant


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found = {}
    for i, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
    return found


def _fixed(node: fx.Node, sizes: Sequence[Any]) -> list[int]:
    """Sizes that must not depend on the batch."""
    if not all(isinstance(size, int) for size in sizes):
        raise ExportError(
            f"energy: {operator(node)} {place(node)} slides over a dimension that depends on the batch; give it the "
            "batch as its first dimension alone"
        )
    return list(sizes)


def _shapes(node: fx.Node, source: fx.Node, D: int) -> tuple[list[int], list[int], torch.dtype]:
    """(N, N', dtype) of the last D dimensions."""
    val = node.meta["val"]
    val = val[0] if isinstance(val, tuple | list) else val
    return _fixed(node, source.meta["val"].shape[-D:]), _fixed(node, val.shape[-D:]), val.dtype


def _each(value: Any, D: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * D if len(values) == 1 else values


def _windows(*each: Sequence[int]) -> list[windows.Window]:
    """(N, N', k, s, p, d) of every dimension, from a list of each."""
    return [(N, places, k, s, p, d) for N, places, k, s, p, d in zip(*each, strict=True)]


def _become(node: fx.Node, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # The note of what it was stays, for sentences that name it.
    node.meta["lowered_from"] = operator(node)
    node.target, node.args, node.kwargs = function, arguments, {}


def absolute(x: Tensor) -> Tensor:
    """|x| as x sign(x), the sign a constant: the same derivatives as torch's, 0 at 0."""
    return x * torch.sign(x.detach())


def _flat(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return step(x.detach())


def normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """(x − mean) w/√(variance + eps) + b for every channel, which is dimension 1."""
    shape = [1, -1, *[1] * (x.dim() - 2)]
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    y = (x - mean.reshape(shape)) * scale.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _batch_norm(node: fx.Node) -> None:
    a = _arguments(node)
    if a.get("training") or a["running_mean"] is None:
        return
    several = isinstance(node.meta["val"], tuple | list)  # the native operator returns its statistics too, here empty
    arguments = (a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], a["eps"])
    _become(node, _with_statistics if several else normalised, arguments)


def _with_statistics(*arguments: Any) -> tuple[Tensor, None, None]:
    return normalised(*arguments), None, None


def _convolution(node: fx.Node, constants: _Constants) -> None:
    a = _arguments(node)
    x, W = a["input"].meta["val"], a["weight"].meta["val"]
    if x.dtype != torch.float64 and a["groups"] == 1:
        return
    D = x.dim() - 2
    k = _fixed(node, W.shape[2:])
    s, p, d = (_each(a[name], D) for name in ("stride", "padding", "dilation"))
    N, places, dtype = _shapes(node, a["input"], D)
    if a["transposed"]:
        N, places = places, N
    S = [
        constants(node, ("selection", w, dtype), partial(windows.selection, w, dtype))
        for w in _windows(N, places, k, s, p, d)
    ]
    function = windows.convolve_transposed if a["transposed"] else windows.convolve
    _become(node, function, (a["input"], a["weight"], a["bias"], a["groups"], k, *S))


def _average_pool(node: fx.Node, constants: _Constants, D: int) -> None:
    a = _arguments(node)
    x = a.get("self") or a["input"]
    N, places, dtype = _shapes(node, x, D)
    k = _each(a["kernel_size"], D)
    s = _each(a["stride"], D) if a["stride"] else k
    p = _each(a["padding"], D)
    divisor = a.get("divisor_override")
    matrices = []
    for i, w in enumerate(_windows(N, places, k, s, p, [1] * D)):
        if divisor is None:
            count_pad = bool(a["count_include_pad"])
            make = partial(windows.averaging, w, count_pad, dtype)
            matrices.append(constants(node, ("averaging", w, count_pad, dtype), make))
        else:
            scale = 1.0 / divisor if i == 0 else 1.0
            matrices.append(constants(node, ("sum", w, scale, dtype), partial(windows.summing, w, scale, dtype)))
    _become(node, windows.average, (x, *matrices))


def _adaptive_average(node: fx.Node, constants: _Constants, D: int) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    N, places, dtype = _shapes(node, x, D)
    matrices = [
        constants(node, ("adaptive", n, m, dtype), partial(windows.adaptive_averaging, n, m, dtype))
        for n, m in zip(N, places, strict=True)
    ]
    _become(node, windows.average, (x, *matrices))


def _maximum_pool(node: fx.Node, constants: _Constants, D: int) -> None:
    a = _arguments(node)
    x = a.get("self") or a["input"]
    N, places, dtype = _shapes(node, x, D)
    k = _each(a["kernel_size"], D)
    s = _each(a["stride"], D) if a["stride"] else k
    p, d = _each(a["padding"], D), _each(a["dilation"], D)
    tables = [(("taps", w), windows.taps(w, dtype)) for w in _windows(N, places, k, s, p, d)]
    _maximum(node, constants, x, tables, dtype)


def _adaptive_maximum(node: fx.Node, constants: _Constants, D: int) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    N, places, dtype = _shapes(node, x, D)
    tables = [(("adaptive taps", n, m), windows.adaptive_taps(n, m, dtype)) for n, m in zip(N, places, strict=True)]
    _maximum(node, constants, x, tables, dtype)


def _maximum(
    node: fx.Node,
    constants: _Constants,
    x: fx.Node,
    tables: Sequence[tuple[tuple[Any, ...], Tensor]],
    dtype: torch.dtype,
) -> None:
    for user in list(node.users):
        if user.target is not python.getitem or (user.args[1] != 0 and user.users):
            raise ExportError(
                f"energy: the places of the maxima that {operator(node)} {place(node)} returns are used, which cannot "
                "be exported; take return_indices=False and the maxima alone"
            )
    arguments: list[fx.Node] = []
    for key, S in tables:
        m = windows.outside(S)
        for j in range(len(S)):
            arguments.append(constants(node, (*key, j, dtype), S[j].clone))
            arguments.append(constants(node, (*key, j, dtype, "outside"), m[j].clone))
    _become(node, windows.maximum, (x, [len(S) for _, S in tables], *arguments))
    for user in list(node.users):
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)
    node.meta["val"] = node.meta["val"][0]


def _impulses(N: int, D: int, i: int, apply: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix [N, N'] of a linear operator that acts on dimension i of D alone, from its answers to unit vectors."""
    shape = [N, 1, *[1] * D]
    shape[2 + i] = N
    return apply(torch.eye(N, dtype=torch.float64).reshape(shape)).reshape(N, -1).to(dtype)


def _interpolation(node: fx.Node, constants: _Constants, D: int, aligns: bool) -> None:
    a = _arguments(node)
    x = a.get("self") or a["input"]
    N, places, dtype = _shapes(node, x, D)
    align = [a["align_corners"]] if aligns else []
    # One overload takes the scales in a list, the other one by one, the first dimension's first.
    factors = a["scale_factors"] or [None] * D if "scale_factors" in a else None
    scales = factors or [value for name, value in a.items() if name.startswith("scales")]
    plain = node.target.overloadpacket.default  # type: ignore[union-attr]
    matrices = []
    for i, (n, m) in enumerate(zip(N, places, strict=True)):

        def apply(unit: Tensor, i: int = i, m: int = m) -> Tensor:
            size = [m if j == i else 1 for j in range(D)]
            return plain(unit, size, *align, *(scale if j == i else None for j, scale in enumerate(scales)))

        key = ("interpolation", plain, n, m, i, *align, scales[i], dtype)
        matrices.append(constants(node, key, partial(_impulses, n, D, i, apply, dtype)))
    _become(node, windows.average, (x, *matrices))


def _pad(node: fx.Node, constants: _Constants, D: int) -> None:
    x, padding = node.args
    assert isinstance(x, fx.Node)
    target: Any = node.target
    N, _, dtype = _shapes(node, x, D)
    amounts = _fixed(node, padding)  # type: ignore[arg-type]
    matrices = []
    for i, n in enumerate(N):
        # The last dimension's amounts come first.
        own = amounts[2 * (D - 1 - i) : 2 * (D - i)]

        def apply(unit: Tensor, i: int = i, own: list[int] = own) -> Tensor:
            every = [0] * (2 * D)
            every[2 * (D - 1 - i) : 2 * (D - i)] = own
            return target(unit, every)

        key = ("pad", target, n, *own, dtype)
        matrices.append(constants(node, key, partial(_impulses, n, D, i, apply, dtype)))
    _become(node, windows.average, (x, *matrices))


BY_MATRICES = (
    (AVERAGE_POOLS, _average_pool),
    (ADAPTIVE_AVERAGES, _adaptive_average),
    (MAXIMUM_POOLS, _maximum_pool),
    (ADAPTIVE_MAXIMA, _adaptive_maximum),
    (PADS, _pad),
)
