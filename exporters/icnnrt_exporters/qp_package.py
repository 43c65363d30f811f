"""From a torch network of quadratic programs to one package that onnxruntime runs and fine-tunes."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

import icnnrt
from icnnrt.checking import golden
from icnnrt.errors import ExportError
from icnnrt.format import package
from icnnrt.format.signatures import QP_NAMES
from icnnrt.format.signs import NONNEGATIVE, Sign
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt_exporters.assembly.losses import loss_graph, named
from icnnrt_exporters.assembly.optimizers import resolve
from icnnrt_exporters.assembly.qp_train_graph import qp_train_graph
from icnnrt_exporters.assembly.train_spec import TrainSpec
from icnnrt_exporters.checks import parity
from icnnrt_exporters.checks.preconditions import check_examples, check_target, check_weights, float64_judge
from icnnrt_exporters.graphs.onnx_head import quiet, to_onnx
from icnnrt_exporters.surgery import dismantle, numbered
from icnnrt_exporters.tracing.qp_network import QPNetwork, adjoint_head, solve_head
from icnnrt_exporters.versions import IR_VERSION, OPSET
from icnnrt_exporters.writing import GOLDEN_SAMPLES, dtype_name, plain_graph, producer, serialise, stored

# Against torch in float64. z is known to the root of the gap where a constraint is weakly active; float32 data move it
# by their own rounding too, and a cotangent by more where constraints nearly depend on each other.
TOLERANCE: Final = {
    "float64": {"z": 1e-6, "vjp": 1e-5},
    "float32": {"z": 1e-3, "vjp": 3e-2},
}
# Largest |z(batch) − z(sample alone)| in float64: sums in another order, and the solver's accuracy.
SAMPLES_APART: Final = 1e-6
RESERVED: Final = frozenset(name for names in QP_NAMES.values() for part in names for name in part)


def export_qp(
    module: nn.Module,
    x_example: Tensor,
    z_example: Tensor,
    path: Path,
    *,
    name: str | None,
    nonnegative: Sequence[str],
    metadata: Mapping[str, Any],
    train: TrainSpec | None,
    overwrite: bool,
    progress: Callable[[str], None],
) -> package.Package:
    """Write z(x; θ), a network that goes through quadratic programs, and its adjoint; `export` documents the rest."""
    check_examples(x_example, z_example)
    check_weights(module, x_example.dtype)
    check_target(path, overwrite)
    for weight in module.state_dict():
        if weight in RESERVED:
            raise ExportError(
                f"module: a weight is called {weight!r}, as an input or output of the graphs is; rename it in the "
                "module"
            )
    if train and train.adjoint != "exact":
        raise ExportError(f"adjoint: a quadratic program has one adjoint, got {train.adjoint!r}; leave it 'exact'")
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with quiet():
            judge = float64_judge(module, "qp")
            batches = parity.inputs(x_example, z_example)
            _check_samples(judge, batches[-1][0][3:7])
            progress("tracing the network")
            network = QPNetwork(module, x_example)
            if network.n != z_example.shape[1]:
                raise ExportError(
                    f"y_example: expected answers of {network.n} columns, as the forward returns, got "
                    f"{z_example.shape[1]}; pass what module(x_example) returns, or targets like it"
                )
            graphs, weights, trainable, training = _parts(
                module, network, x_example, z_example, nonnegative, train, progress
            )

            def write(target: Path, **more: Any) -> package.Package:
                return package.write(
                    target,
                    name=name or path.stem,
                    dtype=dtype_name(x_example),
                    x_shape=tuple(x_example.shape[1:]),
                    y_shape=(network.n,),
                    kind="qp",
                    solver=None,
                    graphs=graphs,
                    weights=weights,
                    nonnegative=nonnegative,
                    trainable=trainable,
                    opset=OPSET,
                    ir_version=IR_VERSION,
                    producer=producer(),
                    metadata=metadata,
                    train=training,
                    overwrite=overwrite and target == path,
                    **more,
                )

            progress("parity with torch")
            scratch = Path(tempfile.mkdtemp(prefix="icnnrt-export-"))
            try:
                session = icnnrt.load(write(scratch / "package.icnn"))
                figures = _parity(session, judge, [x for x, _ in batches] + [x_example])
                x = batches[2][0][3 : 3 + GOLDEN_SAMPLES].numpy()
                held = {"x": x, **golden.compute(session, {"x": x})}
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            progress("writing")
            return write(path, parity=figures, golden=held)
    finally:
        for part, training_mode in modes:
            part.training = training_mode


def _check_samples(judge: nn.Module, x: Tensor) -> None:
    """Each sample's answer is its own."""
    X = x.double()
    try:
        with torch.no_grad():
            together = judge(X)
            if not isinstance(together, Tensor):
                return  # QPNetwork tells of a wrong output
            alone = torch.cat([judge(X[i : i + 1]) for i in range(len(X))])
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:240].rstrip(".")
        raise ExportError(
            f"module: its forward must work for a batch of any size, and in float64 too, but fails on samples like "
            f"x_example ({reason}); register plain tensor attributes with register_buffer, and leave on_unsafe='raise' "
            "out"
        ) from error
    if together.shape != alone.shape:
        return
    both = torch.isfinite(together) & torch.isfinite(alone)
    apart = float(torch.where(both, together - alone, 0.0).abs().max())
    if apart > SAMPLES_APART * max(1.0, float(together.nan_to_num(0.0).abs().max())):
        raise ExportError(
            f"module: the answer of a sample depends on the others of its batch (by {apart:.1e}); make the forward "
            "treat every row of x on its own, without statistics over the batch"
        )


def _parts(
    module: nn.Module,
    network: QPNetwork,
    x_example: Tensor,
    z_example: Tensor,
    nonnegative: Sequence[str],
    train: TrainSpec | None,
    progress: Callable[[str], None],
) -> tuple[dict[str, bytes], dict[str, np.ndarray], tuple[str, ...], package.TrainingSpec | None]:
    """Graphs, weights, the trainable ones, and what the training graph does."""
    x = x_example[:1].detach().expand(11, *x_example.shape[1:]).contiguous()
    weights, trainable = stored(module, network.theta)
    loss = None
    if train:  # before anything that takes longer, so that a choice that does not fit is told at once
        train.check_names(network.theta)
        loss = loss_graph(named(train.loss)[1], z_example, train.target(z_example))
    progress("solve")
    assembled = {"solve": plain_graph(to_onnx(solve_head(network, x)), "solve")}
    progress("adjoint")
    push = to_onnx(adjoint_head(network, x, trainable))
    training = None
    if train and loss:
        progress("training step")
        updated = train.chosen(trainable)
        training = train.described(updated, z_example)
        assembled["train"] = qp_train_graph(
            push.clone() if updated == trainable else to_onnx(adjoint_head(network, x, updated)),
            loss,
            optimizer=resolve(train.optimizer),
            updated=updated,
            signs={name: Sign(NONNEGATIVE) for name in nonnegative},
            clip_norm=train.clip_norm,
        )
    (*inputs, x_in, z_bar), results, nodes, constants = dismantle(push.graph, "network")
    assembled["solve_adjoint"] = ir.Graph(
        [x_in, z_bar, *inputs],
        results[:-3],  # not what the forward pass inside it found
        nodes=nodes,
        initializers=numbered(constants),
        name="solve_adjoint",
    )
    made = {name: network.theta[name] for name in network.constants}
    _, layout = package.weight_layout(weights)
    graphs = {role: serialise(graph, weights, layout, made) for role, graph in assembled.items()}
    return graphs, weights, trainable, training


def _parity(session: icnnrt.Session, judge: nn.Module, batches: Sequence[Tensor]) -> dict[str, float]:
    """Errors against the float64 copy of the module, of the samples that both solved; raises ExportError beyond."""
    figures = {"z": 0.0, "vjp": 0.0}
    unsolved, count = 0, 0
    for x in batches:
        X = x.detach().double().clone()
        with torch.no_grad():
            z = judge(X)
        found = session.solve_qp(x.detach().numpy())
        count += len(found)
        unsolved += int((found.status != QPStatus.SOLVED).sum())
        keep = found.ok & np.isfinite(z.numpy()).all(1)
        if not keep.any():
            continue
        rows = torch.from_numpy(keep)
        figures["z"] = max(figures["z"], parity.error(found.z[keep], z.numpy()[keep]))
        bar = torch.cos(torch.arange(z.numel(), dtype=torch.float64)).reshape(z.shape)[rows]
        # A second pass of the kept rows alone: the gradient of weights is a sum, which others would make NaN.
        kept_x = X[rows].requires_grad_()
        wanted = {name: p for name, p in judge.named_parameters() if p.requires_grad}
        bars = torch.autograd.grad(
            (judge(kept_x) * bar).sum(), [kept_x, *wanted.values()], materialize_grads=True, allow_unused=True
        )
        mine = session.vjp(found[keep], bar.numpy())
        figures["vjp"] = max(figures["vjp"], parity.error(mine.x, bars[0].numpy()))
        for name, true in zip(wanted, bars[1:], strict=True):
            if name in mine.weights:
                figures["vjp"] = max(figures["vjp"], parity.error(mine.weights[name], true.numpy()))
    for figure, value in figures.items():
        bound = TOLERANCE[session.manifest.dtype][figure]
        if not value <= bound:
            raise ExportError(
                f"parity: {figure} differs from torch in float64 by {value:.1e}, more than {bound:.0e}; the package is "
                "not written. Give examples of the scale the model was trained on, or export it in float64; if that "
                "does not help, please report this with the model"
            )
    return {**figures, "unsolved": unsolved / count}
