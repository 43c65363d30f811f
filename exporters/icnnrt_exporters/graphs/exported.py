"""A traced head as the exported program that torch.onnx reads, without tracing it once more.

`make_fx` has left a functional graph of aten operators whose nodes know the values they make, with one symbol for the
batch: all that `torch.export.export` would find out by running the graph again, node by node, which took a quarter of
the time of an export. What is missing is put beside it: which inputs are the caller's, which are constants, and the
range of the symbol.
"""

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from icnnrt_exporters.tracing.heads import Head

SYM_NUMEL = torch.ops.aten.sym_numel.default
SYM_SIZE = torch.ops.aten.sym_size.int


def exported(head: Head) -> ExportedProgram:
    """The head's graph, its constants lifted to inputs, with the signature that torch.export gives a program."""
    graph = fx.Graph()
    specs: list[InputSpec] = []
    constants: dict[str, Any] = {}
    copies: dict[fx.Node, fx.Node] = {}
    lifted: dict[str, fx.Node] = {}  # by the attribute that holds them
    values = [node.meta.get("val") for node in head.graph.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(values)  # in which all values of the graph are told
    assert mode is not None
    for node in head.graph.graph.nodes:
        if node.op == "get_attr":
            path = str(node.target)
            if path not in lifted:
                value = operator.attrgetter(path)(head.graph).detach()
                lifted[path] = placeholder = graph.placeholder(f"c_{path.replace('.', '_')}")
                placeholder.meta = {**node.meta, "val": mode.from_tensor(value, static_shapes=True)}
                constants[placeholder.name] = value
                argument = TensorArgument(name=placeholder.name)
                specs.append(InputSpec(InputKind.CONSTANT_TENSOR, argument, placeholder.name, None))
            copies[node] = lifted[path]
    results: tuple[fx.Node, ...] = ()
    mine: list[TensorArgument] = []
    for node in head.graph.graph.nodes:
        if node.op == "output":
            (made,) = node.args
            results = tuple(copies[one] for one in (made if isinstance(made, tuple | list) else (made,)))
            graph.output(results)
        elif node.op != "get_attr":
            copies[node] = copy = (
                _numbers(graph, copies[node.args[0]], node.meta)
                if node.target == SYM_NUMEL
                else graph.node_copy(node, lambda one: copies[one])
            )
            if node.op == "placeholder":
                mine.append(TensorArgument(name=copy.name))
    specs += [InputSpec(InputKind.USER_INPUT, argument, None, None) for argument in mine]
    outputs = [TensorArgument(name=one.name) for one in results]
    # Clones: two inputs that are one tensor would become one input.
    examples: Any = (tuple(argument.example.clone() for argument in head.inputs), {})
    call = ModuleCallSignature(
        inputs=list(mine),
        outputs=list(outputs),
        in_spec=pytree.tree_structure(examples),
        out_spec=pytree.tree_structure(tuple(outputs)),
    )
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(specs, [OutputSpec(OutputKind.USER_OUTPUT, one, None) for one in outputs]),
        state_dict={},
        range_constraints=_ranges(graph),
        module_call_graph=[ModuleCallEntry("", call)],
        example_inputs=examples,
        constants=constants,
    )


def _numbers(graph: fx.Graph, tensor: fx.Node, meta: dict[str, Any]) -> fx.Node:
    """How many numbers a tensor holds, of which sym_numel has no translation: the product of its sizes."""
    sizes = tensor.meta["val"].shape
    value: Any = math.prod(size for size in sizes if isinstance(size, int))
    product: Any = value
    for axis, size in enumerate(sizes):
        if not isinstance(size, int):
            one = graph.call_function(SYM_SIZE, (tensor, axis))
            one.meta = {**meta, "val": size}
            value = size * value
            product = graph.call_function(operator.mul, (one, product))
            product.meta = {**meta, "val": value}
    assert isinstance(product, fx.Node), "a number that is known is no node"
    return product


def _ranges(graph: fx.Graph) -> dict[Any, Any]:
    """Of every symbol of a size, what it may be."""
    found: dict[Any, Any] = {}
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            for size in value.shape if isinstance(value, Tensor) else ():
                if isinstance(size, torch.SymInt):
                    for symbol in size.node.expr.free_symbols:
                        found[symbol] = size.node.shape_env.var_to_range[symbol]
    return found
