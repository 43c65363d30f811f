"""What every function of domain ai.icnnrt and every graph has to be, so that any ONNX runtime runs it."""

import onnx

from icnnrt_exporters.operators.bodies import OP_DOMAIN, OP_VERSION, OPSET


def all_nodes(nodes):
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g.node)


def transposed_products(graph):
    """Products of matrices that read a transpose, be it under another name: older onnxruntime fuses the two.

    Of doubles into an operator that it has no kernel for, up to 1.22.
    """
    nodes = list(all_nodes(graph.node))
    producers = {name: node for node in nodes for name in node.output}

    def is_transpose(name):
        while name in producers and producers[name].op_type == "Identity":
            (name,) = producers[name].input
        return name in producers and producers[name].op_type == "Transpose"

    return [node.name for node in nodes if node.op_type in ("MatMul", "Gemm") and any(map(is_transpose, node.input))]


def check_portable(functions, banned):
    """Of standard operators alone, without those that are `banned`, and of functions that come along."""
    names = {f.name for f in functions}
    for function in functions:
        assert function.domain == OP_DOMAIN
        assert {(o.domain, o.version) for o in function.opset_import} == {("", OPSET), (OP_DOMAIN, OP_VERSION)}
        assert not onnx.defs.has(function.name), "derivative tools tell operators apart by name alone"
        assert function.doc_string
        for node in all_nodes(function.node):
            if node.domain == OP_DOMAIN:
                assert node.op_type in names
            else:
                assert node.domain == ""
                assert onnx.defs.has(node.op_type, max_inclusive_version=OPSET)
            assert node.op_type not in banned
            for v in (*node.input, *node.output):
                assert v.isascii()
