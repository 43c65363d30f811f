"""From a trained torch energy and its solver to one package that onnxruntime runs."""

import importlib.metadata
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

import icnnrt
from icnnrt import package
from icnnrt.errors import ExportError
from icnnrt_exporters import parity
from icnnrt_exporters.adjoint_graph import adjoint_graph
from icnnrt_exporters.argmin_graph import UNIT_BOX, argmin_graph
from icnnrt_exporters.bodies import functions
from icnnrt_exporters.bregman_graph import bregman_adjoint_graph, bregman_argmin_graph
from icnnrt_exporters.energy_graph import trace_energy
from icnnrt_exporters.heads import cut_vjp, hessian_vector_product, value_and_gradient
from icnnrt_exporters.losses import loss_graph, named
from icnnrt_exporters.onnx_head import quiet, to_onnx
from icnnrt_exporters.optimizers import resolve
from icnnrt_exporters.preconditions import (
    check_energy,
    check_examples,
    check_solver,
    check_target,
    check_weights,
    float64_judge,
)
from icnnrt_exporters.surgery import dismantle, numbered, transposed_products
from icnnrt_exporters.train_graph import train_graph
from icnnrt_exporters.train_spec import TrainSpec
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET
from icnnrt_models import BregmanProximalGradient, BundleEntropyArgmin

Solver = BundleEntropyArgmin | BregmanProximalGradient

Progress = Callable[[str], None]

# KKT residual up to which a model counts as solved, relative to max(1, |lower bound|).
RESIDUAL_TOLERANCE = {"float32": 3e-5, "float64": 1e-8}


def export(
    energy: nn.Module,
    solver: Solver,
    x_example: Tensor,
    y_example: Tensor,
    path: str | Path,
    *,
    name: str | None = None,
    nonnegative: Sequence[str] | None = None,
    metadata: Mapping[str, str | int | float | bool | None] | None = None,
    train: TrainSpec | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage: None,
) -> package.Package:
    """Write f(x, y; θ) and its fixed-iteration argmin over the solver's domain as a package.

    Args:
        energy: a module with forward(x [B, ...], y [B, n]) -> [B], convex in y, float32 or float64. It is exported in
            eval mode, as it is; nothing of it need come from icnnrt_models.
        solver: the layer whose iterations, steps and tolerances the package takes over.
        x_example, y_example: one batch of inputs of the right shape and dtype, for tracing and for the parity check;
            give real data, so that the figures mean something.
        path: the folder to write, by custom `*.icnn`.
        name: what the package calls itself; the folder's stem by default.
        nonnegative: state_dict names that must stay >= 0 for f to be convex in y; by default what the energy's own
            nonnegative_weights() says.
        metadata: free facts for the manifest (data, seed, metrics).
        train: put train.onnx into the package too, one step of fine-tuning on the device; see `TrainSpec`.
        overwrite: replace a package that is there.
        progress: called with a line of text at each stage.

    Returns:
        The package, opened and checked. value.onnx, argmin.onnx and adjoint.onnx hold for any batch; weights bear
        their state_dict names, once, in weights.safetensors. Samples of the parity check that show that f is not
        convex in y are told by a warning.

    Raises:
        ExportError: what cannot be exported, or a package that does not agree with torch; nothing is written then.
    """
    path = Path(path)
    check_examples(x_example, y_example)
    check_solver(solver, y_example.shape[1])
    check_weights(energy, x_example.dtype)
    check_target(path, overwrite)
    modes = [(module, module.training) for module in energy.modules()]
    energy.eval()
    try:
        with quiet():
            judge = float64_judge(energy)
            # Rows in general position: on the edges a ReLU may stand on a kink, where rounding picks the face.
            check_energy(energy, judge, *(t[3:7] for t in parity.inputs(x_example, y_example)[-1]))
            must_not_be_negative = tuple(nonnegative) if nonnegative is not None else _nonnegative(energy)
            graphs, weights, trainable, train_spec = _graphs(
                energy, solver, x_example, y_example, train, must_not_be_negative, progress
            )
            _write_checked(
                path,
                judge,
                solver,
                x_example,
                y_example,
                graphs,
                weights,
                trainable,
                must_not_be_negative,
                train_spec,
                name or path.stem,
                dict(metadata or {}),
                overwrite,
                progress,
            )
    finally:
        for module, training in modes:
            module.training = training
    written = package.Package.open(path)
    if not_convex := written.manifest.parity.get("not_convex"):
        warnings.warn(
            f"energy: {not_convex:.0f} samples of the parity check show that it is not convex in y, so no bound holds "
            "for them and their answers will bear the status NOT_CONVEX; keep the weights between hidden layers "
            "non-negative (project_()) and the activations convex and non-decreasing",
            stacklevel=2,
        )
    return written


def _nonnegative(energy: nn.Module) -> tuple[str, ...]:
    names = getattr(energy, "nonnegative_weights", None)
    return tuple(names()) if callable(names) else ()


def _graphs(
    energy: nn.Module,
    solver: Solver,
    x_example: Tensor,
    y_example: Tensor,
    train: TrainSpec | None,
    nonnegative: Sequence[str],
    progress: Progress,
) -> tuple[dict[str, bytes], dict[str, np.ndarray], tuple[str, ...], package.TrainingSpec | None]:
    progress("tracing the energy")
    traced = trace_energy(energy, x_example, y_example)
    K = solver.iterations
    x, y = (t[:1].detach().expand(11, *t.shape[1:]).contiguous() for t in (x_example, y_example))
    # All names of a shared parameter: the graph reads it under any one of them.
    learnable = {name for name, p in energy.named_parameters(remove_duplicate=False) if p.requires_grad}
    trainable = tuple(name for name in traced.theta if name in learnable)

    if train and train.adjoint == "prop3" and step_size_of(solver) is not None:
        raise ExportError("adjoint: 'prop3' belongs to the bundle method, not to the Bregman step; leave it 'exact'")
    progress("value and gradient")
    updated: tuple[str, ...] = ()
    if train:
        train.check_names(traced.theta)
        updated = train.chosen(trainable)
    # Before anything that takes longer, so that a loss that does not fit is told at once.
    loss = loss_graph(named(train.loss)[1], y, train.target(y_example)) if train else None
    head = to_onnx(value_and_gradient(traced, x, y))
    domain = domain_of(solver)
    box = domain.kind == "box"
    step_size = step_size_of(solver)
    assembled = {
        "argmin": argmin_graph(head.clone(), K, solver.steps, domain)
        if step_size is None
        else bregman_argmin_graph(head.clone(), K, step_size, domain)
    }
    progress("Hessian-vector product")
    hvp = to_onnx(hessian_vector_product(traced, x, y))
    progress("adjoint")
    push = to_onnx(cut_vjp(traced, x, y, K, trainable, points=box))
    training = None
    if train and loss:
        progress("training step")
        training = train.described(updated, y_example)
        assembled["train"] = train_graph(
            head.clone(),
            # Gradients of the weights that stay are not computed.
            push.clone() if updated == trainable else to_onnx(cut_vjp(traced, x, y, K, updated, points=box)),
            hvp.clone(),
            loss,
            K=K,
            steps=solver.steps,
            optimizer=resolve(train.optimizer),
            updated=updated,
            nonnegative=frozenset(nonnegative),
            depth=K if train.adjoint == "exact" else 1,
            clip_norm=train.clip_norm,
            residual_tolerance=residual_tolerance(solver, x_example),
            domain=domain,
            step_size=step_size,
        )
    assembled["adjoint"] = (
        adjoint_graph(push, hvp, K, domain)
        if step_size is None
        else bregman_adjoint_graph(push, hvp, K, step_size, domain)
    )
    assembled["value"] = _value_graph(head)

    weights = {
        name: tensor.detach().cpu().contiguous().numpy() for name, tensor in _stored(energy, traced.theta).items()
    }
    constants = {name: traced.theta[name] for name in traced.constants}
    _, layout = package.weight_layout(weights)
    graphs = {role: _serialise(graph, weights, layout, constants, domain) for role, graph in assembled.items()}
    return graphs, weights, trainable, training


def step_size_of(solver: nn.Module) -> float | None:
    """τ of Bregman proximal gradient, None for the bundle method."""
    return solver.step_size if isinstance(solver, BregmanProximalGradient) else None


def domain_of(solver: nn.Module) -> package.Domain:
    """Where the layer's y lies; layers that know of no domains solve over [0, 1]^n."""
    kind = getattr(solver, "domain", "unit_box")
    return package.Domain(kind, float(getattr(solver, "mu", 1.0)) if kind == "space" else None)


def residual_tolerance(solver: Solver, x_example: Tensor) -> float:
    return solver.residual_tolerance or RESIDUAL_TOLERANCE[str(x_example.dtype).removeprefix("torch.")]


def _stored(energy: nn.Module, read: Collection[str]) -> dict[str, Tensor]:
    """The state_dict, less the second names of shared tensors: a shared weight is stored under the name graphs read."""
    state = energy.state_dict()
    places = {state[name].data_ptr(): name for name in read if name in state}
    return {name: t for name, t in state.items() if name in read or t.data_ptr() not in places}


def _value_graph(head: ir.Model) -> ir.Graph:
    """The head with its data inputs first."""
    (*weights, x, y), outputs, nodes, constants = dismantle(head.graph, "energy")
    return ir.Graph([x, y, *weights], outputs, nodes=nodes, initializers=numbered(constants), name="value")


def _serialise(
    graph: ir.Graph,
    weights: Mapping[str, np.ndarray],
    layout: Mapping[str, tuple[int, int]],
    constants: Mapping[str, Tensor],
    domain: package.Domain = UNIT_BOX,
) -> bytes:
    """One self-contained ONNX file: op bodies included, weights overridable and stored once, beside it."""
    for v in list(graph.inputs):
        assert v.name is not None
        if v.name in constants:
            v.const_value = ir.tensor(constants[v.name].cpu().numpy(), name=v.name)
            graph.inputs.remove(v)
            graph.register_initializer(v)
        elif v.name in weights:
            offset, length = layout[v.name]
            assert v.dtype is not None
            v.const_value = ir.ExternalTensor(
                package.WEIGHTS_FILE,
                offset,
                length,
                v.dtype,
                shape=ir.Shape(weights[v.name].shape),
                name=v.name,
            )
            graph.register_initializer(v)
    graph.opset_imports[""] = OPSET
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="icnnrt")
    used = {node.op_identifier() for node in graph.all_nodes()}
    bodies = {f.identifier(): f for f in map(ir.serde.deserialize_function, functions(domain.kind))}
    if used & bodies.keys():
        graph.opset_imports[package.OP_DOMAIN] = OP_VERSION
        model.functions.update(bodies)
        passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    transposed_products(graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    passes.NameFixPass()(model)
    proto = ir.to_proto(model)
    return proto.SerializeToString(deterministic=True)


def _write_checked(
    path: Path,
    judge: nn.Module,
    solver: Solver,
    x_example: Tensor,
    y_example: Tensor,
    graphs: Mapping[str, bytes],
    weights: Mapping[str, np.ndarray],
    trainable: Sequence[str],
    nonnegative: Sequence[str],
    train: package.TrainingSpec | None,
    name: str,
    metadata: Mapping[str, str | int | float | bool | None],
    overwrite: bool,
    progress: Progress,
) -> None:
    """Write to a scratch folder, compare with torch, and only then to the path."""
    dtype = str(x_example.dtype).removeprefix("torch.")
    assert dtype in ("float32", "float64")

    def write(target: Path, figures: Mapping[str, object] | None) -> None:
        package.write(
            target,
            name=name,
            dtype=dtype,
            x_shape=tuple(x_example.shape[1:]),
            y_shape=tuple(y_example.shape[1:]),
            solver=package.SolverSpec(
                solver.iterations,
                solver.steps,
                solver.gap_tolerance,
                residual_tolerance(solver, x_example),
                "BundleEntropy" if step_size_of(solver) is None else "BregmanProximalGradient",
                step_size_of(solver),
            ),
            domain=domain_of(solver),
            graphs=graphs,
            weights=weights,
            nonnegative=nonnegative,
            trainable=trainable,
            opset=OPSET,
            ir_version=IR_VERSION,
            producer=_producer(),
            parity=figures,  # type: ignore[arg-type]
            metadata=metadata,
            train=train,
            overwrite=overwrite and target == path,
        )

    progress("parity with torch")
    scratch = Path(tempfile.mkdtemp(prefix="icnnrt-export-"))
    try:
        write(scratch / "package.icnn", None)
        session = icnnrt.load(scratch / "package.icnn")
        figures = parity.check(session, judge, solver, x_example, y_example)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    progress("writing")
    write(path, figures)


def _producer() -> dict[str, str]:
    return {
        "icnnrt": importlib.metadata.version("icnnrt"),
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
    }
