"""A head's nodes as a function of traced values: the energy that a statement calls, inside a loop or outside."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from icnnrt_exporters.operators.traced import Symbol, Traced
from icnnrt_exporters.surgery import copy, shapes_from, split


class Spliced:
    """arguments -> results of some nodes, which are copied to where they are called.

    What depends on no argument is put into the trace at once, before any loop: ONNX Runtime moves nothing out of one.

    Args:
        xp: the trace, with nothing open inside its graph.
        nodes: of a head that was dismantled, with the values that no node of them makes.
        arguments: what the nodes read for what a call gives, each with a value of its shape that is there already.
        results: what a call returns.
    """

    def __init__(
        self,
        xp: Traced,
        nodes: Sequence[ir.Node],
        arguments: Mapping[ir.Value, ir.Value],
        results: Sequence[ir.Value],
    ) -> None:
        for argument, like in arguments.items():
            shapes_from(nodes, argument, like)
        before, self._nodes = split(nodes, arguments)
        xp.op.extend(before)
        xp.templates.extend(self._nodes)
        self._xp, self._arguments, self._results = xp, list(arguments), list(results)

    def __call__(self, *arguments: Symbol) -> list[Symbol]:
        given = dict(zip(self._arguments, (a.value for a in arguments), strict=True))
        nodes, found = copy(self._nodes, given, self._xp.free("at"))
        self._xp.op.extend(nodes)
        return [self._xp.of(found.get(v, v)) for v in self._results]
