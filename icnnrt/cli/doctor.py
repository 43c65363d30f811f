"""`icnnrt doctor`: what is installed and what runs."""

import importlib.metadata
import os
import platform
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from icnnrt.cli.app import ERROR, JsonFlag, app, console, one_line, print_json
from icnnrt.errors import InputError, MissingDependencyError


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Say what is installed, what onnxruntime offers, and what stands in the way.

    Exit codes:
    0 packages can be served
    1 something is in the way
    2 wrong usage
    """
    from icnnrt import native_library

    facts = _facts()
    if as_json:
        print_json(facts)
    else:
        screen = console()
        table = Table(box=None, show_header=False)
        versions = facts["versions"]
        for name, version in versions.items():
            # Two builds of one thing: that the other one is not there is how it should be.
            other = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-gpu": "onnxruntime"}.get(name)
            if version or not (other and versions[other]):
                table.add_row(name, version or "[dim]not installed[/]")
        table.add_row("platform", one_line(facts["platform"]))
        table.add_row("threads", f"{facts['cores']} cores; a session uses {facts['threads']} unless told otherwise")
        table.add_row("providers", ", ".join(facts["providers"]) or "none")
        native = facts["native"]
        if native["instruction_set"]:
            limit = f" ({native_library.LIMIT_VARIABLE}={native['limit']})" if native["limit"] else ""
            table.add_row("native operators", escape(f"on {native['instruction_set']}{limit}, {native['library']}"))
        else:
            # A limit that is none is refused by every session; without a library they run all the same.
            told = "none" if native["limit"] else "none, operators run on portable bodies"
            table.add_row("native operators", escape(f"{told}: {native['reason']}"))
        screen.print(table)
        for problem in facts["problems"]:
            screen.print(f"[bold red]problem[/]  {escape(problem)}")
        if not facts["problems"]:
            screen.print("[green]packages can be served[/]")
    if facts["problems"]:
        raise typer.Exit(ERROR)


def _facts() -> dict[str, Any]:
    from icnnrt import native_library, ort

    versions = {"python": platform.python_version()}
    for name in ("icnnrt", "numpy", "safetensors", "onnxruntime", "onnxruntime-gpu", "torch", "onnx"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    problems = []
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        # Both own the import name onnxruntime; removing one also removes files of the other.
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install one of 'icnnrt[cpu]' and 'icnnrt[gpu]'."
        )
    providers: list[str] = []
    try:
        providers = ort.onnxruntime().get_available_providers()
    except MissingDependencyError as error:
        problems.append(str(error))
    built = native_library.build()
    native: dict[str, Any] = {
        "library": str(built.library) if built.library else None,
        "compiler": built.compiler,
        "compiled_for": list(built.instruction_sets),
        "instruction_set": None,
        "limit": os.environ.get(native_library.LIMIT_VARIABLE) or None,
        "reason": built.reason,
    }
    if built.library and providers:
        try:
            native["instruction_set"] = native_library.kernels(ort.onnxruntime()).instruction_set
        except (InputError, MissingDependencyError) as error:
            native["reason"] = str(error)
            problems.append(str(error))
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": ort.THREADS,
        "providers": providers,
        "native": native,
        "problems": problems,
    }
