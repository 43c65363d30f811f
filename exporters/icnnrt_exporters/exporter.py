"""From a trained torch energy and its solver to one package that onnxruntime runs."""

import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

import icnnrt
from icnnrt.checking import golden
from icnnrt.convexity import Convexity, grounds
from icnnrt.convexity.piecewise import is_piecewise_linear
from icnnrt.errors import ExportError
from icnnrt.format import package
from icnnrt.format.manifest import GraphFile
from icnnrt.format.signatures import listed
from icnnrt.format.signs import NONNEGATIVE, Sign
from icnnrt.serving.polyhedron import _usual
from icnnrt_exporters.assembly.adjoint_graph import adjoint_graph
from icnnrt_exporters.assembly.argmin_graph import UNIT_BOX, argmin_graph
from icnnrt_exporters.assembly.losses import loss_graph, named
from icnnrt_exporters.assembly.optimizers import resolve
from icnnrt_exporters.assembly.polyhedron_adjoint_graph import polyhedron_adjoint_graph
from icnnrt_exporters.assembly.polyhedron_graph import polyhedron_graph
from icnnrt_exporters.assembly.train_graph import train_graph
from icnnrt_exporters.assembly.train_spec import TrainSpec
from icnnrt_exporters.checks import parity
from icnnrt_exporters.checks.preconditions import (
    Solver,
    check_energy,
    check_examples,
    check_heads,
    check_polyhedron,
    check_solver,
    check_target,
    check_weights,
    float64_judge,
    of_layer,
)
from icnnrt_exporters.checks.solver_choice import choose_solver
from icnnrt_exporters.graphs.onnx_head import quiet, to_onnx
from icnnrt_exporters.tracing.energy_graph import EnergyGraph, Kind, trace_energy, trace_gradient
from icnnrt_exporters.tracing.heads import (
    cut_vjp,
    gradient,
    gradient_x,
    hessian,
    hessian_product,
    hessian_vector_product,
    pullback,
    value_and_gradient,
)
from icnnrt_exporters.tracing.smooth_softplus import smoothed
from icnnrt_exporters.versions import IR_VERSION, OPSET
from icnnrt_exporters.writing import GOLDEN_SAMPLES, dtype_name, plain_graph, producer, serialise, stored
from icnnrt_models import BregmanProximalGradient, PolyhedronArgmin

Progress = Callable[[str], None]

# role -> how its head is traced; the solver's graphs are assembled from others
OPTIONAL_HEADS: Final = {"hvp": hessian_product, "hessian": hessian, "gradient_x": gradient_x}
RUNS: Final = 10  # of a solver that is timed, of which the shortest counts

# KKT residual up to which a model counts as solved, relative to max(1, |lower bound|).
RESIDUAL_TOLERANCE = {"float32": 3e-5, "float64": 1e-8}


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
            and "tolerance" (1e-9, of float32 1e-5), as `Session.argmin_polyhedron` has them; and "adjoint", "prop3" for
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
    path = Path(path)
    if isinstance(solver, PolyhedronArgmin):
        heads, polyhedron = (*heads, "polyhedron"), {**of_layer(solver, energy, y_example), **(polyhedron or {})}
        solver = None
    check_heads(heads, kind, solver, train)
    check_polyhedron(polyhedron, heads)
    if kind == "qp":
        from icnnrt_exporters.qp_package import export_qp

        return export_qp(
            energy,
            x_example,
            y_example,
            path,
            name=name,
            nonnegative=tuple(nonnegative) if nonnegative is not None else _nonnegative(energy),
            metadata=dict(metadata or {}),
            train=train,
            overwrite=overwrite,
            progress=progress,
        )
    check_examples(x_example, y_example)
    layer: Solver | None = None
    if isinstance(solver, nn.Module):
        layer = solver
        check_solver(layer, y_example.shape[1])
        check_adjoint(train, layer)
    elif solver not in (None, "auto"):
        raise ExportError(f"solver: expected a layer, 'auto' or None, got {solver!r}; pass BundleEntropyArgmin(energy)")
    check_weights(energy, x_example.dtype, heads)
    check_target(path, overwrite)
    modes = [(module, module.training) for module in energy.modules()]
    energy.eval()
    try:
        with quiet():
            judge = smoothed(float64_judge(energy, kind))
            # Rows in general position: on the edges a ReLU may stand on a kink, where rounding picks the face.
            x, y = (t[3:7] for t in parity.inputs(x_example, y_example)[-1])
            check_energy(energy, judge, x, y, kind=kind)
            must_not_be_negative = tuple(nonnegative) if nonnegative is not None else _nonnegative(energy)
            facts = dict(metadata or {})
            traced = _trace(energy, x_example, y_example, kind, train, progress)

            def described(target: Path, solver: Solver | None, graphs: Mapping[str, bytes], **more: Any) -> Any:
                return package.write(
                    target,
                    name=name or path.stem,
                    dtype=dtype_name(x_example),
                    x_shape=tuple(x_example.shape[1:]),
                    y_shape=tuple(y_example.shape[1:]),
                    kind=kind,
                    solver=None if solver is None else _solver_spec(solver, x_example),
                    domain=None if solver is None else domain_of(solver),
                    graphs=graphs,
                    weights=traced.weights,
                    nonnegative=must_not_be_negative,
                    signs=signs,
                    trainable=traced.trainable,
                    opset=OPSET,
                    ir_version=IR_VERSION,
                    producer=producer(),
                    **more,
                )

            convexity = None
            signs: Mapping[str, Sign] = {}
            if kind == "energy":  # of the value graph alone, before what takes longer
                with tempfile.TemporaryDirectory(prefix="icnnrt-export-") as scratch:
                    plain = described(Path(scratch) / "value.icnn", None, traced.graphs)
                progress("convexity")
                convexity = _convexity(plain, x_example, allow_not_convex)
                if convexity.verdict == "proven":
                    signs, convexity = _grounded(plain, convexity)
                if isinstance(solver, str):
                    progress("choosing the solver")

                    def seconds(layer: Solver) -> float:
                        return _seconds(plain, traced, layer, x_example)

                    layer, facts["solver_choice"] = choose_solver(energy, judge, x_example, y_example.shape[1], seconds)
                    check_adjoint(train, layer)
            signs = {**{name: Sign(NONNEGATIVE) for name in must_not_be_negative}, **signs}
            parts = _parts(traced, layer, y_example, heads, train, polyhedron, signs, progress)

            def write(target: Path, **more: Any) -> package.Package:
                written: package.Package = described(
                    target,
                    layer,
                    parts.graphs,
                    metadata=facts,
                    train=parts.train,
                    polyhedron=parts.polyhedron,
                    overwrite=overwrite and target == path,
                    **more,
                )
                return written

            found = _examined(write, judge, layer, x_example, y_example, progress)
            if convexity is not None and convexity.verdict == "violated":
                found["golden"].pop("argmin.x_bar", None)  # no gradient of such answers is handed out
            progress("writing")
            written = write(path, convexity=convexity, **found)
    finally:
        for module, training in modes:
            module.training = training
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


def _convexity(plain: package.Package, x_example: Tensor, allow_not_convex: bool) -> Convexity:
    """What a package of the energy alone says of its convexity in y; a violation is an error unless it is allowed."""
    with icnnrt.load(plain) as session:
        found = session.prove_convexity(x_example.detach().cpu().numpy())
    if found.verdict == "violated" and not allow_not_convex:
        raise ExportError(
            f"energy: {found.sentence().removesuffix('.')}; keep the weights that mix convex units non-negative, or "
            "pass allow_not_convex=True (--allow-not-convex) and have the status of every answer say so until "
            "`icnnrt repair --project` has clipped them"
        )
    return found


def _grounded(plain: package.Package, proven: Convexity) -> tuple[Mapping[str, Sign], Convexity]:
    """The signs that a proof needs of the weights, those asked for anyway among them, and what else it rests on."""
    told = plain.manifest.weights
    found = grounds(plain.graphs["value"], plain.weights, told.trainable, told.signs)
    assert found is not None, "what is proven has grounds"
    return found.signs, replace(proven, rests_on=found.values)


def _seconds(plain: package.Package, traced: "_Traced", layer: Solver, x: Tensor) -> float:
    """The shortest of some runs of a solver on x as it will be served: its graph in onnxruntime."""
    graph = traced.serialised(_argmin_graph(traced.head, layer), domain_of(layer))
    # Made in memory alone: without an adjoint it is no package that a folder could hold.
    manifest = replace(plain.manifest, solver=_solver_spec(layer, x), domain=domain_of(layer))
    told = GraphFile("argmin.onnx", "", len(graph), listed(manifest, "argmin", graph))
    manifest = replace(manifest, graphs={**manifest.graphs, "argmin": told})
    X, shortest = x.detach().cpu().numpy(), math.inf
    with icnnrt.load(replace(plain, manifest=manifest, graphs={**plain.graphs, "argmin": graph})) as session:
        session.argmin(X)  # the first run makes the session
        for _ in range(RUNS):
            began = time.perf_counter()
            session.argmin(X)
            shortest = min(shortest, time.perf_counter() - began)
    return shortest


class _Traced(NamedTuple):
    """An energy as graphs: what every part of a package is made from."""

    energy: EnergyGraph
    x: Tensor  # examples of eleven rows
    y: Tensor
    head: ir.Model  # of value and gradient, or of the gradient alone
    loss: ir.Model | None
    trainable: tuple[str, ...]
    weights: dict[str, np.ndarray]
    layout: Mapping[str, tuple[int, int]]
    graphs: dict[str, bytes]  # that of the head

    def serialised(self, graph: ir.Graph, domain: package.Domain = UNIT_BOX) -> bytes:
        constants = {name: self.energy.theta[name] for name in self.energy.constants}
        return serialise(graph, self.weights, self.layout, constants, domain)


def _trace(
    energy: nn.Module, x_example: Tensor, y_example: Tensor, kind: Kind, train: TrainSpec | None, progress: Progress
) -> _Traced:
    progress("tracing the energy")
    found = (trace_energy if kind == "energy" else trace_gradient)(energy, x_example, y_example)
    x, y = (t[:1].detach().expand(11, *t.shape[1:]).contiguous() for t in (x_example, y_example))
    loss = None
    if kind == "energy":
        progress("value and gradient")
        if train:  # before anything that takes longer, so that a choice that does not fit is told at once
            train.check_names(found.theta)
            loss = loss_graph(named(train.loss)[1], y, train.target(y_example))
        role, head = "value", to_onnx(value_and_gradient(found, x, y))
    else:
        progress("gradient")
        role, head = "gradient", to_onnx(gradient(found, x, y))
    weights, trainable = stored(energy, found.theta)
    traced = _Traced(found, x, y, head, loss, trainable, weights, package.weight_layout(weights)[1], {})
    return traced._replace(graphs={role: traced.serialised(plain_graph(head.clone(), role))})


class _Parts(NamedTuple):
    """What a package is made of, but for what is found out about it when it runs."""

    graphs: dict[str, bytes]
    train: package.TrainingSpec | None
    polyhedron: package.PolyhedronSpec | None


def _parts(
    traced: _Traced,
    solver: Solver | None,
    y_example: Tensor,
    wanted: Collection[str],
    train: TrainSpec | None,
    polyhedron: Mapping[str, float | str] | None,
    signs: Mapping[str, Sign],
    progress: Progress,
) -> _Parts:
    assembled: dict[str, ir.Graph] = {}
    training: package.TrainingSpec | None = None
    if solver is not None:
        assembled, training = _solver_graphs(traced, solver, y_example, train, signs, progress)
    of_hessian: ir.Model | None = None
    for role, make in OPTIONAL_HEADS.items():
        if role in wanted:
            progress(role.replace("_", " by "))
            made = to_onnx(make(traced.energy, traced.x, traced.y))
            of_hessian = made.clone() if role == "hessian" else of_hessian
            assembled[role] = plain_graph(made, role)
    push = None
    if not {"pullback", "polyhedron"}.isdisjoint(wanted):
        progress("pullback")
        push = to_onnx(pullback(traced.energy, traced.x, traced.y, traced.trainable))
        if "pullback" in wanted:
            assembled["pullback"] = plain_graph(push.clone(), "pullback")
    of_polyhedron = None
    if push is not None and "polyhedron" in wanted:
        progress("argmin over a polyhedron")
        of_polyhedron = _polyhedron_spec(traced, polyhedron or {})
        assembled["argmin_polyhedron"] = polyhedron_graph(traced.head.clone(), of_polyhedron)
        curvature = None
        if of_polyhedron.adjoint == "implicit":
            curvature = of_hessian or to_onnx(hessian(traced.energy, traced.x, traced.y))
        assembled["adjoint_polyhedron"] = polyhedron_adjoint_graph(push, curvature, of_polyhedron)
    domain = UNIT_BOX if solver is None else domain_of(solver)
    more = {role: traced.serialised(graph, domain) for role, graph in assembled.items()}
    return _Parts({**traced.graphs, **more}, training, of_polyhedron)


def _polyhedron_spec(traced: _Traced, given: Mapping[str, float | str]) -> package.PolyhedronSpec:
    """Proposition 3 where the energy is of pieces at x = 0, else the optimality conditions."""
    n = traced.y.shape[1]
    pieces = is_piecewise_linear(traced.graphs["value"], traced.weights, np.zeros(tuple(traced.x.shape[1:])), n)
    settings = {**_usual(dtype_name(traced.y)), "adjoint": "prop3" if pieces else "implicit", **given}
    return package.PolyhedronSpec(
        int(settings["iterations"]), float(settings["mu"]), float(settings["tolerance"]), str(settings["adjoint"])
    )


def _argmin_graph(head: ir.Model, solver: Solver) -> ir.Graph:
    return argmin_graph(head.clone(), solver.iterations, solver.steps, domain_of(solver), step_size_of(solver))


def _solver_graphs(
    given: _Traced,
    solver: Solver,
    y_example: Tensor,
    train: TrainSpec | None,
    signs: Mapping[str, Sign],
    progress: Progress,
) -> tuple[dict[str, ir.Graph], package.TrainingSpec | None]:
    """argmin, adjoint and, if asked for, one step of training, around the head of value and gradient."""
    traced, head, trainable, x, y = given.energy, given.head, given.trainable, given.x, given.y
    K, domain, step_size = solver.iterations, domain_of(solver), step_size_of(solver)
    box = domain.kind == "box"
    assembled = {"argmin": _argmin_graph(head, solver)}
    progress("Hessian-vector product")
    hvp = to_onnx(hessian_vector_product(traced, x, y))
    progress("adjoint")
    push = to_onnx(cut_vjp(traced, x, y, K, trainable, points=box))
    training = None
    if train and given.loss:
        progress("training step")
        updated = train.chosen(trainable)
        training = train.described(updated, y_example)
        assembled["train"] = train_graph(
            head.clone(),
            # Gradients of the weights that stay are not computed.
            push.clone() if updated == trainable else to_onnx(cut_vjp(traced, x, y, K, updated, points=box)),
            hvp.clone(),
            given.loss,
            K=K,
            steps=solver.steps,
            optimizer=resolve(train.optimizer),
            updated=updated,
            signs=signs,
            depth=K if train.adjoint == "exact" else 1,
            clip_norm=train.clip_norm,
            residual_tolerance=residual_tolerance(solver, x),
            domain=domain,
            step_size=step_size,
        )
    assembled["adjoint"] = adjoint_graph(push, hvp, K, domain, step_size)
    return assembled, training


def check_adjoint(train: TrainSpec | None, solver: Solver) -> None:
    """A training step of Bregman proximal gradient has one adjoint."""
    if train and train.adjoint == "prop3" and step_size_of(solver) is not None:
        raise ExportError("adjoint: 'prop3' belongs to the bundle method, not to the Bregman step; leave it 'exact'")


def step_size_of(solver: nn.Module | None) -> float | None:
    """τ of Bregman proximal gradient, None for the bundle method."""
    return solver.step_size if isinstance(solver, BregmanProximalGradient) else None


def domain_of(solver: nn.Module) -> package.Domain:
    """Where the layer's y lies; layers that know of no domains solve over [0, 1]^n."""
    kind = getattr(solver, "domain", "unit_box")
    return package.Domain(kind, float(getattr(solver, "mu", 1.0)) if kind == "space" else None)


def residual_tolerance(solver: Solver, x_example: Tensor) -> float:
    return solver.residual_tolerance or RESIDUAL_TOLERANCE[dtype_name(x_example)]


def _solver_spec(solver: Solver, x_example: Tensor) -> package.SolverSpec:
    step_size = step_size_of(solver)
    return package.SolverSpec(
        solver.iterations,
        solver.steps,
        solver.gap_tolerance,
        residual_tolerance(solver, x_example),
        "BundleEntropy" if step_size is None else "BregmanProximalGradient",
        step_size,
    )


def _examined(
    write: Callable[..., package.Package],
    judge: nn.Module,
    solver: Solver | None,
    x_example: Tensor,
    y_example: Tensor,
    progress: Progress,
) -> dict[str, Any]:
    """Write to a scratch folder, and find out what the package does: parity with torch, golden data."""
    progress("parity with torch")
    scratch = Path(tempfile.mkdtemp(prefix="icnnrt-export-"))
    try:
        session = icnnrt.load(write(scratch / "package.icnn"))
        figures = parity.check(session, judge, solver, x_example, y_example)
        inputs = _golden_inputs(x_example, y_example, session.manifest.domain)
        held = {**inputs, **golden.compute(session, inputs)}
        return {"parity": figures, "golden": held}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _golden_inputs(x_example: Tensor, y_example: Tensor, domain: package.Domain | None) -> dict[str, np.ndarray]:
    """A small batch in general position: x of the examples' scale, y inside the unit box, any v."""
    x, y = parity.inputs(x_example, y_example)[2]
    rng = np.random.default_rng(0)
    few = slice(3, 3 + GOLDEN_SAMPLES)
    v = rng.standard_normal(y.shape)[few]
    bounds = parity.random_bounds(y.numpy()[few]) if domain and domain.kind == "box" else {}
    return {"x": x.numpy()[few], "y": y.numpy()[few], "y_dot": v.astype(y.numpy().dtype), **bounds}
