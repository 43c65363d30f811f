"""Where in a model something stands: the path of the submodule, for sentences that refuse it; and what an exception
said."""

import linecache
import re
from collections.abc import Iterable
from types import TracebackType

from torch import fx, nn

from icnnrt import ort


def operator(node: fx.Node) -> str:
    """ "aten.convolution" of a node that calls aten.convolution.default."""
    return str(getattr(node.target, "overloadpacket", node.target))


def place(node: fx.Node) -> str:
    """ "(in blocks.0.conv, a Conv2d)", from what torch.export notes on every node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "(in its forward)"
    path, kind = stack[-1][:2]
    path = re.sub(r"^L\['self'\]\.?", "", str(path)).removeprefix("_export_root").lstrip(".")
    kind = (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]
    return f"(in {path}, a {kind})" if path else f"(in the forward of {kind})"


def place_of(nodes: Iterable[fx.Node], name: str) -> str:
    """The place of the first node whose operator is `name`, or of which `name` is a backward pass; else "".

    `name` may come as aten.foo.default, aten::foo or Foo.
    """
    wanted = _stem(name)
    for node in nodes:
        if node.op == "call_function" and _stem(str(node.target)) == wanted:
            return place(node)
    return ""


def _stem(name: str) -> str:
    found = re.search(r"(?:(?:aten|prims)(?:\.|::))?(\w+)", name)
    word = (found.group(1) if found else name).lower().strip("_")
    return word.replace("_backward", "").removeprefix("special_").replace("_", "")


def raised_in(energy: nn.Module, error: BaseException) -> tuple[str, str]:
    """(place, source line) of the innermost forward of the energy's modules that an exception passed through."""
    names = {id(module): name for name, module in energy.named_modules()}
    found = ("", "")
    chain: BaseException | None = error
    while chain is not None:
        trace: TracebackType | None = chain.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in names and not _of_torch(frame.f_globals):
                name, kind = names[id(owner)], type(owner).__name__
                where = f"(in {name}, a {kind})" if name else f"(in the forward of {kind})"
                found = where, _line(trace)
            elif found[0] and not _of_torch(frame.f_globals):
                found = found[0], _line(trace)  # a function that the forward calls
            trace = trace.tb_next
        if found[0]:
            break
        chain = chain.__cause__ or chain.__context__
    return found


def _line(trace: TracebackType) -> str:
    return linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()


def _of_torch(globals_of_frame: dict[str, object]) -> bool:
    return str(globals_of_frame.get("__name__", "")).split(".")[0] == "torch"


def first_line(error: BaseException) -> str:
    """What an exception says, short enough to stand within a sentence."""
    return ort.first_line(error).rstrip(".:")  # type: ignore[arg-type]


def kind_and_line(error: Exception) -> str:
    """The same after the exception's class, whose text alone may say little."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
