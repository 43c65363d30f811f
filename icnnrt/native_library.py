"""The native library: kernels for the operators of ai.icnnrt, which onnxruntime runs in place of their portable bodies.

It is built when icnnrt is installed, where a C++ compiler allows, and lies beside the module `_build_info`, which the
build generates. No other library is ever loaded: nothing that a package, a variable or an argument says can name one.

The processor decides which instruction set its kernels use. The environment variable ICNNRT_MAX_INSTRUCTION_SET, read
when the library is loaded, names the best one that they may use: for tests, and for the same bits on machines that
differ. It can take away what the processor has, and never ask for what it lacks.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

from icnnrt.errors import InputError, MissingDependencyError

# What the library writes into the session options it is registered with; native/ort/registration.cpp has the same.
OPERATORS_ENTRY: Final = "ai.icnnrt.operators"
INSTRUCTION_SET_ENTRY: Final = "ai.icnnrt.instruction_set"
# What lowers the instruction set; native/core/kernels.h has the same.
LIMIT_VARIABLE: Final = "ICNNRT_MAX_INSTRUCTION_SET"


class Build(NamedTuple):
    """What was built."""

    library: Path | None
    reason: str
    """Why there is no library; empty if there is one."""
    compiler: str
    instruction_sets: tuple[str, ...]
    """What the kernels are compiled for."""


class Kernels(NamedTuple):
    """What the library offers in the onnxruntime of this process."""

    operators: frozenset[str]
    """The operators of ai.icnnrt that it serves."""
    instruction_set: str
    """Which of its kernels this processor runs."""
    kept: Any
    """Session options, which keep the library loaded: sessions come and go."""


@functools.cache
def build() -> Build:
    """What the installation of icnnrt made."""
    info = _build_info()
    if info is None:
        return Build(None, "icnnrt runs from a source tree that was never installed", "", ())
    compiled = info.COMPILER, info.INSTRUCTION_SETS
    if info.LIBRARY is None:
        return Build(None, info.REASON, *compiled)
    # In an editable install this is not the folder of the sources.
    assert info.__file__ is not None
    path = Path(info.__file__).resolve().parent / "lib" / info.LIBRARY
    if not path.is_file():
        return Build(None, f"{path} was built, but is gone", *compiled)
    return Build(path, "", *compiled)


def _build_info() -> Any:
    """What the build generated beside this module; or, in a source tree that hides an installed icnnrt
    because Python was started in it, beside that one."""
    try:
        return importlib.import_module("icnnrt._build_info")
    except ImportError:
        pass
    try:
        installed = importlib.metadata.distribution("icnnrt")
        path = Path(str(installed.locate_file("icnnrt/_build_info.py")))
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location("icnnrt._build_info", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        return None
    info = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(info)
    return info


def ops_library() -> str:
    """The path of the native library, for users of plain onnxruntime.

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(icnnrt.ops_library())

    Sessions with these options run the operators of ai.icnnrt, as `icnnrt pack` writes them, on native kernels.
    `icnnrt.load` needs none of this: it registers the library by itself.

    Raises `MissingDependencyError` if this icnnrt was installed without it.
    """
    library, reason, *_ = build()
    if library is None:
        raise MissingDependencyError(
            f"native: this icnnrt has no native library, as {reason}; install it anew where GCC 11 or Clang 12 "
            "is found, or go without: operators run on their portable bodies."
        )
    return str(library)


def register(options: Any) -> None:
    """Register the library with session options.

    Raises `MissingDependencyError` if there is none, or if this onnxruntime cannot use it, and `InputError` if
    ICNNRT_MAX_INSTRUCTION_SET names no instruction set that it was compiled for.
    """
    path = ops_library()
    try:
        options.register_custom_ops_library(path)
        options.get_session_config_entry(OPERATORS_ENTRY)  # raises if the library wrote none
    except Exception as error:  # onnxruntime's exceptions have no parent of their own
        text = str(error).strip().splitlines()
        if text and (at := text[0].find(LIMIT_VARIABLE)) >= 0:
            raise InputError(text[0][at:]) from error
        raise MissingDependencyError(
            f"native: onnxruntime cannot use {path} ({text[0] if text else type(error).__name__}); install icnnrt and "
            "onnxruntime for this system anew, or pass native=False."
        ) from error


@functools.cache
def kernels(onnxruntime: ModuleType) -> Kernels:
    """What the library says of itself once it is registered with this onnxruntime.

    Raises what `register` does.
    """
    options = onnxruntime.SessionOptions()
    register(options)
    operators = options.get_session_config_entry(OPERATORS_ENTRY)
    return Kernels(frozenset(operators.split()), options.get_session_config_entry(INSTRUCTION_SET_ENTRY), options)
