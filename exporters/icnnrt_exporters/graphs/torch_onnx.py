"""What `torch.onnx.export` does over and over, or for nothing, left out."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

_EXPORTING = threading.RLock()
# Looks at every pair of nodes for two halves of one tensor: three quarters of the time that simplifying takes.
SLOW_RULES = frozenset({"SlicesSplit"})


@contextlib.contextmanager
def sped_up() -> Iterator[None]:
    """While it is entered, `torch.onnx.export` takes a third of its time, and gives the same graphs but for
    `SLOW_RULES`.

    Its translations, about 500, are read once a process; it parses the source of all of them at every call. Both are
    replaced by name in packages of others: what is not found there is left as it is.
    """
    with _EXPORTING, contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter._registration import onnxscript_apis

            _replace(stack, onnxscript_apis, "get_torchlib_ops", _read_once(onnxscript_apis.get_torchlib_ops))
        with contextlib.suppress(ImportError, AttributeError):
            from onnxscript import rewriter

            rules = rewriter._DEFAULT_REWRITE_RULES
            quick = tuple(rule for rule in rules if getattr(rule, "name", None) not in SLOW_RULES)
            _replace(stack, rewriter, "_DEFAULT_REWRITE_RULES", quick)
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter import _fx_passes

            _replace(
                stack, _fx_passes, "insert_type_promotion_nodes", _if_mixed(_fx_passes.insert_type_promotion_nodes)
            )
        yield


def _if_mixed(promote: Any) -> Any:
    """Types are promoted where an operator meets several: to look, every node is run once more."""

    def run(module: Any) -> None:
        if any(_mixes(node) for node in module.graph.nodes if node.op == "call_function"):
            promote(module)

    return run


def _mixes(node: Any) -> bool:
    """Whether an operator may have to convert what it reads: all but operators on one kind of real numbers, and choices
    between such. A size that stands beside a tensor, not in a shape, is a number of another kind."""
    if node.target is torch.ops.aten._to_copy.default:  # which says itself what it makes
        return False
    values = [one.meta.get("val") for one in node.all_input_nodes]
    if None in values:
        return True
    if node.target is torch.ops.aten.where.self and values[0].dtype == torch.bool:
        values = values[1:]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    beside = any(not isinstance(one.meta["val"], torch.Tensor) for one in node.args if isinstance(one, torch.fx.Node))
    dtypes = {tensor.dtype for tensor in tensors}
    return bool(tensors) and (beside or len(dtypes) > 1 or not dtypes.pop().is_floating_point)


@functools.cache
def _read_once(read: Any) -> Any:
    return functools.cache(read)


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Until the stack is left."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, getattr(owner, name))
    else:  # found by the owner's __getattr__
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)
