"""What `torch.onnx.export` does over and over, or for nothing, left out."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

_EXPORTING = threading.RLock()
# Looks at every pair of nodes for two halves of one tensor: three quarters of the time that simplifying takes.
SLOW_RULES = frozenset({"SlicesSplit"})


@contextlib.contextmanager
def sped_up() -> Iterator[None]:
    """While it is entered, `torch.onnx.export` takes about half of its time, and gives the same graphs but for
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
        yield


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
