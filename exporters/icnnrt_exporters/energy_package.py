"""What a package of an energy f(x, y; θ), or of a gradient, is made of."""

import math
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

import icnnrt
from icnnrt.convexity import Convexity, grounds
from icnnrt.convexity.piecewise import is_piecewise_linear
from icnnrt.errors import ExportError
from icnnrt.format import package
from icnnrt.format.contents import weight_layout
from icnnrt.format.manifest import GraphFile
from icnnrt.format.signatures import listed
from icnnrt.format.signs import NONNEGATIVE, Sign
from icnnrt.serving.polyhedron import usual_settings
from icnnrt_exporters.assembly.adjoint_graph import adjoint_graph
from icnnrt_exporters.assembly.argmin_graph import UNIT_BOX, argmin_graph
from icnnrt_exporters.assembly.losses import loss_graph, named
from icnnrt_exporters.assembly.optimizers import resolve
from icnnrt_exporters.assembly.polyhedron_adjoint_graph import polyhedron_adjoint_graph
from icnnrt_exporters.assembly.polyhedron_graph import polyhedron_graph
from icnnrt_exporters.assembly.train_graph import train_graph
from icnnrt_exporters.assembly.train_spec import TrainSpec
from icnnrt_exporters.checks import parity
from icnnrt_exporters.checks.preconditions import Solver, check_adjoint, check_energy, float64_judge
from icnnrt_exporters.checks.solver_choice import choose_solver
from icnnrt_exporters.graphs.onnx_head import to_onnx
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
from icnnrt_exporters.writing import Contents, Progress, dtype_name, plain_graph, serialise, stored
from icnnrt_models import BregmanProximalGradient

# role -> how its head is traced; the solver's graphs are assembled from others
OPTIONAL_HEADS: Final = {"hvp": hessian_product, "hessian": hessian, "gradient_x": gradient_x}
RUNS: Final = 10  # of a solver that is timed, of which the shortest counts

# KKT residual up to which a model counts as solved, relative to max(1, |lower bound|).
RESIDUAL_TOLERANCE = {"float32": 3e-5, "float64": 1e-8}


def energy_contents(
    energy: nn.Module,
    solver: Solver | str | None,
    x_example: Tensor,
    y_example: Tensor,
    kind: Kind,
    nonnegative: tuple[str, ...],
    heads: Collection[str],
    train: TrainSpec | None,
    polyhedron: Mapping[str, float | str] | None,
    allow_not_convex: bool,
    progress: Progress,
) -> tuple[Contents, nn.Module]:
    """The contents, and the float64 copy of the energy that they are judged by; `export` documents the rest."""
    judge = smoothed(float64_judge(energy, kind))
    # Rows in general position: on the edges a ReLU may stand on a kink, where rounding picks the face.
    x, y = (t[3:7] for t in parity.inputs(x_example, y_example)[-1])
    check_energy(energy, judge, x, y, kind=kind)
    traced = _trace(energy, x_example, y_example, kind, train, progress)
    contents = Contents(
        kind,
        dtype_name(x_example),
        x_shape=tuple(x_example.shape[1:]),
        y_shape=tuple(y_example.shape[1:]),
        graphs=traced.graphs,
        weights=traced.weights,
        trainable=traced.trainable,
        nonnegative=nonnegative,
    )
    if kind == "energy":  # of the value graph alone, before what takes longer
        with tempfile.TemporaryDirectory(prefix="icnnrt-export-") as scratch:
            plain = contents.write(Path(scratch) / "value.icnn")
        progress("convexity")
        contents = replace(contents, convexity=_convexity(plain, x_example, allow_not_convex))
        if contents.convexity and contents.convexity.verdict == "proven":
            signs, convexity = _grounded(plain, contents.convexity)
            contents = replace(contents, convexity=convexity, signs=signs)
        if isinstance(solver, str):
            progress("choosing the solver")

            def seconds(layer: Solver) -> float:
                return _seconds(plain, traced, layer, x_example)

            solver, reason = choose_solver(energy, judge, x_example, y_example.shape[1], seconds)
            check_adjoint(train, solver, kind)
            contents = replace(contents, metadata={"solver_choice": reason})
    assert not isinstance(solver, str), "a gradient has no solver"
    signs = {**{name: Sign(NONNEGATIVE) for name in nonnegative}, **contents.signs}
    graphs, training, of_polyhedron = _parts(traced, solver, y_example, heads, train, polyhedron, signs, progress)
    contents = replace(contents, graphs=graphs, signs=signs, train=training, polyhedron=of_polyhedron)
    if solver is not None:
        contents = replace(contents, solver=_solver_spec(solver, x_example), domain=domain_of(solver))
    return contents, judge


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
    traced = _Traced(found, x, y, head, loss, trainable, weights, weight_layout(weights)[1], {})
    return traced._replace(graphs={role: traced.serialised(plain_graph(head.clone(), role))})


def _parts(
    traced: _Traced,
    solver: Solver | None,
    y_example: Tensor,
    wanted: Collection[str],
    train: TrainSpec | None,
    polyhedron: Mapping[str, float | str] | None,
    signs: Mapping[str, Sign],
    progress: Progress,
) -> tuple[dict[str, bytes], package.TrainingSpec | None, package.PolyhedronSpec | None]:
    """Every graph, and what those of training and of polyhedra do."""
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
    return {**traced.graphs, **more}, training, of_polyhedron


def _polyhedron_spec(traced: _Traced, given: Mapping[str, float | str]) -> package.PolyhedronSpec:
    """Proposition 3 where the energy is of pieces at x = 0, else the optimality conditions."""
    n = traced.y.shape[1]
    pieces = is_piecewise_linear(traced.graphs["value"], traced.weights, np.zeros(tuple(traced.x.shape[1:])), n)
    settings = {**usual_settings(dtype_name(traced.y)), "adjoint": "prop3" if pieces else "implicit", **given}
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
