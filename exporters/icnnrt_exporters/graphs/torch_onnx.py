"""What `torch.onnx.export` does over and over, or for nothing, left out."""

import contextlib
import copy
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from icnnrt_exporters.tracing.replaced import replace

aten = torch.ops.aten

MakeTable: TypeAlias = Callable[[set[Any]], dict[Any, Any]]

_EXPORTING = threading.RLock()
# Looks at every pair of nodes for two halves of one tensor: three quarters of the time that simplifying takes.
SLOW_RULES = frozenset({"SlicesSplit"})
# What promoting types puts into a graph, besides another overload of an operator.
PROMOTING = frozenset({"aten::scalar_tensor", "aten::_to_copy"})
# What answers the same of numbers and truth values whatever their type is, or converts them itself.
UNCHANGING = frozenset(
    overload
    for packet in (
        *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.logical_and, aten.logical_or, aten.logical_not),
        *(aten.bitwise_and, aten.bitwise_or, aten.bitwise_not, aten._to_copy, aten.view, aten.expand, aten.unsqueeze),
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
)

# Whose numbers become what the tensor is of, whole ones too.
BOUNDING = frozenset((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default))


@contextlib.contextmanager
def sped_up(graph: torch.fx.Graph) -> Iterator[None]:
    """While it is entered, `torch.onnx.export` takes a third of its time for a program of this graph.

    It gives the same graphs but for `SLOW_RULES`. Of its translations, about 500, it parses the source at every call,
    for a domain that they tell themselves: here none is parsed, and only those are looked at that the graph needs,
    unless an operator has none and is decomposed into others. It tries every rule of simplifying at every node: here
    where the rule's pattern can end. Types are promoted only where there are several, and nothing is computed again for
    it that stays as it is. The table of decompositions is made where something may be in it, once a process, and the
    signature of an operator of ONNX once. All is replaced by name in packages of others: what is not found there is
    left as it is.
    """
    with _EXPORTING, contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, AttributeError):
            # `ops` for what its import registers.
            from onnxscript.function_libs.torch_lib import ops, registration  # noqa: F401
            from torch.onnx._internal.exporter import _fx_passes, _registration
            from torch.onnx._internal.exporter._registration import onnxscript_apis

            if not any(_mixes(node) for node in graph.nodes if node.op == "call_function"):
                replace(stack, _fx_passes, "insert_type_promotion_nodes", lambda module: None)
            names, needed = list(dict(registration.default_registry.items())), _names(graph)
            if needed <= set(names):
                kept = {name.split(".")[0] for name in needed} | PROMOTING
                names = [name for name in names if name[:6] != "aten::" or name.split(".")[0] in kept]
            read = _read_one_by_one(onnxscript_apis.get_torchlib_ops)
            replace(stack, onnxscript_apis, "get_torchlib_ops", lambda: [way for name in names for way in read(name)])
            replace(stack, _registration, "OnnxDecompMeta", _once(_registration.OnnxDecompMeta))
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.fx.passes import type_promotion

            replace(stack, type_promotion._TypePromotionInterpreter, "run_node", _promoted(type_promotion))
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter import _decomp

            make = _decomp.create_onnx_friendly_decomposition_table
            replace(stack, _decomp, "create_onnx_friendly_decomposition_table", _selected(make, graph))
        with contextlib.suppress(ImportError, AttributeError):
            from onnx_ir.schemas import OpSignature

            replace(stack, OpSignature, "from_op_schema", _once_a_schema(OpSignature.from_op_schema))
        with contextlib.suppress(ImportError, AttributeError):
            from onnxscript import rewriter

            replace(stack, rewriter, "_DEFAULT_REWRITE_RULES", _quick(rewriter._DEFAULT_REWRITE_RULES))
        yield


def _promoted(type_promotion: Any) -> Callable[[Any, torch.fx.Node], Any]:
    """A step of the pass that promotes types, which computes a node anew only where it changes it: a node knows its
    value."""

    def run_node(interpreter: Any, node: torch.fx.Node) -> Any:
        if "val" not in node.meta:
            return torch.fx.Interpreter.run_node(interpreter, node)
        if rule := type_promotion.get_type_promotion_rule(node, interpreter.type_promotion_table):
            with interpreter._set_current_node(node):
                interpreter._maybe_promote_node(node, rule)
        return node.meta["val"]

    return run_node


@functools.cache
def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    return functools.cache(make)


@functools.cache
def _read_one_by_one(read: Callable[[], list[Any]]) -> Callable[[str], list[Any]]:
    """name -> the translations that go by it, read when first asked for."""
    from onnxscript import TracedOnnxFunction
    from onnxscript.function_libs.torch_lib import registration

    everything = dict(registration.default_registry.items())
    # Of the function that its source is parsed for, the domain alone is asked.
    unread = property(lambda traced: types.SimpleNamespace(domain=traced.opset.domain))

    def of(name: str) -> list[Any]:
        with contextlib.ExitStack() as stack:
            replace(stack, registration, "default_registry", {name: everything[name]})
            replace(stack, TracedOnnxFunction, "function_ir", unread)
            return read()

    return functools.cache(of)


@functools.cache
def _quick(rules: tuple[Any, ...]) -> tuple[Any, ...]:
    """The rules less `SLOW_RULES`, each tried at nodes of the operator alone that its pattern ends in."""
    return tuple(_rooted(rule) for rule in rules if getattr(rule, "name", None) not in SLOW_RULES)


def _rooted(rule: Any) -> Any:
    root = rule._target_pattern.output_nodes[0].op

    def try_rewrite(model: Any, graph: Any, node: Any, **how: Any) -> Any:
        return rule.try_rewrite(model, graph, node, **how) if root.matches(node.op_type) else None

    twin = copy.copy(rule)
    twin.try_rewrite = try_rewrite
    return twin


def _selected(make: MakeTable, graph: torch.fx.Graph) -> MakeTable:
    """The table for operators that have a translation, out of the one that knows of none; an empty one where nothing
    in the graph may be decomposed."""
    operators = {node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    candidates = {one for one in operators if _decomposable(one)}

    def table(known: set[Any]) -> dict[Any, Any]:
        return {one: rule for one, rule in _everything(make).items() if one not in known} if candidates - known else {}

    return table


def _decomposable(operator: torch._ops.OpOverload) -> bool:
    """It may be in the table: there is a rule, or torch makes it of others, or what it works on in place is undone."""
    return (
        operator in torch._decomp.decomposition_table
        or operator._schema.is_mutable
        or torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
    )


@functools.cache
def _everything(make: MakeTable) -> dict[Any, Any]:
    """The table that knows of no translation."""
    return make(set())


@functools.cache
def _once_a_schema(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The signature of an operator of ONNX, which is asked for at every node."""
    made: dict[tuple[str, str, int], Any] = {}

    def signature(schema: Any) -> Any:
        key = schema.domain, schema.name, schema.since_version
        if key not in made:
            made[key] = make(schema)
        return made[key]

    return signature


def _names(graph: torch.fx.Graph) -> set[str]:
    """Of the operators, less our own, whose translations are added; what works in place has none."""
    operators = {node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return {"" if one._schema.is_mutable else one.name() for one in operators if one.namespace != "icnnrt"}


def _mixes(node: torch.fx.Node) -> bool:
    """What the node computes with may have to be made one type: tensors of several, or of one that arithmetic may
    change, or a whole number or a size where a fraction may stand."""
    read = node.all_input_nodes[1:] if node.target is aten.where.self else node.all_input_nodes
    values = [value for source in read for value in pytree.tree_leaves(source.meta.get("val"))]
    types = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    if len(types) > 1 or (node.target not in UNCHANGING and not all(one.is_floating_point for one in types)):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in BOUNDING:
        return False  # of sizes alone, or of tensors that bounds take the type of
    return any(
        isinstance(one.meta.get("val") if isinstance(one, torch.fx.Node) else one, int | torch.SymInt | torch.SymFloat)
        and isinstance(argument.type, torch.TensorType | torch.NumberType | torch.OptionalType)
        for one, argument in zip(node.args, node.target._schema.arguments, strict=False)
    )
