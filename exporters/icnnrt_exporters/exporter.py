"""From a trained torch module and its solver to one package that onnxruntime runs.

What is common to every kind of module stands here: what is checked before, the comparison with torch, the writing.
What a package of one kind is made of stands in `energy_package` and `qp_package`.
"""

import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor, nn

import icnnrt
from icnnrt import arguments
from icnnrt.checking import golden
from icnnrt.errors import ExportError
from icnnrt.format import package
from icnnrt.format.folder import folder_of
from icnnrt.format.manifest import Manifest
from icnnrt.format.replacement import check_target
from icnnrt_exporters.assembly.train_spec import TrainSpec
from icnnrt_exporters.checks import parity
from icnnrt_exporters.checks.preconditions import (
    Solver,
    check_adjoint,
    check_examples,
    check_heads,
    check_polyhedron,
    check_solver,
    check_weights,
    of_layer,
)
from icnnrt_exporters.energy_package import energy_contents
from icnnrt_exporters.qp_package import network_contents
from icnnrt_exporters.tracing.energy_graph import Kind
from icnnrt_exporters.tracing.eval_mode import in_eval_mode
from icnnrt_exporters.tracing.overhead import collected_rarely, one_thread
from icnnrt_exporters.tracing.quiet import quiet
from icnnrt_exporters.writing import Progress
from icnnrt_models import PolyhedronArgmin

GOLDEN_SAMPLES = 4


def export(
    energy: nn.Module,
    solver: Solver | PolyhedronArgmin | Literal["auto"] | None,
    x_example: Tensor,
    y_example: Tensor,
    path: str | Path,
    *,
    name: str | None = None,
    heads: Collection[str] = (),
    kind: Kind | Literal["qp"] = "energy",
    nonnegative: Sequence[str] | None = None,
    metadata: Mapping[str, str | int | float | bool | None] | None = None,
    train: TrainSpec | None = None,
    polyhedron: Mapping[str, float | str] | None = None,
    allow_not_convex: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda stage: None,
) -> package.Package:
    """Write f(x, y; θ), its derivatives, and its fixed-iteration argmin over y as a package.

    Args:
        energy: a module with forward(x [B, ...], y [B, n]) -> [B], convex in y, float32 or float64. It is exported in
            eval mode, as it is; nothing of it need come from icnnrt_models.
        solver: the layer whose domain, iterations, steps and tolerances the package takes over; None for a package of
            the energy and its derivatives alone; "auto" for the better of both solvers over [0, 1]^n on the examples,
            see `solver_choice`, and the reason in the metadata; a `PolyhedronArgmin` for the head "polyhedron" with
            its iterations, mu, tolerance and adjoint.
        x_example, y_example: one batch of inputs of the right shape and dtype, for tracing and for the parity check;
            give real data, so that the figures mean something.
        path: the folder to write, by custom `*.icnn`.
        name: what the package calls itself; the folder's stem by default.
        heads: further graphs: any of "hvp", "hessian" (dense, for small n), "gradient_x", "pullback" (cotangents of
            f and ∇_y f to y, x and the weights) and "polyhedron" (the argmin under linear constraints given with the
            call, and its adjoint). Value and gradient are always there, argmin and adjoint with a solver.
        kind: "gradient" for a module whose forward(x, y) -> [B, n] is the gradient itself; then there is no value, and
            no solver. "qp" for a module whose forward(x) -> z [B, n] goes through a `QPLayer`: then `energy` is that
            network, y_example are answers or targets like them, solver is None, and the package has z, its adjoint
            and, with `train`, one step of fine-tuning.
        nonnegative: state_dict names that must stay >= 0 besides those of which the proof of f's convexity needs it,
            which are found; by default what the energy's own nonnegative_weights() says. Fine-tuning keeps all of them
            there. A sign that the proof needs of single entries, or the other sign, is found and kept likewise.
        metadata: free facts for the manifest (data, seed, metrics).
        train: put train.onnx into the package too, one step of fine-tuning on the device; see `TrainSpec`.
        polyhedron: what the head "polyhedron" does unless a call says otherwise: any of "iterations" (100), "mu" (1.0)
            and "tolerance" (1e-9, of float32 1e-5), as `argmin_polyhedron` has them; and "adjoint", "prop3" for
            energies of pieces or "implicit" for smooth ones, by default what f's graph is.
        allow_not_convex: export an energy that was seen not to be convex in y all the same; the manifest says so, and
            the status of every answer.
        overwrite: replace a package that is there.
        progress: called with a line of text at each stage.

    Returns:
        The package, opened and checked. Its graphs hold for any batch; weights bear their state_dict names, once, in
        weights.safetensors. The manifest states whether f was proven convex in y, and golden.safetensors holds inputs
        and outputs to replay elsewhere.

    Raises:
        ExportError: what cannot be exported, or a package that does not agree with torch; nothing is written then.
    """
    path = arguments.path(path, "path")
    if isinstance(solver, PolyhedronArgmin):
        heads, polyhedron = (*heads, "polyhedron"), {**of_layer(solver, energy, y_example), **(polyhedron or {})}
        solver = None
    check_heads(heads, kind, solver, train)
    check_polyhedron(polyhedron, heads)
    check_examples(x_example, y_example)
    if isinstance(solver, nn.Module):
        check_solver(solver, y_example.shape[1])
    elif solver not in (None, "auto"):
        remedy = "pass BundleEntropyArgmin(energy)"
        raise arguments.refused("solver", "a layer, 'auto' or None", arguments.shown(solver), remedy, kind=ExportError)
    check_adjoint(train, solver, kind)
    check_weights(energy, x_example.dtype, heads, kind)
    check_target(folder_of(path), overwrite, kind=ExportError)
    asked = tuple(nonnegative) if nonnegative is not None else _nonnegative(energy)
    with in_eval_mode(energy), quiet(), collected_rarely(), one_thread():
        if kind == "qp":
            contents, judge = network_contents(energy, x_example, y_example, asked, train, progress)
        else:
            contents, judge = energy_contents(
                energy, solver, x_example, y_example, kind, asked, heads, train, polyhedron, allow_not_convex, progress
            )
        contents = replace(contents, name=name or path.stem, metadata={**(metadata or {}), **contents.metadata})
        progress("parity with torch")
        unjudged = replace(contents, convexity=None)  # what is known of it would mark every answer
        with (
            tempfile.TemporaryDirectory(prefix="icnnrt-export-") as scratch,
            icnnrt.load(unjudged.write(Path(scratch) / "package.icnn")) as session,
        ):
            figures = parity.check(session, judge, x_example, y_example)
            held = _golden_inputs(x_example, y_example, session.manifest)
            held |= golden.compute(session, held)
        if contents.convexity is not None and contents.convexity.verdict == "violated":
            held.pop("argmin.x_bar", None)  # no gradient of such answers is handed out
        progress("writing")
        written = contents.write(path, parity=figures, golden=held, overwrite=overwrite)
    _warn_if_not_convex(written)
    return written


def _warn_if_not_convex(written: package.Package) -> None:
    convexity, not_convex = written.manifest.convexity, written.manifest.parity.get("not_convex")
    if convexity is not None and convexity.verdict == "violated":
        seen = convexity.sentence().removesuffix(".")
    elif not_convex:
        seen = f"{not_convex:.0f} samples of the parity check show that it is not convex in y"
    else:
        return
    warnings.warn(
        f"energy: {seen}, so no bound holds and its answers bear the status NOT_CONVEX; keep the weights between "
        "hidden layers non-negative (project_()) and the activations convex and non-decreasing",
        stacklevel=3,
    )


def _nonnegative(energy: nn.Module) -> tuple[str, ...]:
    names = getattr(energy, "nonnegative_weights", None)
    return tuple(names()) if callable(names) else ()


def _golden_inputs(x_example: Tensor, y_example: Tensor, manifest: Manifest) -> dict[str, np.ndarray]:
    """A small batch in general position: x of the examples' scale, y inside the unit box, any v."""
    x, y = (t.numpy()[3 : 3 + GOLDEN_SAMPLES] for t in parity.inputs(x_example, y_example)[2])
    if manifest.kind == "qp":
        return {"x": x}
    v = np.random.default_rng(0).standard_normal((parity.BATCHES[2], *y.shape[1:]))[3 : 3 + GOLDEN_SAMPLES]
    bounds = parity.random_bounds(y) if manifest.domain and manifest.domain.kind == "box" else {}
    return {"x": x, "y": y, "y_dot": v.astype(y.dtype), **bounds}
