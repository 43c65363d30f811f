"""Where the figures come from: machine, versions, commit."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

from benchmarks import graphs, threads
from benchmarks.interleaved import Missing

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = (
    "icnnrt", "numpy", "onnxruntime", "onnxruntime-gpu", "onnx", "torch", "cvxpy", "clarabel", "threadpoolctl",
    "qpth", "proxsuite", "moreau", "cvxpylayers", "osqp",
)  # fmt: skip
EXTENSIONS: Final = ("avx", "avx2", "fma", "avx512f", "asimd", "sve")


def environment() -> dict[str, Any]:
    """Facts for the head of a report; None where the machine does not tell."""
    cpu, flags = _cpu()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if "not installed" in (alternative := (versions["onnxruntime"], versions["onnxruntime-gpu"])):
        # Two distributions of one library.
        del versions["onnxruntime-gpu" if alternative[1] == "not installed" else "onnxruntime"]
    return {
        "cpu": cpu,
        "extensions": [name for name in EXTENSIONS if name in flags],
        "cores": threads.cores(),
        "cores_of_machine": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "native": _native(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _cpu() -> tuple[str, frozenset[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {key.strip(): text.strip() for key, _, text in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", ""))
    name = fields.get("model name", platform.machine())
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name, frozenset(flags.split())


def _native() -> dict[str, Any]:
    """The library of native kernels: its size in bytes, and what it says it runs on."""
    library = graphs.native_library()
    if isinstance(library, Missing):
        return {"missing": library.reason}
    options = graphs.session_options(1, library)
    try:
        instruction_set = options.get_session_config_entry("ai.icnnrt.instruction_set")
    except Exception:  # onnxruntime's has no name of its own; the library need not tell
        instruction_set = None
    return {"bytes": Path(library).stat().st_size, "instruction_set": instruction_set}


def _commit() -> str | None:
    """The commit of the working tree, with + where it has changes."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
