"""The check that ends every export: the package, run by ONNX Runtime, against torch in float64.

The figures are errors relative to the scale of the true answer, the worst over all inputs tried:

    error = max |package − torch| / max(1, max |torch|)

float32 packages are compared with the same network in float64, since torch's own float32 is no better a judge.
"""

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import icnnrt
from icnnrt.errors import ExportError
from icnnrt_models import BundleEntropyArgmin

# What an export may differ by. float64 differs by the order of sums alone. In float32 a cut near a kink of a ReLU can
# fall on either side, and then one gradient entry is that of the other face: both are right answers there, so slopes,
# solutions and adjoints get a looser bound than values.
TOLERANCE = {
    "float64": {"value": 1e-12, "gradient": 1e-12, "energy": 1e-9, "y": 1e-7, "exact": 1e-5, "prop3": 1e-5},
    "float32": {"value": 1e-5, "gradient": 1e-3, "energy": 1e-3, "y": 1e-1, "exact": 1.0, "prop3": 1.0},
}
BATCHES = (1, 3, 16)


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
    """Batches of 1, 3 and 16: the example itself, random contexts of its scale, zeros; y inside and on the edges."""
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
    session: icnnrt.Session, energy: nn.Module, solver: BundleEntropyArgmin, x_example: Tensor, y_example: Tensor
) -> dict[str, Any]:
    """Compare one loaded package with the module it was made from; return the figures.

    Raises ExportError naming the figure that is out of bounds.
    """
    judge = copy.deepcopy(energy).double().eval()
    layer = BundleEntropyArgmin(
        judge, iterations=solver.iterations, steps=solver.steps, adjoint="exact", y_dim=y_example.shape[1]
    )
    figures = dict.fromkeys(TOLERANCE[session.manifest.dtype], 0.0)
    gaps: list[float] = []
    trainable = [name for name, spec in session.manifest.weights.tensors.items() if spec.trainable]
    parameters = dict(judge.named_parameters())

    def worst(name: str, got: NDArray[Any], true: Tensor) -> None:
        figures[name] = max(figures[name], error(got, true.detach().numpy()))

    for x, y in inputs(x_example, y_example):
        X, Y = x.double(), y.double().requires_grad_()
        f, gradient = session.value_and_gradient(x.numpy(), y.numpy())
        F = judge(X, Y)
        worst("value", f, F)
        (G,) = torch.autograd.grad(F.sum(), Y, allow_unused=True)
        worst("gradient", gradient, torch.zeros_like(Y) if G is None else G)

        solution = session.argmin(x.numpy())
        true = layer.solve(X)
        worst("y", solution.y, true.y)
        worst("energy", solution.energy, true.energy)
        gaps += [float(g) for g in solution.gap]

        y_bar = torch.cos(torch.arange(Y.numel(), dtype=torch.float64)).reshape(Y.shape)
        for adjoint in ("exact", "prop3"):
            layer.adjoint = adjoint
            X_leaf = X.clone().requires_grad_()
            wanted = [parameters[name] for name in trainable]
            bars = torch.autograd.grad(
                layer(X_leaf), [X_leaf, *wanted], y_bar, allow_unused=True, materialize_grads=True
            )
            cotangents = session.vjp(solution, y_bar.to(y.dtype).numpy(), adjoint=adjoint, on_unsafe="skip")
            kept = ~cotangents.skipped
            if not kept.all():
                continue
            worst(adjoint, cotangents.x, bars[0])
            for name, bar in zip(trainable, bars[1:], strict=True):
                worst(adjoint, cotangents.weights[name], bar)

    for name, bound in TOLERANCE[session.manifest.dtype].items():
        if not figures[name] <= bound:
            raise ExportError(
                f"parity: {name} differs from torch in float64 by {figures[name]:.1e}, more than {bound:.0e}; "
                "the package is not written. Please report this with the model"
            )
    return {**figures, "gap_median": float(np.median(gaps)), "gap_max": float(np.max(gaps))}
