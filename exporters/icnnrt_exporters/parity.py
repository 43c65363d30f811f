"""The check that ends every export: the package, run by ONNX Runtime, against torch in float64.

The figures are errors relative to the scale of the true answer, the worst over all inputs tried:

    error = max |package − torch| / max(1, max |torch|)

float32 packages are compared with the same network in float64, since torch's own float32 is no better a judge.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import icnnrt
from icnnrt import reference
from icnnrt.errors import ExportError
from icnnrt_models import BundleEntropyArgmin

# What an export may differ by. float64 differs by the order of sums alone, which the K steps of a solver can magnify.
# In float32 a cut near a kink of a ReLU can fall on either side, and then one entry of the slope is that of the other
# face: both are right there, so the bounds are looser where slopes enter. Proposition 3 holds the cut points fixed: on
# the nearly parallel cuts of a converged smooth energy it divides by their differences; the exact recursion does not.
TOLERANCE = {
    "float64": {"value": 1e-12, "gradient": 1e-12, "energy": 1e-9, "y": 1e-6, "exact": 1e-7, "prop3": 1e-3}
    | {"hvp": 1e-9, "hessian": 1e-9, "gradient_x": 1e-12},
    "float32": {"value": 1e-5, "gradient": 1e-3, "energy": 1e-3, "y": 2e-2, "exact": 1e-2, "prop3": 1e-2}
    | {"hvp": 1e-2, "hessian": 1e-2, "gradient_x": 1e-3},
}
BATCHES = (1, 3, 16, 129)  # the last because ONNX Runtime takes other kernels for large products


def error(got: NDArray[Any], true: NDArray[Any]) -> float:
    """max |got − true| / max(1, max |true|); infinite where one is finite and the other not."""
    if got.shape != true.shape:
        return float("inf")
    if got.size == 0:
        return 0.0
    if not np.array_equal(np.isfinite(got), np.isfinite(true)):
        return float("inf")
    got, true = np.nan_to_num(got.astype(np.float64)), np.nan_to_num(true.astype(np.float64))
    return float(np.abs(got - true).max() / max(1.0, np.abs(true).max()))


def inputs(x_example: Tensor, y_example: Tensor, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of 1, 3, 16 and 129: the example, random contexts of its scale, zeros; y inside and on the edges."""
    generator = torch.Generator().manual_seed(seed)
    scale = x_example.double().std(unbiased=False).item() if x_example.numel() else 1.0
    batches = []
    for B in BATCHES:
        x = torch.randn(B, *x_example.shape[1:], generator=generator, dtype=torch.float64) * (scale or 1.0)
        x[0] = x_example[0]
        if B > 2:
            x[1] = 0.0
        y = torch.rand(B, *y_example.shape[1:], generator=generator, dtype=torch.float64)
        if B > 2:
            y[1], y[2] = 0.0, 1.0
        batches.append((x.to(x_example.dtype), y.to(y_example.dtype)))
    return batches


def check(
    session: icnnrt.Session, judge: nn.Module, solver: BundleEntropyArgmin | None, x_example: Tensor, y_example: Tensor
) -> dict[str, float]:
    """Compare one loaded package with the float64 copy of the module it was made from; return the figures.

    Raises ExportError naming the figure that is out of bounds.
    """
    figures: dict[str, float] = {}
    for x, y in inputs(x_example, y_example):
        _check_heads(session, judge, x, y, figures)
    facts = _check_argmin(session, judge, solver, x_example, y_example, figures) if solver else {}
    for name, figure in figures.items():
        bound = TOLERANCE[session.manifest.dtype][name]
        if not figure <= bound:
            raise ExportError(
                f"parity: {name} differs from torch in float64 by {figure:.1e}, more than {bound:.0e}; "
                "the package is not written. Give examples of the scale the model was trained on, or export it in "
                "float64; if that does not help, please report this with the model"
            )
    return figures | facts


def _worst(figures: dict[str, float], name: str, got: NDArray[Any], true: Tensor) -> None:
    figures[name] = max(figures.get(name, 0.0), error(got, true.detach().numpy()))


def _check_heads(session: icnnrt.Session, judge: nn.Module, x: Tensor, y: Tensor, figures: dict[str, float]) -> None:
    """Value, gradient and the optional heads."""
    manifest = session.manifest
    X, Y = x.double(), y.double()
    context = X.clone().requires_grad_()

    def slope(y: Tensor, x: Tensor = X) -> tuple[Tensor | None, Tensor]:
        if manifest.kind == "gradient":
            return None, judge(x, y)
        f = judge(x, y)
        (g,) = torch.autograd.grad(f.sum(), y, create_graph=True, materialize_grads=True)
        return f, g

    leaf = Y.clone().requires_grad_()
    f, g = slope(leaf, context)
    if f is None:
        _worst(figures, "gradient", session.gradient(x.numpy(), y.numpy()), g)
    else:
        value, gradient = session.value_and_gradient(x.numpy(), y.numpy())
        _worst(figures, "value", value, f)
        _worst(figures, "gradient", gradient, g)
    if "gradient_x" in manifest.graphs and f is not None:
        (true,) = torch.autograd.grad(f.sum(), context, retain_graph=True, materialize_grads=True)
        _worst(figures, "gradient_x", session.gradient_x(x.numpy(), y.numpy()), true)
    if not {"hvp", "hessian"} & manifest.graphs.keys():
        return
    # Row i of sample b is ∂g_bi/∂y_b: samples do not meet, so each column of the batch is one backward pass.
    rows = [torch.zeros_like(leaf)] * Y.shape[1]
    if g.requires_grad:
        rows = [
            torch.autograd.grad(g[:, i].sum(), leaf, retain_graph=True, materialize_grads=True)[0]
            for i in range(Y.shape[1])
        ]
    H = torch.stack(rows, dim=1)
    if "hvp" in manifest.graphs:
        v = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
        product = torch.einsum("bij,bj->bi", H, v.double())
        _worst(figures, "hvp", session.hvp(x.numpy(), y.numpy(), v.numpy()), product)
    if "hessian" in manifest.graphs:
        _worst(figures, "hessian", session.hessian(x.numpy(), y.numpy()), H)


def _check_argmin(
    session: icnnrt.Session,
    judge: nn.Module,
    solver: BundleEntropyArgmin,
    x_example: Tensor,
    y_example: Tensor,
    figures: dict[str, float],
) -> dict[str, float]:
    """y* and its adjoints; returns what there is to say besides."""
    layer = BundleEntropyArgmin(judge, iterations=solver.iterations, steps=solver.steps, y_dim=y_example.shape[1])
    gaps: list[float] = []
    not_convex = 0
    trainable = [name for name, spec in session.manifest.weights.tensors.items() if spec.trainable]
    for x, _ in inputs(x_example, y_example):
        X = x.double()
        solution = session.argmin(x.numpy())
        true = layer.solve(X)
        _worst(figures, "y", solution.y, true.y)
        _worst(figures, "energy", solution.energy, true.energy)
        gaps += [float(g) for g in solution.gap]
        not_convex += int((solution.status == icnnrt.Status.NOT_CONVEX).sum())

        # Where a cut stands on a kink to the last bit, torch may meet the other face: no figure of the package's.
        solution = solution[~solution.unsafe(every_model=True)]
        met = _slopes(judge, solution)
        apart = np.abs(met - solution.slopes).max((1, 2)) / np.maximum(1.0, np.abs(met).max((1, 2)))
        solution = solution[apart <= np.sqrt(np.finfo(solution.slopes.dtype).eps)]
        if len(solution) == 0:
            continue
        y_bar = np.cos(np.arange(solution.y.size, dtype=np.float64)).reshape(solution.y.shape).astype(solution.y.dtype)
        for adjoint, depth in (("exact", layer.iterations), ("prop3", 1)):
            cotangents = session.vjp(solution, y_bar, adjoint=adjoint)
            theta_bar, x_bar = true_adjoint(judge, trainable, solution, y_bar.astype(np.float64), depth)
            _worst(figures, adjoint, cotangents.x, x_bar)
            for name, bar in zip(trainable, theta_bar, strict=True):
                _worst(figures, adjoint, cotangents.weights[name], bar)
    return {
        "not_convex": float(not_convex),
        "gap_median": float(np.median(gaps)),
        "gap_max": float(np.max(gaps)),
    }


def _slopes(judge: nn.Module, solution: icnnrt.Solution) -> NDArray[np.float64]:
    """∇_y f at every cut point, [B, K, n], by torch in float64."""
    B, K, n = solution.cut_points.shape
    y = torch.from_numpy(solution.cut_points.reshape(B * K, n)).double().requires_grad_()
    x = torch.from_numpy(np.repeat(solution.x, K, axis=0)).double()
    (g,) = torch.autograd.grad(judge(x, y).sum(), y, materialize_grads=True)
    return g.reshape(B, K, n).numpy()


def true_adjoint(
    judge: nn.Module,
    trainable: Sequence[str],
    solution: icnnrt.Solution,
    y_bar: NDArray[np.float64],
    depth: int,
) -> tuple[list[Tensor], Tensor]:
    """θ̄ and x̄ of the solution's own cuts: the numpy reference's recursion, torch's autograd, all in float64.

    From the same cuts, so that a figure tells of the adjoint graph alone and not of what the solver magnified.
    """
    x = torch.from_numpy(np.array(solution.x)).double().requires_grad_()
    B, K, n = solution.cut_points.shape

    def slope(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        f = judge(x, y)
        (g,) = torch.autograd.grad(f.sum(), y, create_graph=True, materialize_grads=True)
        return f, g

    def hvp(y: NDArray[np.float64], s: NDArray[np.float64]) -> NDArray[np.float64]:
        leaf = torch.from_numpy(y).requires_grad_()
        g = slope(leaf, x)[1]
        if not g.requires_grad:
            return np.zeros_like(s)
        (product,) = torch.autograd.grad(g, leaf, torch.from_numpy(s), materialize_grads=True)
        return product.numpy()

    trajectory = reference.Trajectory(
        *(getattr(solution, field).astype(np.float64) for field in reference.Trajectory._fields)
    )
    cuts = reference.argmin_adjoint(trajectory, y_bar, hvp, depth)
    points = torch.from_numpy(trajectory.cut_points.reshape(B * K, n)).requires_grad_()
    f, g = slope(points, x.repeat_interleave(K, 0))
    pushed = (torch.from_numpy(cuts.offset_bar.reshape(-1)) * f).sum()
    pushed = pushed + (torch.from_numpy(cuts.seed.reshape(B * K, n)) * g).sum()
    parameters = dict(judge.named_parameters(remove_duplicate=False))
    *theta_bar, x_bar = torch.autograd.grad(
        pushed, [*(parameters[name] for name in trainable), x], materialize_grads=True
    )
    return theta_bar, x_bar
