"""torch.export programs of an energy, `.pt2`: what follows TorchScript in torch, and AOTInductor's input.

The derivative is part of the program's graph, so a host needs no autograd for it.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop_op

from icnnrt import arguments
from icnnrt.errors import ExportError
from icnnrt.format.files import write_atomically
from icnnrt.mathematics import bundle, cut_model
from icnnrt.mathematics.cut_model import InnerSolution, inner_solution
from icnnrt.mathematics.domains import UNIT_BOX
from icnnrt_exporters.checks import parity
from icnnrt_exporters.checks.by_torch import value_and_slope
from icnnrt_exporters.checks.preconditions import check_energy, float64_judge
from icnnrt_exporters.graphs.onnx_head import quiet
from icnnrt_exporters.torch_files.torchscript import check_request
from icnnrt_exporters.tracing.energy_graph import EnergyGraph, example_batch, trace_energy
from icnnrt_exporters.tracing.eval_mode import in_eval_mode
from icnnrt_exporters.tracing.heads import context, value_and_gradient, value_and_gradient_at
from icnnrt_exporters.tracing.place import first_line
from icnnrt_exporters.tracing.smooth_softplus import smoothed
from icnnrt_exporters.writing import dtype_name
from icnnrt_models import BundleEntropyArgmin
from icnnrt_models.layers.bundle_entropy import in_double, rounded
from icnnrt_models.layers.namespace import TORCH

ProgramHead = Literal["value", "argmin"]
# What a program returns.
ANSWERS: Final[Mapping[str, tuple[str, ...]]] = {
    "value": ("value", "gradient"),
    "argmin": ("y", "lam", "energy", "lower_bound", "gap", "residual"),
}


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
    arguments.choice(head, "head", get_args(ProgramHead), kind=ExportError)
    check_request(energy, solver, x_example, y_example, path, overwrite)
    with in_eval_mode(energy), quiet():
        judge = smoothed(float64_judge(energy))
        batches = parity.inputs(x_example, y_example)
        check_energy(energy, judge, *(t[3:7] for t in batches[-1]))
        traced = trace_energy(energy, x_example, y_example)
        B = example_batch(energy, x_example, y_example)
        x, y = (t[:1].detach().expand(B, *t.shape[1:]).contiguous() for t in (x_example, y_example))
        module = _ValueAndGradient(energy, traced, x, y) if head == "value" else _Argmin(energy, solver, traced, x, y)
        dim = torch.export.Dim("batch")
        buffer = io.BytesIO()
        try:
            program = torch.export.export(module, (x, y), dynamic_shapes=({0: dim}, {0: dim}), strict=False)
            torch.export.save(program, buffer)
        except Exception as error:
            raise ExportError(
                f"energy: torch.export cannot write its derivative ({first_line(error)}); export a package or "
                "TorchScript"
            ) from error
        # What is compared is what a host will load.
        buffer.seek(0)
        _demand(head, torch.export.load(buffer).module(), judge, solver, batches)
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
        self._prepare = context(traced, x).graph.forward if traced.boundary else None
        self._at = value_and_gradient_at(traced, x, y).graph.forward

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


def _demand(
    head: ProgramHead,
    program: nn.Module,
    judge: nn.Module,
    solver: BundleEntropyArgmin,
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    """The loaded program has the energy's value and gradient, or the layer's answers, on batches of every size."""
    layer = BundleEntropyArgmin(judge, solver.iterations, solver.steps, y_dim=solver.y_dim)
    for x, y in batches:
        X, Y = x.double(), y.double()
        with torch.no_grad():
            found = dict(zip(ANSWERS[head], program(x, y), strict=True))
        if head == "value":
            true = dict(zip(ANSWERS[head], value_and_slope(judge, X, Y), strict=True))
        else:
            solved = layer.solve(X, Y)
            true = {"y": solved.y, "energy": solved.energy}
        for name, expected in true.items():
            apart, bound = parity.error(found[name].numpy(), expected.numpy()), parity.TOLERANCE[dtype_name(x)][name]
            if not apart <= bound:
                raise ExportError(
                    f"parity: {name} of the program differs from the {'energy' if head == 'value' else 'layer'} in "
                    f"float64 by {apart:.1e} on a batch of {len(x)}, more than {bound:.0e}; the program is not "
                    "written. Export it in float64; if that does not help, please report this with the model"
                )
