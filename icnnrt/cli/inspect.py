"""`icnnrt inspect`: what a package holds."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import typer
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from icnnrt.cli.app import (
    ROWS_SHOWN,
    FollowFlag,
    JsonFlag,
    MebibytesOption,
    PackageArgument,
    SecondsOption,
    UntrustedFlag,
    app,
    console,
    number,
    one_line,
    print_json,
    with_limits,
)
from icnnrt.printable import cropped, named

MOST_SHOWN: Final = 400  # characters of a text from a file; --json has all of them


@app.command()
def inspect(
    context: typer.Context,
    package: PackageArgument,
    follow_links: FollowFlag = False,
    untrusted: UntrustedFlag = False,
    seconds: SecondsOption = None,
    mebibytes: MebibytesOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what a package holds, after checking every file of it; onnxruntime is not needed.

    Exit codes:
    0 the package is sound
    1 it is not, or another error
    2 wrong usage
    """
    from icnnrt.format.package import Package

    with_limits(context, untrusted, seconds, mebibytes)
    opened = Package.open(package, follow_links=follow_links)
    content = {**json.loads(json.dumps(opened.manifest.content())), "format_version": opened.manifest.format_version}
    for name, array in opened.weights.items():
        low, high = (float(array.min()), float(array.max())) if array.size else (None, None)
        content["weights"]["tensors"][name] |= {"min": low, "max": high}
    if as_json:
        print_json({"path": str(opened.path), "ignored": opened.ignored, **content})
    else:
        tree = _tree(str(opened.path), content)
        if opened.ignored:
            more = f" and {len(opened.ignored) - ROWS_SHOWN} more" if len(opened.ignored) > ROWS_SHOWN else ""
            names = ", ".join(map(named, opened.ignored[:ROWS_SHOWN]))
            tree.add(one_line(f"beside the package, and not read: {names}{more}"))
        console().print(tree)


def _tree(path: str, m: Mapping[str, Any]) -> Tree:
    from icnnrt.format.verdict import Convexity
    from icnnrt.mathematics.domains import MODELS

    root = Tree(f"[bold]{escape(cropped(m['name'], 80))}[/]  {escape(path)}", guide_style="dim")
    solver, domain = m["solver"], m["domain"]
    root.add(f"format {m['format']} {m['format_version']}, {m['dtype']}, opset {m['opset']}, IR {m['ir_version']}")
    if m["kind"] == "gradient":
        root.add("the gradient of an energy alone, without its value")
    if m["kind"] == "qp":
        root.add("a network of quadratic programs: x → z")
    answer = "z" if m["kind"] == "qp" else "y"
    where = f" {MODELS[domain['kind']].where}" if domain else ""
    root.add(escape(f"x {_shown(m['x_shape'])} → {answer} {_shown(m['y_shape'])}{where}"))
    if solver:
        mu = f", μ {number(domain['mu'])}" if "mu" in domain else ""
        root.add(
            f"{solver['name']}: {solver['iterations']} cuts, {solver['steps']} steps each, {m['regulariser']}{mu}, "
            f"tolerances: gap {number(solver['gap_tolerance'])}, residual {number(solver['residual_tolerance'])}"
        )
    elif m["kind"] != "qp":
        root.add("solver: none, so no argmin; export with one for that")
    if "polyhedron" in m:
        head = m["polyhedron"]
        root.add(
            f"over a polyhedron: at most {head['iterations']} cuts, μ {number(head['mu'])}, tolerance "
            f"{number(head['tolerance'])}, adjoint {head['adjoint']}"
        )
    if "convexity" in m:
        found = Convexity.from_json(m["convexity"])
        colour = {"proven": "green", "violated": "red"}.get(found.verdict, "yellow")
        branch = root.add(f"convexity: [{colour}]{found.verdict}[/]  {escape(found.sentence())}")
        for name, bound in (("strong convexity", found.strong_convexity), ("Lipschitz bound", found.lipschitz)):
            if bound is not None:
                branch.add(f"{name}  {number(bound)}")
        if found.rests_on is not None:
            signed = [name for name, t in m["weights"]["tensors"].items() if t["sign"]]
            for what, names in (("signs", signed), ("values", found.rests_on)):
                if names:
                    branch.add(one_line(f"it rests on the {what} of {', '.join(map(named, names))}"))
    elif m["kind"] != "qp":
        root.add("convexity: not examined")
    root.add("golden data: " + ("there, `verify` replays it" if "golden" in m else "none"))
    ops = ", ".join(f"{d}::{name}" for d, o in m["ops"].items() for name in o["names"]) or "none"
    graphs = Table("graph", "bytes", "sha256", title_justify="left", box=None)
    for role, graph in m["graphs"].items():
        graphs.add_row(escape(role), f"{graph['bytes']:,}", graph["sha256"][:12])
    branch = root.add("graphs")
    branch.add(graphs)
    branch.add(f"custom operators: {escape(ops)}")
    tensors = m["weights"]["tensors"]
    size = sum(math.prod(t["shape"]) for t in tensors.values())
    branch = root.add(
        f"weights: {len(tensors)} of {size:,} numbers, {m['weights']['bytes']:,} bytes, {m['weights']['sha256'][:12]}"
    )
    table = Table("name", "shape", "dtype", "trainable", "sign", "range", box=None)
    for name, t in tensors.items():
        table.add_row(
            one_line(named(name)),
            escape(_shown(t["shape"])),
            t["dtype"],
            "yes" if t["trainable"] else "no",
            _sign(t["sign"]),
            f"{number(t['min'])} … {number(t['max'])}",
        )
    branch.add(table)
    if "train" in m:
        _add_training(root, m["train"], tensors)
    else:
        root.add("training: none; export with a training graph to tune this package on a device")
    tuned = m["metadata"].get("tuned_steps")
    for title in ("parity", "producer", "metadata"):
        note = ""
        if title == "parity" and isinstance(tuned, int) and tuned > 0:
            note = f" (of the export; the weights have been tuned since, {tuned} step{'s' if tuned > 1 else ''})"
        branch = root.add(f"{title}{note}" if m[title] else f"{title}: none")
        for key, value in m[title].items():
            shown = number(value) if isinstance(value, float) else str(value)
            branch.add(one_line(f"{cropped(key, 80)}  {cropped(shown, MOST_SHOWN)}"))
    return root


def _sign(sign: Any) -> str:
    """That of all entries, or how many of which it is asked."""
    if not isinstance(sign, Mapping):
        return sign or "–"
    asked = Counter[str]()
    for start, stop, name in sign["runs"]:
        asked[name] += stop - start
    along = "entries" if sign["axis"] is None else f"along axis {sign['axis']}"
    return ", ".join(f"{name}: {count} {along}" for name, count in asked.items())


def _add_training(root: Tree, train: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    settings = ", ".join(f"{named(key)} {number(value)}" for key, value in train["settings"].items())
    clipped = "" if train["clip_norm"] is None else f", gradients clipped to norm {number(train['clip_norm'])}"
    branch = root.add(
        f"training: {escape(named(train['loss']))} of y and target {escape(_shown(train['target_shape']))} "
        f"{train['target_dtype']}, {train['adjoint']} adjoint{clipped}"
    )
    branch.add(escape(f"{train['optimizer']}: {settings}"))
    moved = set(train["weights"])
    still = [name for name, t in tensors.items() if t["trainable"] and name not in moved]
    size = sum(math.prod(tensors[name]["shape"]) for name in moved)
    which = "all trainable weights" if not still else ", ".join(map(named, train["weights"]))
    branch.add(escape(f"moves {size:,} numbers: {which}"))
    if still:
        branch.add(escape(f"leaves {', '.join(map(named, still))}"))


def _shown(shape: list[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
