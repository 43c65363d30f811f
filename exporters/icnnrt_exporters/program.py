"""torch.export programs of an energy, `.pt2`: what follows TorchScript in torch, and AOTInductor's input.

The derivative is part of the program's graph, so a host needs no autograd for it.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from icnnrt._files import write_atomically
from icnnrt.errors import ExportError
from icnnrt_exporters import parity
from icnnrt_exporters.energy_graph import EnergyGraph, example_batch, trace_energy
from icnnrt_exporters.heads import value_and_gradient
from icnnrt_exporters.onnx_head import quiet
from icnnrt_exporters.preconditions import check_energy, check_examples, check_solver, check_weights, float64_judge
from icnnrt_exporters.torchscript import check_file
from icnnrt_models import BundleEntropyArgmin

ProgramHead = Literal["value"]


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
        solver: the layer of that energy; its y_dim must be that of y_example.
        x_example, y_example: one batch of inputs of the right shape and dtype.
        path: the file to write, by custom `*.pt2`.
        head: "value" is (x, y) -> (f [B], ∇_y f [B, n]).
        overwrite: replace a file that is there.

    Returns:
        The path. `torch.export.load(path)` holds for any batch from 1 on, and its state_dict has the energy's names;
        a weight that the energy has under two names is there under one of them.

    Raises:
        ExportError: what cannot be written; nothing is written then.
    """
    path = Path(path)
    if head not in get_args(ProgramHead):
        raise ExportError(f"head: expected one of {', '.join(get_args(ProgramHead))}, got {head!r}; choose one of them")
    check_examples(x_example, y_example)
    check_solver(solver, y_example.shape[1])
    check_weights(energy, x_example.dtype)
    check_file(path, overwrite)
    modes = [(module, module.training) for module in energy.modules()]
    energy.eval()
    try:
        with quiet():
            judge = float64_judge(energy)
            batches = parity.inputs(x_example, y_example)
            check_energy(energy, judge, *(t[3:7] for t in batches[-1]))
            traced = trace_energy(energy, x_example, y_example)
            B = example_batch(energy, x_example, y_example)
            x, y = (t[:1].detach().expand(B, *t.shape[1:]).contiguous() for t in (x_example, y_example))
            module = _ValueAndGradient(energy, traced, x, y)
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
            _demand_agreement(judge, torch.export.load(buffer).module(), batches)
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
        # Neither is a submodule, so the head adds no names to the weights'.
        self._names = tuple(traced.theta)
        self._head = value_and_gradient(traced, x, y).graph.forward

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        weights = dict(self.named_parameters()) | dict(self.named_buffers())
        f, gradient = self._head(*(weights[name] for name in self._names), x, y)
        return f, gradient


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


def _demand_agreement(judge: nn.Module, program: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
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
