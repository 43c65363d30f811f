"""torch.export programs of an energy, `.pt2`: what follows TorchScript in torch, and AOTInductor's input.

The derivative is part of the program's graph, so a host needs no autograd for it.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop_op
from torch.func import grad

from icnnrt import arguments
from icnnrt.errors import ExportError
from icnnrt.format.files import write_atomically
from icnnrt.mathematics import bundle, cut_model
from icnnrt.mathematics.cut_model import InnerSolution, inner_solution
from icnnrt.mathematics.domains import UNIT_BOX
from icnnrt_exporters.checks import parity
from icnnrt_exporters.checks.preconditions import (
    check_energy,
    check_examples,
    check_solver,
    check_weights,
    float64_judge,
)
from icnnrt_exporters.graphs.onnx_head import quiet
from icnnrt_exporters.torch_files.torchscript import check_file, check_unit_box
from icnnrt_exporters.tracing.energy_graph import EnergyGraph, example_batch, trace_energy
from icnnrt_exporters.tracing.heads import Input, boundary_names, trace, value_and_gradient
from icnnrt_exporters.tracing.smooth_softplus import smoothed
from icnnrt_models import BundleEntropyArgmin
from icnnrt_models.layers.bundle_entropy import in_double, rounded
from icnnrt_models.layers.namespace import TORCH

ProgramHead = Literal["value", "argmin"]


def export_program(
    energy: nn.Module,
    solver: BundleEntropyArgmin,
    x_example: Tensor,
    y_example: Tensor,
    path: str | Path,
    *,
    head: ProgramHead = "value",
    overwrite: bool = False,
) -> Path:
    """Write one graph of f(x, y; θ) as a torch.export program.

    Args:
        energy: a module with forward(x [B, ...], y [B, n]) -> [B], convex in y, float32 or float64; written in eval
            mode.
        solver: the layer whose iterations and steps "argmin" takes over.
        x_example, y_example: one batch of inputs of the right shape and dtype.
        path: the file to write, by custom `*.pt2`.
        head: "value" is (x, y) -> (f [B], ∇_y f [B, n]); "argmin" is (x, y_init) -> (y, lam, energy, lower_bound, gap,
            residual), the first six fields of `script_solver.Solution`, y_init [B, n] in [0, 1], ½ by custom. Its
            solver is a while_loop for each cut, so writing it takes some seconds a cut.
        overwrite: replace a file that is there.

    Returns:
        The path. `torch.export.load(path)` holds for any batch from 1 on, and its state_dict has the energy's names;
        a weight that the energy has under two names is there under one of them.

    Raises:
        ExportError: what cannot be written; nothing is written then.
    """
    path = arguments.path(path, "path")
    if head not in get_args(ProgramHead):
        raise ExportError(f"head: expected one of {', '.join(get_args(ProgramHead))}, got {head!r}; choose one of them")
    check_examples(x_example, y_example)
    check_solver(solver, y_example.shape[1])
    check_unit_box(solver)
    check_weights(energy, x_example.dtype)
    check_file(path, overwrite)
    modes = [(module, module.training) for module in energy.modules()]
    energy.eval()
    try:
        with quiet(), quiet_serialiser():
            judge = smoothed(float64_judge(energy))
            batches = parity.inputs(x_example, y_example)
            check_energy(energy, judge, *(t[3:7] for t in batches[-1]))
            traced = trace_energy(energy, x_example, y_example)
            B = example_batch(energy, x_example, y_example)
            x, y = (t[:1].detach().expand(B, *t.shape[1:]).contiguous() for t in (x_example, y_example))
            module = (
                _ValueAndGradient(energy, traced, x, y) if head == "value" else _Argmin(energy, solver, traced, x, y)
            )
            dim = torch.export.Dim("batch")
            buffer = io.BytesIO()
            try:
                program = torch.export.export(module, (x, y), dynamic_shapes=({0: dim}, {0: dim}), strict=False)
                torch.export.save(program, buffer)
            except Exception as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = lines[0][:240].rstrip(".") if lines else type(error).__name__
                raise ExportError(
                    f"energy: torch.export cannot write its derivative ({reason}); export a package or TorchScript"
                ) from error
            # What is compared is what a host will load.
            buffer.seek(0)
            loaded = torch.export.load(buffer).module()
            if head == "value":
                _demand_value(judge, loaded, batches)
            else:
                _demand_argmin(judge, solver, loaded, batches)
    finally:
        for part, training in modes:
            part.training = training
    write_atomically(path, buffer.getvalue())
    return path


class _ValueAndGradient(nn.Module):
    """(x, y) -> (f, ∇_y f): a traced head with the weights it takes, each under its name in the energy."""

    def __init__(self, energy: nn.Module, traced: EnergyGraph, x: Tensor, y: Tensor) -> None:
        super().__init__()
        _plant(self, energy, traced.theta)
        # Not a submodule, so the head adds no names to the weights'.
        self._names = tuple(traced.theta)
        self._head = value_and_gradient(traced, x, y).graph.forward

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        f, gradient = self._head(*_planted(self, self._names), x, y)
        return f, gradient


class _Argmin(nn.Module):
    """(x, y_init) -> the K-step argmin and its certificate."""

    def __init__(
        self, energy: nn.Module, solver: BundleEntropyArgmin, traced: EnergyGraph, x: Tensor, y: Tensor
    ) -> None:
        super().__init__()
        _plant(self, energy, traced.theta)
        self._names = tuple(traced.theta)
        self._iterations, self._steps = solver.iterations, solver.steps
        names, crossing = list(traced.theta), boundary_names(traced)
        theta = [Input(name, tensor, None) for name, tensor in traced.theta.items()]
        c_example = traced.prepare(traced.theta, x)

        def prepare(*args: Tensor) -> tuple[Tensor, ...]:
            return tuple(traced.prepare(dict(zip(names, args, strict=False)), args[-1]))

        def at(*args: Tensor) -> tuple[Tensor, Tensor]:
            theta = dict(zip(names, args, strict=False))
            *c, y = args[len(names) :]

            def total(y: Tensor) -> tuple[Tensor, Tensor]:
                f = traced.value(theta, c, y)
                return f.sum(), f

            gradient, f = grad(total, has_aux=True)(y)
            return f, gradient

        boundary = [Input(n, e, b.batch_dim) for n, e, b in zip(crossing, c_example, traced.boundary, strict=True)]
        self._prepare = trace(prepare, [*theta, Input("x", x, 0)], crossing).graph.forward if crossing else None
        self._at = trace(at, [*theta, *boundary, Input("y", y, 0)], ["f", "gradient"]).graph.forward

    def forward(self, x: Tensor, y_init: Tensor) -> tuple[Tensor, ...]:
        weights = _planted(self, self._names)
        c = self._prepare(*weights, x) if self._prepare is not None else ()

        def value_and_gradient(y: Tensor) -> tuple[Tensor, Tensor]:
            f, g = self._at(*weights, *c, y)
            return f, g

        def solve(G: Tensor, e: Tensor, lam: Tensor) -> InnerSolution:
            return rounded(self._solve(G, e, lam.double()), y_init)

        found = bundle.argmin(TORCH, UNIT_BOX, in_double(value_and_gradient), y_init, self._iterations, solve)
        return found.y, found.lam, found.energy, found.lower_bound, found.gap, found.residual

    def _solve(self, G: Tensor, e: Tensor, lam_start: Tensor) -> InnerSolution:
        """The k-cut model: steps of `icnnrt.mathematics.cut_model` under a while_loop."""
        row = e[:, None]
        cuts = cut_model.prepared(TORCH, UNIT_BOX, G, row)
        first = cut_model.first(TORCH, UNIT_BOX, cuts, lam_start[:, None])
        steps = self._steps

        def split(rest: Sequence[Tensor]) -> tuple[cut_model.Cuts, cut_model.Iterate]:
            return cut_model.Cuts(*rest[len(first) :]), cut_model.Iterate(*rest[: len(first)])

        def unfinished(i: Tensor, *rest: Tensor) -> Tensor:
            left: Tensor = cut_model.unfinished(TORCH, *split(rest))
            return (i < steps) & left

        def step(i: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return (i + 1, *map(_dense, cut_model.step(TORCH, UNIT_BOX, *split(rest))))

        start = (torch.zeros((), dtype=torch.int64), *map(_dense, first))
        # The operator itself: torch.while_loop would have dynamo trace the bodies, which may not take tensors along.
        loop: Any = while_loop_op
        last = cut_model.Iterate(*loop(unfinished, step, start, tuple(map(_dense, cuts)))[1:])
        return inner_solution(TORCH, cut_model.certified(TORCH, UNIT_BOX, G, row, last.best_lam))


@contextlib.contextmanager
def quiet_serialiser() -> Iterator[None]:
    """Silence what torch's serialiser says of the symbols inside a while_loop."""
    logger = logging.getLogger("torch._export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _dense(t: Tensor) -> Tensor:
    """A copy in row-major order: what a loop carries must not alias, nor change its strides."""
    return t.clone(memory_format=torch.contiguous_format)


def _planted(root: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The tensors of `_plant`, in the order of the names."""
    tensors = dict(root.named_parameters()) | dict(root.named_buffers())
    return [tensors[name] for name in names]


def _plant(root: nn.Module, energy: nn.Module, theta: Mapping[str, Tensor]) -> None:
    """Give `root` what the graph reads, and the rest of the energy's state_dict, in submodules that bear the names."""
    state = energy.state_dict()
    read = {tensor.data_ptr() for tensor in theta.values()}
    tensors = {**theta, **{n: t for n, t in state.items() if n not in theta and t.data_ptr() not in read}}
    learnable = {n: p.requires_grad for n, p in energy.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors.items():
        *folders, leaf = name.split(".")
        owner = root
        for folder in folders:
            if folder not in owner._modules:
                owner.add_module(folder, nn.Module())
            owner = owner.get_submodule(folder)
        value = tensor.detach().clone()
        if name in learnable:
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=learnable[name]))
        else:
            owner.register_buffer(leaf, value, persistent=name in state)


def _demand_value(judge: nn.Module, program: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """The loaded program has the energy's value and gradient on batches of every size."""
    for x, y in batches:
        leaf = y.double().requires_grad_()
        f = judge(x.double(), leaf)
        (g,) = torch.autograd.grad(f.sum(), leaf, materialize_grads=True)
        bounds = parity.TOLERANCE[str(x.dtype).removeprefix("torch.")]
        with torch.no_grad():
            found = program(x, y)
        for name, got, true in zip(("value", "gradient"), found, (f, g), strict=True):
            apart = parity.error(got.numpy(), true.detach().numpy())
            if not apart <= bounds[name]:
                raise ExportError(
                    f"parity: {name} of the program differs from the energy in float64 by {apart:.1e} on a batch of "
                    f"{len(x)}, more than {bounds[name]:.0e}; the program is not written. Export it in float64; if "
                    "that does not help, please report this with the model"
                )


def _demand_argmin(
    judge: nn.Module, solver: BundleEntropyArgmin, program: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> None:
    """The loaded program has the layer's answers on batches of every size."""
    layer = BundleEntropyArgmin(judge, solver.iterations, solver.steps, y_dim=solver.y_dim)
    for x, y in batches:
        true = layer.solve(x.double(), y.double())
        bounds = parity.TOLERANCE[str(x.dtype).removeprefix("torch.")]
        with torch.no_grad():
            found = program(x, y)
        for name, got, expected in (("y", found[0], true.y), ("energy", found[2], true.energy)):
            apart = parity.error(got.numpy(), expected.numpy())
            if not apart <= bounds[name]:
                raise ExportError(
                    f"parity: {name} of the program differs from the layer in float64 by {apart:.1e} on a batch of "
                    f"{len(x)}, more than {bounds[name]:.0e}; the program is not written. Export it in float64; if "
                    "that does not help, please report this with the model"
                )
