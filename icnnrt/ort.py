"""Opening onnxruntime: the module, its providers, its sessions, and whether native kernels are to run in them."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Final, TypeAlias

from icnnrt import arguments, native_library
from icnnrt.errors import IcnnrtError, InputError, MissingDependencyError, ProviderError
from icnnrt.printable import cropped, harmless, show

Provider: TypeAlias = str | tuple[str, Mapping[str, Any]]

CPU: Final = "CPUExecutionProvider"
# The graphs of an icnnrt package are many small operators one after the other. Measured on two busy cores with a
# PICNN of 1836 inputs: a second thread gained nothing at batch 1 and doubled the time at 16 and 128 (it spins).
THREADS: Final = 1
MAX_THREADS: Final = 1024
_arena_of: Final[list[int]] = []  # the size of the arena that was registered last
# 4 = fatal errors. The default, warnings, prints a line on stderr for every weight, because a session may override it;
# errors are raised too, and onnxruntime prints the names in them as they are, escapes of a terminal included.
LOG_SEVERITY: Final = 4


def onnxruntime() -> ModuleType:
    """Import onnxruntime, or say how to install it."""
    remedy = "install one of pip install 'icnnrt[cpu]' or pip install 'icnnrt[gpu]', never both."
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C, as its library was being loaded
            raise KeyboardInterrupt from error
        raise MissingDependencyError(f"onnxruntime cannot be imported ({error}); {remedy}") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        # What is left when the CPU and the GPU package were both installed and one of them is removed.
        raise MissingDependencyError(
            "onnxruntime is installed in part only; pip uninstall onnxruntime onnxruntime-gpu, then " + remedy
        )
    return onnxruntime


def checked_threads(threads: object) -> int:
    """How many threads a session gets; `InputError` for what is no number of them."""
    if threads is None:
        return THREADS
    expected = f"an integer from 1 to {MAX_THREADS} or None"
    return arguments.integer(threads, "threads", 1, MAX_THREADS, expected=expected, remedy="give no more than cores")


def _version(ort: ModuleType) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", ort.__version__)
    return (int(found[1]), int(found[2])) if found else (1, 18)  # the oldest that is supported


def provider_names(providers: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, ...]:
    """Those in use, in order of preference; onnxruntime always puts the CPU last."""
    names = [name for name, _ in providers]
    return tuple(names if CPU in names else [*names, CPU])


def session_options(ort: ModuleType, threads: int) -> Any:
    """What every session is made with."""
    options = ort.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # From the second call on 1.18 puts a kernel's output over an input that is still read: kernels refuse that.
    options.enable_mem_pattern = _version(ort) >= (1, 19)
    return options


def bound_memory(ort: ModuleType, options: Any, bytes: int) -> None:
    """Have a session that is made next with these options take the memory for values from an arena of that size, and
    compute nothing while it is made.
    """
    # Optimisations compute constants, and some take time by the square of the nodes, which no flag ends.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # Extended by what is asked for (1), not by powers of two, which would end at half the size. It is the environment's
    # until another one takes its place; sessions keep the one that they were made with.
    try:
        ort.create_and_register_allocator(where, ort.OrtArenaCfg({"max_mem": bytes, "arena_extend_strategy": 1}))
    except Exception as error:  # of earlier versions, which take one for the whole process
        if _arena_of != [bytes]:
            raise InputError(
                f"limits: onnxruntime {ort.__version__} has one bound of memory for a process, which is there already; "
                "give all sessions the same limit of bytes, pass process=True, or upgrade onnxruntime."
            ) from harmless(error)
    _arena_of[:] = [bytes]
    options.add_session_config_entry("session.use_env_allocators", "1")


def open_session(
    ort: ModuleType,
    data: bytes,
    options: Any,
    providers: Sequence[tuple[str, Mapping[str, Any]]],
    file: str,
    refused: Callable[[str], IcnnrtError],
) -> Any:
    """A session of the graph `data`, which `file` holds, on these providers and no others.

    Raises `ProviderError` where a provider is at fault, and `refused(why)` where the graph or onnxruntime is.
    """
    wanted = [(name, dict(settings)) for name, settings in providers]
    try:
        session = ort.InferenceSession(data, options, providers=wanted, enable_fallback=0)
    except Exception as error:
        if any(name != CPU for name, _ in wanted):
            raise ProviderError(
                f"providers: onnxruntime cannot run {file} on {[name for name, _ in wanted]} "
                f"({first_line(error)}); check the drivers and options, or use {CPU}."
            ) from harmless(error)
        raise refused(first_line(error)) from harmless(error)
    missing = [name for name, _ in wanted if name not in session.get_providers()]
    if missing:
        raise ProviderError(
            f"providers: {missing[0]} was asked for, but onnxruntime fell back to {session.get_providers()}; "
            "its libraries or its device are missing on this machine, so install them (onnxruntime prints which) "
            f"or use {CPU}."
        )
    return session


def checked_providers(
    ort: ModuleType, providers: Sequence[Provider] | None
) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Names and options of the providers to use, the CPU by default; raises `ProviderError` for one that is missing."""
    if providers is None:
        return ((CPU, {}),)
    if isinstance(providers, str) or not isinstance(providers, Sequence) or not providers:
        raise arguments.refused("providers", f"a list such as [{CPU!r}]", show(providers))
    named: list[tuple[str, Mapping[str, Any]]] = []
    for provider in providers:
        name, settings = (provider, {}) if isinstance(provider, str) else _pair(provider)
        if name not in ort.get_available_providers():
            raise ProviderError(
                f"providers: {name} is not in this onnxruntime, which has {', '.join(ort.get_available_providers())}; "
                "GPU providers come with pip install 'icnnrt[gpu]' in place of 'icnnrt[cpu]'."
            )
        named.append((name, settings))
    return tuple(named)


def native_operators(ort: ModuleType, native: bool | None) -> frozenset[str]:
    """The operators that native kernels are to serve."""
    if native is not None and not isinstance(native, bool):
        raise arguments.refused("native", "True, False or None", show(native))
    if native is False or (native is None and native_library.build().library is None):
        return frozenset()
    try:
        return native_library.kernels(ort).operators
    except MissingDependencyError as error:
        if native:
            raise
        # The portable bodies give the same answers, only later, so a robot need not stand still for it. But whoever
        # installed the library meant to have it, so this is said aloud, and not only where one would have to look.
        warnings.warn(f"{error} Operators run on their portable bodies.", RuntimeWarning, stacklevel=5)
        return frozenset()


def _pair(provider: object) -> tuple[str, Mapping[str, Any]]:
    if isinstance(provider, tuple) and len(provider) == 2:
        name, settings = provider
        if isinstance(name, str) and isinstance(settings, Mapping):
            return name, settings
    raise arguments.refused("providers", "names or pairs (name, options)", show(provider))


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a sentence."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    # Names from the graph are in it: blanks in a row would let a part of one look like a line of its own.
    return cropped(re.sub(r"\s+", " ", line), 300)
