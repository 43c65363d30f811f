"""Tolerance and steps of a network of quadratic programs as inputs with a default of its graphs."""

import onnx_ir as ir

from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.mathematics.qp_names import SETTINGS, SOLVE_INPUTS
from icnnrt_exporters.surgery import Ops, value

# The operators that take them, and: the name in a graph of a package, the input of QuadraticProgram, and its type.
PROGRAMS = ("QuadraticProgram", "SparseQuadraticProgram")
GIVEN = (("tolerance", "tolerance", ir.DataType.DOUBLE), ("steps", "most_steps", ir.DataType.INT64))


def give_settings(graph: ir.Graph) -> None:
    """Have the graph take `tolerance` and `steps` of all its programs; by default 0, which leaves each its own."""
    programs = [node for node in graph if node.domain == OP_DOMAIN and node.op_type in PROGRAMS]
    for name, input, dtype in GIVEN:
        setting, op = value(name, dtype, []), Ops(f"settings/{name}")
        setting.const_value = ir.tensor(0, dtype=dtype, name=name)
        graph.inputs.append(setting)
        graph.register_initializer(setting)
        asked = op("Greater", setting, op("Constant", value=ir.tensor(0, dtype=dtype)))
        graph.insert_before(graph[0], op.nodes)
        at = [*SOLVE_INPUTS, *SETTINGS].index(input)
        for node in programs:
            own = Ops(f"settings/{name}/{node.outputs[0].name}")
            node.replace_input_with(at, own("Where", asked, setting, node.inputs[at]))
            graph.insert_before(node, own.nodes)
