"""Exports that are made once, by what makes them: `export` of `icnnrt_exporters`, from a cache that outlives the run.

An export takes 2 to 10 s and gives the same package for the same arguments and the same code. The key is a hash of
both: every source of the three packages, the native library, the versions of what they stand on and the processor's
instruction set; and the arguments, down to the bytes of the weights, the code of a module's class and what its methods
have closed over. What cannot be hashed so is exported anew. Tests of the exporter itself import `export` from where it
lives.
"""

import builtins
import enum
import functools
import hashlib
import inspect
import json
import os
import platform
import shutil
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
FOLDER: Path = HERE.parent / ".pytest_cache" / "d" / "exports"  # conftest.py asks pytest where its cache is
KEPT = 3  # states of the sources whose exports are kept
VERSIONS = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy", "safetensors")
# Settings of the processor's libraries, of which figures in a package depend on in their last digits.
LIBRARIES = ("ICNNRT_", "ATEN_", "ONEDNN_", "MKL_", "NPY_", "OPENBLAS_", "OMP_")
OURS = ("ICNNRT_TEST_AMOUNT", "ICNNRT_TEST_SEED", "ICNNRT_ARGUMENTS")  # which no export sees
KNOWN = ("torch", "icnnrt", "icnnrt_models", "icnnrt_exporters", "numpy", "builtins", "collections")


class NotHashable(Exception):
    """Nothing here says whether two of these are alike."""


def export(energy: Any, solver: Any, x_example: Any, y_example: Any, path: str | Path, **options: Any) -> Any:
    """`icnnrt_exporters.export`, or a copy of what it wrote before; warnings are given again."""
    from icnnrt.format.package import Package
    from icnnrt_exporters import export as write

    path = Path(path)
    arguments = {"name": path.stem, **options}
    try:
        if path.exists() or not path.parent.is_dir() or "progress" in options:
            raise NotHashable  # the exporter itself says what there is to say
        key = fingerprint((energy, solver, x_example, y_example, arguments))
    except (NotHashable, RecursionError):
        return write(energy, solver, x_example, y_example, path, **options)

    def make(folder: Path) -> None:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            write(energy, solver, x_example, y_example, folder / "made.icnn", **arguments)
        told = [[each.category.__name__, str(each.message)] for each in given]
        assert all(hasattr(builtins, category) for category, _ in told), f"one of {told} could not be given again"
        (folder / "warnings.json").write_text(json.dumps(told))

    folder = once(key, make)
    for category, message in json.loads((folder / "warnings.json").read_text()):
        warnings.warn(message, getattr(builtins, category), stacklevel=2)
    shutil.copytree(folder / "made.icnn", path)
    return Package.open(path)


def once(key: str, make: Callable[[Path], object]) -> Path:
    """The folder of that key, filled by the first process that asks for it; to be read only."""
    from filelock import FileLock  # torch brings it

    home = FOLDER / sources()[:16]
    home.mkdir(parents=True, exist_ok=True)
    os.utime(home)
    made = home / key
    with FileLock(home / f"{key}.lock"):
        if not made.exists():
            scratch = Path(tempfile.mkdtemp(prefix="making-", dir=home))
            try:
                make(scratch)
                scratch.rename(made)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
    return made


def prune() -> None:
    """Drop the exports of all but the last states of the sources."""
    states = sorted(FOLDER.glob("*"), key=lambda folder: folder.stat().st_mtime)
    for folder in states[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def sources() -> str:
    """A hash of the code that exports, and of what it runs on."""
    import torch

    import icnnrt
    import icnnrt_exporters
    import icnnrt_models

    digest = hashlib.sha256()
    for module in (icnnrt, icnnrt_models, icnnrt_exporters):
        root = Path(module.__file__).parent
        files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        for path in sorted(files):
            if path.relative_to(root).parts[0] != "cli":  # asks the exporter, which does not ask it
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    try:
        digest.update(Path(icnnrt.ops_library()).read_bytes())
    except icnnrt.IcnnrtError:
        digest.update(b"no native library")
    told = {name: value for name, value in os.environ.items() if name.startswith(LIBRARIES) and name not in OURS}
    settings = sorted(f"{name}={value}" for name, value in told.items())
    machine = (platform.python_version(), platform.machine(), torch.backends.cpu.get_cpu_capability())
    digest.update(repr((settings, machine, [_version(name) for name in VERSIONS])).encode())
    digest.update((HERE.parent / "constraints.txt").read_bytes() + Path(__file__).read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def _helpers() -> bytes:
    """What the tests' files import of each other: a network's class may stand on any of it."""
    return b"".join(path.read_bytes() for path in sorted(HERE.glob("*.py")) if not path.name.startswith("test_"))


def fingerprint(value: object) -> str:
    """A hash of a value and all that it refers to. Raises NotHashable rather than leave anything out."""
    digest, seen = hashlib.sha256(), dict[int, int]()
    alive: list[object] = []  # an id is unique among what lives
    for part in _parts(value, seen, alive):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:40]


def _parts(value: Any, seen: dict[int, int], alive: list[object]) -> Iterator[bytes]:
    import torch

    if value is None or isinstance(
        value, bool | int | float | complex | str | bytes | enum.Enum | range | slice | Path
    ):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format | torch.Size | np.dtype):
        yield repr(value).encode()
        return
    if id(value) in seen:  # tied weights, and cycles
        yield f"again {seen[id(value)]}".encode()
        return
    seen[id(value)] = len(seen)
    alive.append(value)
    yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
    inner: tuple[object, ...]
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.hasobject:
            raise NotHashable(value)
        yield repr((value.shape, value.dtype)).encode()
        yield np.ascontiguousarray(value).tobytes()
        return
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.grad_fn is not None or value.device.type != "cpu":
            raise NotHashable(value)
        yield repr((value.dtype, value.shape, value.stride(), value.requires_grad)).encode()
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        inner = (value.__dict__,)
    elif isinstance(value, torch.Generator):
        inner = (value.get_state(),)
    elif isinstance(value, Mapping):
        inner = tuple(part for item in value.items() for part in item)
    elif isinstance(value, list | tuple):
        inner = tuple(value)
    elif isinstance(value, set | frozenset):
        inner = tuple(sorted(fingerprint(each) for each in value))
    elif isinstance(value, types.MethodType):
        inner = (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        inner = (value.func, value.args, value.keywords)
    elif isinstance(value, property):
        inner = (value.fget, value.fset, value.fdel)
    elif isinstance(value, staticmethod | classmethod):
        inner = (value.__func__,)
    elif isinstance(value, types.FunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        around = (value.__defaults__, value.__kwdefaults__, *_closure(value))
        inner = () if _known(value) else (*_file(value), *_instructions(value.__code__), *around)
    elif isinstance(value, types.BuiltinFunctionType) and not isinstance(value.__self__, types.ModuleType | None):
        inner = (value.__self__,)
        yield value.__name__.encode()
    elif isinstance(value, types.BuiltinFunctionType | types.MemberDescriptorType | types.ModuleType):
        yield (getattr(value, "__module__", None) or "").encode() + value.__name__.encode()
        inner = ()
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        inner = () if _known(value) else (*_file(value), *value.__bases__, *_members(value))
    elif isinstance(value, torch.jit.ScriptModule | torch.fx.GraphModule) or not hasattr(value, "__dict__"):
        raise NotHashable(value)
    else:
        inner = (type(value), value.__dict__, *(getattr(value, each, None) for each in _slots(type(value))))
    yield str(len(inner)).encode()
    for each in inner:
        yield from _parts(each, seen, alive)


def _known(value: Any) -> bool:
    """Its code is in `sources`, and it is found there by its name: it has closed over nothing."""
    return (value.__module__ or "").split(".")[0] in KNOWN and "<locals>" not in value.__qualname__


def _file(value: Any) -> Iterator[bytes]:
    """The file that defines it, with all that it may name there."""
    try:
        file = inspect.getsourcefile(value)
    except TypeError:
        file = None
    if file is None:  # made by a decorator or at the prompt
        raise NotHashable(value)
    yield Path(file).read_bytes()
    yield _helpers()


def _instructions(code: types.CodeType) -> Iterator[object]:
    """Two functions of one name may stand in one file."""
    yield from (code.co_code, code.co_names, code.co_varnames, code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)
        else:
            yield constant


def _closure(function: types.FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # of a name that is bound later
            yield None


def _members(kind: type) -> Iterator[object]:
    for name, member in sorted(vars(kind).items()):
        if name not in ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__"):
            yield name
            yield member


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots
