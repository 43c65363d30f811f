"""The graphs of a package in processes of their own, where limits ask for it: `Served` is here, `main` is there.

A child opens the package itself, has its own limit of memory, and answers one run after the other; an idle one is kept
for the next. What comes from it is read as what a stranger wrote, since a graph may have taken it over: frames of known
size, JSON and safetensors, the names, dtypes and errors that there can be.

    frame = length of the JSON, length of the arrays, each 8 bytes little-endian; JSON; arrays as a safetensors file
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as safetensors_numpy

from icnnrt import errors
from icnnrt.errors import IcnnrtError, InputError, LimitError, PackageError
from icnnrt.format.package import Package
from icnnrt.limits import MOST_SECONDS, Deadline, Limits, call, ended, needs_memory
from icnnrt.printable import cropped
from icnnrt.serving.forks import inherit
from icnnrt.serving.weight_sets import WeightSet

Arrays = Mapping[str, NDArray[Any]]

GRACE: Final = 0.5  # seconds that a child has to end a run itself, before it is killed
STARTING: Final = 60.0  # seconds that one has to import onnxruntime and open its package
ENDING: Final = 1.0  # seconds for one that closed its pipe to be gone, so that it is known what it ended with
KEPT: Final = 4  # idle children at most
MAX_JSON: Final = 1 << 20
HEADER: Final = 1 << 24  # of a safetensors file, at most
SLACK: Final = 256 << 20  # bytes of memory for what is no value of the graph: sessions, copies of what was fed
UNKNOWN: Final = "?"
WEIGHTS, FEEDS = "weights.", "feeds."  # what names of arrays begin with, on their way there
START: Final = "import sys; sys.path[:] = sys.argv[1:]; from icnnrt.serving.served import main; main()"


class Served:
    """What a `Runner` has in the place of sessions."""

    def __init__(self, package: Package, options: Mapping[str, Any], limits: Limits, first: str) -> None:
        """`options` are those of a session: providers, threads, native; `first` is the id of the package's weights."""
        if not sys.executable:
            raise InputError(
                "limits: expected a Python that can be started again, for process=True, but this one is part of "
                "another program; leave process out."
            )
        self._package, self._options, self._limits, self._first = package, dict(options), limits, first
        self._idle: list[_Child] = []
        self._closed = False
        inherit(self)

    def run(
        self,
        role: str,
        feeds: Arrays,
        weights: WeightSet,
        wanted: Mapping[str, str],
        end: Deadline,
    ) -> list[NDArray[Any]]:
        """The outputs of a graph: those `wanted`, which are of these dtypes."""
        what = f"{self._package.path}: {role}.onnx"
        while (idle := self._idle_one()) is not None:
            try:
                return self._asked(idle, role, feeds, weights, wanted, end)
            except _Ended:  # perhaps it had ended while it was idle, for want of memory elsewhere, say
                if late := end.over(what):
                    raise late from None
        began = time.monotonic()
        child = self._started(what)
        end = end.later(time.monotonic() - began)
        try:
            return self._asked(child, role, feeds, weights, wanted, end)
        except _Ended:
            raise end.over(what) or _without_an_answer(what, child) from None

    def _idle_one(self) -> "_Child | None":
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _started(self, what: str) -> "_Child":
        """A new process that has opened the package."""
        end = Deadline(time.monotonic() + STARTING, STARTING)
        try:
            child = _Child()
        except OSError as error:
            raise IcnnrtError(
                f"{what}: no process can be started for it ({error.strerror}); end others, or leave out process=True."
            ) from error
        try:
            with ended(end, child.kill):
                child.ask(self._beginning(), {}, 0)
        except _Ended:
            child.close()
            raise end.over(f"{what}: the start of its process") or _without_an_answer(what, child) from None
        except BaseException:
            child.close()
            raise
        child.weights = self._first
        return child

    def _asked(
        self,
        child: "_Child",
        role: str,
        feeds: Arrays,
        weights: WeightSet,
        wanted: Mapping[str, str],
        end: Deadline,
    ) -> list[NDArray[Any]]:
        new = {} if weights.id in (child.weights, self._first) else _under(WEIGHTS, weights.arrays)
        request = {"role": role, "only": list(wanted), "weights": weights.id, "seconds": max(1e-3, end.left())}
        answered = False
        try:
            with ended(Deadline(end.at + GRACE, end.seconds), child.kill):
                found = child.ask(request, {**_under(FEEDS, feeds), **new}, self._limits.bytes)
            if {name: array.dtype.name for name, array in found.items()} != wanted:
                raise _Ended
            child.weights = weights.id
            answered = True
        except IcnnrtError as error:
            child.weights, answered = UNKNOWN, True
            if isinstance(error, LimitError) and (late := end.over(f"{self._package.path}: {role}.onnx")):
                raise late from None
            raise
        finally:
            if not answered or self._closed or len(self._idle) >= KEPT:
                child.close()
            else:
                self._idle.append(child)
                if self._closed:  # meanwhile
                    _end_all(self._idle)
        return [found[name] for name in wanted]

    def close(self) -> None:
        """End the processes."""
        self._closed = True
        _end_all(self._idle)

    def give_up(self) -> object:
        """Of a forked child: the processes are its parent's, and end when that closes its pipes."""
        kept, self._idle = self._idle, []
        for child in kept:
            child.let_go()
        return kept

    def _beginning(self) -> dict[str, Any]:
        limits = {"seconds": self._limits.seconds, "bytes": self._limits.bytes}
        providers = self._options["providers"]
        return {
            "path": os.path.abspath(self._package.path),
            "identity": self._package.identity,
            "options": {**self._options, "providers": None if providers is None else list(providers)},
            "limits": limits,
        }


def _without_an_answer(what: str, child: "_Child") -> PackageError:
    return PackageError(
        f"{what}: the process that ran it ended without an answer ({_told(child.close())}); do not use this package "
        "unless you trust it."
    )


class _Ended(Exception):
    """The child has ended, or sent what no child of ours sends."""


class _Child:
    """One process."""

    def __init__(self) -> None:
        self.weights = ""  # the id of those that it has
        self._ended = False
        command = [sys.executable, "-c", START, *sys.path]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for its parent
        )
        # Whatever becomes of this object, of an exception anywhere too.
        self._end = weakref.finalize(self, _ended_for_good, self._process, os.getpid())

    def ask(self, content: Mapping[str, Any], arrays: Arrays, most: int) -> Arrays:
        """Send a frame and read the answer, which holds at most so many bytes of arrays."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            _send(stdin, content, arrays)
            answer, found = _receive(stdout, most + HEADER)
        except Exception as error:  # of a pipe that is closed, of what readers make of a stranger's bytes
            self._ended = True
            raise _Ended from error
        if answer.get("error") is not None:
            kind = getattr(errors, str(answer["error"]), IcnnrtError)
            known = isinstance(kind, type) and issubclass(kind, IcnnrtError)
            raise (kind if known else IcnnrtError)(cropped(str(answer.get("text")), 2000))
        return found

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()

    def let_go(self) -> None:
        """Of a forked child's parent: close the ends of its pipes here."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                os.close(pipe.fileno())

    def close(self) -> int | None:
        """End it; what it ended with."""
        if self._ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING)
        self._end()
        return self._process.returncode


def _ended_for_good(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if owner != os.getpid():  # a forked child's parent owns it
        return
    with contextlib.suppress(OSError):
        process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError, ValueError):
            if pipe:
                pipe.close()
    process.wait()


def _end_all(children: list[_Child]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            children.pop().close()


def _told(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def _under(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + name: array for name, array in arrays.items()}


def _of(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _send(pipe: BinaryIO | Any, content: Mapping[str, Any], arrays: Arrays) -> None:
    text = json.dumps(content).encode()
    data = safetensors_numpy.save({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()})
    pipe.write(struct.pack("<QQ", len(text), len(data)))
    pipe.write(text)
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO | Any, most: int | None) -> tuple[dict[str, Any], Arrays]:
    """One frame, of at most so many bytes of arrays; `ValueError` for what is none, or ends early."""
    sizes = pipe.read(16)
    if len(sizes) < 16:
        raise ValueError("the pipe has ended")
    text_size, data_size = struct.unpack("<QQ", sizes)
    if text_size > MAX_JSON or (most is not None and data_size > most):
        raise ValueError("a frame is too large")
    text, data = pipe.read(text_size), pipe.read(data_size)
    if len(text) < text_size or len(data) < data_size:
        raise ValueError("the pipe has ended")
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("a frame holds no object")
    return content, safetensors_numpy.load(data)


# --- There ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer frames on stdin until there are no more."""
    from icnnrt.serving.runner import Runner

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Whatever prints must not print into a frame.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    runner: Runner | None = None
    limits = Limits()
    while True:
        try:
            content, arrays = _receive(sys.stdin.buffer, None)
        except ValueError:
            os._exit(0)  # onnxruntime's own end may hang or crash, and nothing is left to do
        answer: dict[str, Any] = {"error": None}
        found: Arrays = {}
        place = content["path"] if runner is None else f"{runner.package.path}: {content['role']}.onnx"
        try:
            if runner is None:
                limits = Limits(**content["limits"])
                runner = _opened(content, limits)
                weights = runner.weights
            else:
                if new := _of(WEIGHTS, arrays):
                    weights = WeightSet(new, content["weights"])
                elif content["weights"] == runner.first_id:
                    weights = runner.weights
                seconds = min(content["seconds"], MOST_SECONDS)
                _die_after(seconds + 2 * GRACE)
                own = Limits(seconds=seconds)
                found = call(own, runner.run_once, content["role"], _of(FEEDS, arrays), weights, content["only"])
        except IcnnrtError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        except MemoryError:
            answer = _no_memory(place, limits)
        finally:
            _die_after(0)
        try:
            _send(out, answer, found)
        except MemoryError:
            _send(out, _no_memory(place, limits), {})


def _die_after(seconds: float) -> None:
    """Have the system end this process, in the middle of an operator too, as nobody else does if its parent is gone;
    0 for never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _no_memory(place: str, limits: Limits) -> dict[str, Any]:
    return {"error": "LimitError", "text": str(needs_memory(place, limits))}


def _opened(content: Mapping[str, Any], limits: Limits) -> Any:
    from icnnrt.serving.runner import Runner

    package = Package.open(content["path"], follow_links=True)  # the hash says whether it is the same
    if package.identity != content["identity"]:
        raise PackageError(
            f"{content['path']}: expected the package that was opened, but it was changed since; call icnnrt.load "
            "again."
        )
    options = content["options"]
    providers = options["providers"]
    if providers is not None:
        providers = [one if isinstance(one, str) else tuple(one) for one in providers]
    runner = Runner(package, providers, options["threads"], options["native"], limits=limits)
    _confine(limits.bytes + SLACK)
    return runner


def _confine(more: int) -> None:
    """Let this process have so many bytes more of private memory than it has, where the system can."""
    try:
        import resource

        with open("/proc/self/status", encoding="ascii") as status:
            has = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (has + more, has + more))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, OverflowError, StopIteration, ValueError):
        return  # the arena of onnxruntime has its limit all the same
