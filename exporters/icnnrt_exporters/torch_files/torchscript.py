"""One TorchScript file: the energy with its argmin and the exact adjoint, for hosts that have libtorch alone.

The energy is traced, the solver around it compiled, so the file needs none of the modules it was made from: C++ loads
it with torch::jit::load, Python with torch.jit.load. torch has announced the end of TorchScript and runs it all the
same; `export_program` writes what follows it.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import icnnrt
from icnnrt import arguments
from icnnrt.errors import ExportError
from icnnrt.format.files import write_atomically
from icnnrt.format.folder import check_place
from icnnrt.serving.load import AnySession
from icnnrt_exporters.checks import parity
from icnnrt_exporters.checks.by_torch import value_and_slope
from icnnrt_exporters.checks.preconditions import (
    check_energy,
    check_examples,
    check_solver,
    check_weights,
    float64_judge,
)
from icnnrt_exporters.graphs.onnx_head import quiet
from icnnrt_exporters.torch_files.script_solver import CONTEXT, VALUE, WEIGHTS, ScriptSolver
from icnnrt_exporters.tracing.energy_graph import example_batch
from icnnrt_exporters.tracing.eval_mode import in_eval_mode
from icnnrt_exporters.tracing.place import first_line
from icnnrt_models import BregmanProximalGradient, BundleEntropyArgmin

# A trace holds the same operators as the module, so it differs by rounding or not at all.
TRACED = {torch.float64: 1e-12, torch.float32: 1e-5}


def export_torchscript(
    energy: nn.Module,
    solver: BundleEntropyArgmin,
    x_example: Tensor,
    y_example: Tensor,
    path: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write f(x, y; θ), ∇_y f, the K-step argmin and its exact adjoint as one TorchScript file.

    Args:
        energy: a module with forward(x [B, ...], y [B, n]) -> [B], convex in y, float32 or float64; written in eval
            mode. If it has `context` and `value` (`ContextEnergy`), the file computes its x path once for an argmin.
        solver: the layer whose iterations and steps the file takes over.
        x_example, y_example: one batch of inputs of the right shape and dtype.
        path: the file to write, by custom `*.pt`.
        overwrite: replace a file that is there.

    Returns:
        The path. `torch.jit.load(path)` has the methods of `ScriptSolver`: forward, value, gradient, argmin, vjp. Its
        weights are `energy.<name>`, name as in the state_dict, and may be updated in place.

    Raises:
        ExportError: what cannot be written; nothing is written then.
    """
    path = arguments.path(path, "path")
    check_request(energy, solver, x_example, y_example, path, overwrite)
    with in_eval_mode(energy), quiet():
        rows = parity.inputs(x_example, y_example)
        check_energy(energy, float64_judge(energy), *(t[3:7] for t in rows[-1]))
        buffer = io.BytesIO()
        _save(energy, solver, x_example, y_example, buffer)
        # What is compared is what a host will load.
        buffer.seek(0)
        _demand_agreement(energy, torch.jit.load(buffer), rows)
    write_atomically(path, buffer.getvalue())
    return path


def load_torchscript(path: str | Path) -> Any:
    """torch.jit.load without torch's announcement that TorchScript ends."""
    with quiet():
        return torch.jit.load(str(path))


def check_torchscript(path: str | Path, judge: AnySession | nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Compare a TorchScript file with a package, or with the energy it was made from.

    Args:
        path: the file.
        judge: a session of the package exported from the same energy and solver, or the energy itself; an energy is
            judged in float64, whatever the file computes in.
        x, y: one batch, in the dtype of the file.

    Returns:
        Errors relative to the scale of the answer, max |file − judge| / max(1, max |judge|), of value, gradient, y,
        energy, and of "exact", the gradients of Σ ȳ·y by x and by every weight that both sides give. "exact" tells of
        the samples a gradient should be taken at and is absent if there is none. `parity.TOLERANCE` says what to
        expect of each; in float32 a cut at a kink of a ReLU may be that of the other face, and both are right.
    """
    loaded = load_torchscript(path)
    n = y.shape[1]
    y_bar = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
    mine = loaded.argmin(x)
    keep: NDArray[np.bool_]
    if isinstance(judge, icnnrt.Session):
        f, g = judge.value_and_gradient(x.numpy(), y.numpy())
        solution = judge.argmin(x.numpy())
        true_y, true_energy = solution.y, solution.energy
        keep = ~solution.unsafe(every_model=True)
        if keep.any():  # at a kink the two may meet different faces, and both are right
            keep[keep] = ~judge.vjp(solution[keep], y_bar.numpy()[keep]).at_kink
        bars = judge.vjp(solution[keep], y_bar.numpy()[keep]) if keep.any() else None
        true_bars = None if bars is None else {**bars.weights, "x": bars.x}
    else:
        double = float64_judge(judge)
        layer = BundleEntropyArgmin(double, loaded.iterations, loaded.steps, y_dim=n)
        X = x.double().requires_grad_()
        f, g = (t.numpy() for t in value_and_slope(double, x.double(), y.double()))
        result = layer.solve(X)
        true_y, true_energy = result.y.numpy(), result.energy.numpy()
        keep = np.asarray(np.isfinite(true_y).all(1))
        wanted = {"x": X, **{name: p for name, p in double.named_parameters() if p.requires_grad}}
        true_bars = None
        if keep.any():
            rows = torch.from_numpy(keep)
            total = (layer(X[rows]) * y_bar[rows]).sum()
            found = torch.autograd.grad(total, list(wanted.values()), materialize_grads=True)
            true_bars = {name: bar.numpy() for name, bar in zip(wanted, found, strict=True)}
            true_bars["x"] = true_bars["x"][keep]
    figures = {
        "value": parity.error(_numpy(loaded.value(x, y)), f),
        "gradient": parity.error(_numpy(loaded.gradient(x, y)), g),
        "y": parity.error(_numpy(mine.y), true_y),
        "energy": parity.error(_numpy(mine.energy), true_energy),
    }
    if true_bars is not None:
        rows = torch.from_numpy(keep)
        theta_bar, x_bar = loaded.vjp(x[rows], y_bar[rows])
        bars_here = {**theta_bar, "x": x_bar}
        figures["exact"] = max(
            parity.error(_numpy(bar), true_bars[name]) for name, bar in bars_here.items() if name in true_bars
        )
    return figures


def check_request(
    energy: nn.Module, solver: BundleEntropyArgmin, x_example: Tensor, y_example: Tensor, path: Path, overwrite: bool
) -> None:
    """What was asked for can be written, and to `path`: of the bundle method over the unit box alone, which is that of
    a solver without a domain."""
    check_examples(x_example, y_example)
    check_solver(solver, y_example.shape[1])
    if isinstance(solver, BregmanProximalGradient):
        raise ExportError(
            "solver: this export writes the bundle method alone, but got a BregmanProximalGradient; export a package "
            "for it"
        )
    domain = getattr(solver, "domain", "unit_box")
    if domain != "unit_box":
        raise ExportError(
            f"solver: its domain is {domain!r}, but this export writes 'unit_box' alone; export a package for it"
        )
    check_weights(energy, x_example.dtype)
    check_place(path, "path", kind=ExportError)
    if path.is_dir():
        raise ExportError(f"path: {path} is a folder; give the name of a file, such as {path / 'model.pt'}")
    if path.exists() and not overwrite:
        raise ExportError(f"path: {path} is there already; pass overwrite=True to replace it, or choose another")


def _save(
    energy: nn.Module, solver: BundleEntropyArgmin, x_example: Tensor, y_example: Tensor, buffer: io.BytesIO
) -> None:
    """Trace the energy, compile the solver around it, and write both."""
    try:
        traced = _trace(energy, x_example, y_example)
        torch.jit.save(torch.jit.script(ScriptSolver(traced, solver.y_dim, solver.iterations, solver.steps)), buffer)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"energy: torch.jit cannot write its forward ({first_line(error)}); build the energy from plain tensor "
            "operations, or export a package, which takes more"
        ) from error


def _trace(energy: nn.Module, x_example: Tensor, y_example: Tensor) -> Any:
    """The energy as a traced module with the three methods that `ScriptSolver` calls."""
    for name in (CONTEXT, VALUE, WEIGHTS):
        if hasattr(energy, name):
            raise ExportError(f"energy: it has an attribute {name!r}, which this export adds; rename it")
    B = example_batch(energy, x_example, y_example)
    x, y = (t[:1].detach().expand(B, *t.shape[1:]).clone() for t in (x_example, y_example))
    arguments: dict[str, Any] = {"forward": (x, y)}
    parts = 0
    if callable(getattr(energy, "context", None)) and callable(getattr(energy, "value", None)):
        with torch.no_grad():
            context = tuple(energy.context(x))  # type: ignore[operator]
        parts = len(context)
        arguments.update(context=(x,), value=(context, y))
    traced = torch.jit.trace_module(energy, arguments, check_trace=False)
    names = [name for name, _ in traced.named_parameters()]
    traced.define(_methods(names, parts))
    return traced


def _methods(names: list[str], parts: int) -> str:
    """TorchScript source of the methods added to a traced energy; its context is a tuple of `parts`, or x itself."""
    weights = ", ".join(f'"{name}": {_attribute(name)}' for name in names)
    listed = ", ".join(f"c[{i}]" for i in range(parts))
    return "\n".join(
        (
            f"def {CONTEXT}(self, x: Tensor) -> List[Tensor]:",
            *(["    c = self.context(x)", f"    return [{listed}]"] if parts else ["    return [x]"]),
            f"def {VALUE}(self, c: List[Tensor], y: Tensor) -> Tensor:",
            f"    return self.value(({listed},), y)" if parts else "    return self.forward(c[0], y)",
            f"def {WEIGHTS}(self) -> Dict[str, Tensor]:",
            "    found: Dict[str, Tensor] = {" + weights + "}",
            "    return found",
            "",
        )
    )


def _attribute(name: str) -> str:
    """a.0.b as TorchScript can read it, where 0 is no identifier."""
    expression = "self"
    for part in name.split("."):
        expression = f'getattr({expression}, "{part}")'
    return expression


def _demand_agreement(energy: nn.Module, loaded: Any, batches: list[tuple[Tensor, Tensor]]) -> None:
    """The loaded file has the energy's value and gradient on batches of every size, not that of the trace alone."""
    for x, y in batches:
        leaf = y.clone().requires_grad_()
        f = energy(x, leaf)
        if not f.requires_grad:
            raise ExportError(
                "energy: autograd does not follow its output; take detach(), no_grad() and numpy out of the forward"
            )
        (g,) = torch.autograd.grad(f.sum(), leaf, materialize_grads=True)
        try:
            with torch.no_grad():
                found = loaded.value(x, y), loaded.gradient(x, y)
            shapes_hold = all(got.shape == true.shape for got, true in zip(found, (f, g), strict=True))
        except Exception:
            shapes_hold = False
        if not shapes_hold:
            raise ExportError(
                f"energy: its trace does not hold for a batch of {len(x)}, since the forward makes a plain number of "
                "a size, or a constant of a value; use x.shape[0] as it is, inside tensor operations, or -1"
            )
        for got, true in zip(found, (f, g), strict=True):
            apart = parity.error(_numpy(got), _numpy(true))
            if not apart <= TRACED[x.dtype]:
                raise ExportError(
                    f"energy: its trace differs from the module by {apart:.1e} on a batch of {len(x)}; take branches "
                    "on values or on the batch size out of the forward, a trace records one side of them"
                )


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
