"""The graphs of an energy besides its argmin: value, derivatives, pullback; run for samples that are finite."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, finite_in_all, refused, writeable
from icnnrt.errors import InputError
from icnnrt.format.manifest import Manifest
from icnnrt.format.signatures import THETA_BAR, arrays_of, outputs_of
from icnnrt.printable import named
from icnnrt.serving.runner import Runner
from icnnrt.serving.solution import Floats, Record
from icnnrt.serving.weight_sets import WeightSet


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Pulled(Record):
    """Cotangents that f and ∇_y f send back: `EnergySession.pullback`."""

    y: Floats
    """[B, n] in the package's dtype."""
    x: Floats
    """[B, *x_shape] in the package's dtype."""
    weights: Mapping[str, Floats]
    """name -> array of the weight's shape and dtype, for every trainable weight; summed over the batch."""


def evaluated(
    runner: Runner,
    role: str,
    x: object,
    y: object,
    *,
    only: tuple[str, ...] | None = None,
    weights: WeightSet | None = None,
    out: object = None,
    **more: object,
) -> dict[str, NDArray[Any]]:
    """Run a graph of the energy; a sample that holds NaN or infinity is left out, and NaN in every output.

    x may be None where the energy has no context. `more` are the other inputs by their names in the graph: y_dot and
    gradient_bar [B, n], f_bar [B]. `out` is what the caller wants the outputs in: an array if it is one, a tuple of
    arrays if they are several; of those that have no batch nobody can say. Without `weights` the last ones are used.
    """
    manifest, dtype, n = runner.package.manifest, runner.package.manifest.dtype, runner.package.manifest.y_shape
    _demand(manifest, role)
    X = None if x is None else batch(x, "x", dtype, manifest.x_shape, copy=False)
    Y = batch(y, "y", dtype, n, length=None if X is None else len(X), copy=False)
    feeds = {"x": _no_context(manifest, len(Y)) if X is None else X, "y": Y}
    for name, value in more.items():
        feeds[name] = batch(
            value, ARGUMENTS.get(name, name), dtype, () if name == "f_bar" else n, length=len(Y), copy=False
        )
    into = None
    if out is not None:
        wanted = only or tuple(name for name in outputs_of(manifest, role) if not name.startswith(THETA_BAR))
        into = _into(manifest, out, wanted, len(Y), (x, y, *more.values(), *feeds.values()))
    runner.check_open()
    return runner.run(role, feeds, only=only, weights=weights, where=finite_in_all(feeds.values()), out=into)[0]


# What inputs of graphs are called where users give them.
ARGUMENTS = {"y_dot": "v"}


def pulled_back(
    runner: Runner, x: object, y: object, f_bar: object, gradient_bar: object, out: object = None
) -> Pulled:
    """`EnergySession.pullback` documents the arguments."""
    found = evaluated(runner, "pullback", x, y, f_bar=f_bar, gradient_bar=gradient_bar, out=out)
    return Pulled(found["y_bar"], found["x_bar"], weights_bar(found))


def weights_bar(outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """θ̄ by the names of the weights."""
    return {name.removeprefix(THETA_BAR): a for name, a in outputs.items() if name.startswith(THETA_BAR)}


def demand_value(manifest: Manifest, call: str) -> None:
    """Refuse `call` of a package that does not hold an energy itself."""
    if manifest.kind != "energy":
        raise InputError(
            f"{call}: the package holds the gradient of an energy alone; use `gradient`, or export the energy itself."
        )


def _demand(manifest: Manifest, role: str) -> None:
    if role in manifest.graphs:
        return
    if role == "value":
        demand_value(manifest, role)
    raise InputError(
        f"{role}: the package {named(manifest.name)} has no {role}.onnx; export it again with "
        f"heads=[{role!r}], or on the command line with --head {role}."
    )


def _no_context(manifest: Manifest, B: int) -> Floats:
    if math.prod(manifest.x_shape):
        remedy = "only an energy without context does without it"
        raise refused("x", f"an array of shape {[B, *manifest.x_shape]}", None, remedy)
    return np.zeros((B, *manifest.x_shape), manifest.dtype)


def _into(
    manifest: Manifest, out: object, names: tuple[str, ...], B: int, inputs: tuple[object, ...]
) -> dict[str, Floats]:
    """The arrays that a caller wants results in, by the names of these."""
    given = [out] if len(names) == 1 else out
    if not isinstance(given, list | tuple) or len(given) != len(names):
        came = f"{len(given)} of them" if isinstance(given, list | tuple) else type(out).__name__
        raise refused("out", f"a tuple of {len(names)} arrays, for {', '.join(names)}", came)
    into: dict[str, Floats] = {}
    for i, (name, array) in enumerate(zip(names, given, strict=True)):
        dtype, (_, *shape) = arrays_of(manifest)[name]
        argument = "out" if len(names) == 1 else f"out[{i}]"
        into[name] = writeable(array, argument, dtype, (B, *map(int, shape)), (*inputs, *into.values()))
    return into
