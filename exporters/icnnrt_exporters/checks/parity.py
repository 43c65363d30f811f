"""The check that ends every export: the package, run by ONNX Runtime, against torch in float64.

The figures are errors relative to the scale of the true answer, the worst over all inputs tried:

    error = max |package − torch| / max(1, max |torch|)

float32 packages are compared with the same network in float64, since torch's own float32 is no better a judge.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import icnnrt
from icnnrt.errors import ExportError
from icnnrt.format import wire
from icnnrt.format.manifest import OP_DOMAIN, Domain, Manifest
from icnnrt.format.signatures import ENERGY_ROLES
from icnnrt.mathematics import bregman, certificate, reference
from icnnrt.mathematics.domains import MODELS, Coordinates, coordinates
from icnnrt.serving.load import AnySession
from icnnrt_exporters.assembly.argmin_graph import UNIT_BOX
from icnnrt_exporters.assembly.qp_settings import PROGRAMS
from icnnrt_exporters.checks import by_torch, parity_polyhedron, parity_qp
from icnnrt_exporters.checks.by_torch import Doubles

# What an export may differ by. float64 differs by the order of sums alone, which the K steps of a solver can magnify.
# In float32 a cut near a kink of a ReLU can fall on either side, and then one entry of the slope is that of the other
# face: both are right there, so the bounds are looser where slopes enter. Proposition 3 holds the cut points fixed: on
# the nearly parallel cuts of a converged smooth energy it divides by their differences; the exact recursion does not.
# z of quadratic programs is known to the root of the gap where a constraint is weakly active; float32 data move it by
# their own rounding too, and a cotangent by more where constraints nearly depend on each other.
TOLERANCE = {
    "float64": {"value": 1e-12, "gradient": 1e-12, "energy": 1e-9, "y": 1e-6, "exact": 1e-7, "prop3": 1e-3}
    | {"hvp": 1e-9, "hessian": 1e-9, "gradient_x": 1e-12, "pullback": 1e-9}
    | {"polyhedron": 1e-8, "polyhedron_adjoint": 1e-5}
    | {"z": 1e-6, "vjp": 1e-5},
    "float32": {"value": 1e-5, "gradient": 1e-3, "energy": 1e-3, "y": 2e-2, "exact": 1e-2, "prop3": 1e-2}
    | {"hvp": 1e-2, "hessian": 1e-2, "gradient_x": 1e-3, "pullback": 1e-2}
    | {"polyhedron": 1e-3, "polyhedron_adjoint": 1e-2}
    | {"z": 1e-3, "vjp": 3e-2},
}
# Of an energy that goes through quadratic programs: a gap of 1e-12 leaves z open by its root.
QP = {"float64": 1e-6, "float32": 1e-3}
SAMPLES = 6  # that are tried under constraints: each takes some quadratic programs in numpy
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


def check(session: AnySession, judge: nn.Module, x_example: Tensor, y_example: Tensor) -> dict[str, float]:
    """Compare one loaded package with the float64 copy of the module it was made from; return the figures.

    Raises ExportError naming the figure that is out of bounds.
    """
    dtype, facts = session.manifest.dtype, {}
    figures: dict[str, float] = {}
    through_programs = isinstance(session, icnnrt.QPSession)
    if isinstance(session, icnnrt.QPSession):
        figures = {"z": 0.0, "vjp": 0.0}
        batches = [*(x for x, _ in inputs(x_example, y_example)), x_example]
        found, facts["unsolved"] = parity_qp.figures(session, judge, batches)
        for name, got, true in found:
            _worst(figures, name, got, true)
    else:
        for x, y in inputs(x_example, y_example):
            _check_heads(session, judge, x, y, figures)
        if session.manifest.polyhedron is not None:
            few = (t[:SAMPLES] for t in inputs(x_example, y_example)[2])
            for name, got, true in parity_polyhedron.figures(session, judge, *few):
                _worst(figures, name, got, true)
        if session.manifest.solver is not None:
            facts = _check_argmin(session, judge, x_example, y_example, figures)
        energy = session.package.graphs[ENERGY_ROLES[session.manifest.kind]]
        operators = wire.survey(energy, "energy").operators
        through_programs = any((OP_DOMAIN, name) in operators for name in PROGRAMS)
    for name, figure in figures.items():
        bound = max(TOLERANCE[dtype][name], QP[dtype] if through_programs else 0.0)
        if not figure <= bound:
            raise ExportError(
                f"parity: {name} differs from torch in float64 by {figure:.1e}, more than {bound:.0e}; "
                "the package is not written. Give examples of the scale the model was trained on, or export it in "
                "float64; if that does not help, please report this with the model"
            )
    return figures | facts


def _worst(figures: dict[str, float], name: str, got: NDArray[Any], true: Tensor) -> None:
    figures[name] = max(figures.get(name, 0.0), error(got, true.detach().numpy()))


def _check_heads(
    session: icnnrt.EnergySession, judge: nn.Module, x: Tensor, y: Tensor, figures: dict[str, float]
) -> None:
    """Value, gradient and the optional heads."""
    manifest = session.manifest
    X, Y = x.double(), y.double()
    context = X.clone().requires_grad_()

    def slope(y: Tensor, x: Tensor = X) -> tuple[Tensor | None, Tensor]:
        if manifest.kind == "gradient":
            return None, judge(x, y)
        return by_torch.gradient(judge, x, y)

    v = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
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
    if "pullback" in manifest.graphs and f is not None:
        paired = (torch.sin(f.detach()).to(y.dtype).double() * f).sum() + (v.double() * g).sum()
        trainable = manifest.weights.trainable
        named = dict(judge.named_parameters(remove_duplicate=False))
        inputs = [leaf, context, *(named[name] for name in trainable)]
        bars = torch.autograd.grad(paired, inputs, retain_graph=True, materialize_grads=True)
        got = session.pullback(x.numpy(), y.numpy(), torch.sin(f.detach()).to(y.dtype).numpy(), v.numpy())
        for one, true in zip((got.y, got.x, *(got.weights[name] for name in trainable)), bars, strict=True):
            _worst(figures, "pullback", one, true)
    if not {"hvp", "hessian"} & manifest.graphs.keys():
        return
    H = by_torch.hessian(g, leaf)
    if "hvp" in manifest.graphs:
        product = torch.einsum("bij,bj->bi", H, v.double())
        _worst(figures, "hvp", session.hvp(x.numpy(), y.numpy(), v.numpy()), product)
    if "hessian" in manifest.graphs:
        _worst(figures, "hessian", session.hessian(x.numpy(), y.numpy()), H)


def _check_argmin(
    session: icnnrt.EnergySession,
    judge: nn.Module,
    x_example: Tensor,
    y_example: Tensor,
    figures: dict[str, float],
) -> dict[str, float]:
    """y* and its adjoints; returns what there is to say besides."""
    domain, spec = session.manifest.domain, session.manifest.solver
    assert domain is not None, "a solver has a domain"
    assert spec is not None
    depths = [("exact", spec.iterations), *([("prop3", 1)] if spec.step_size is None else [])]
    gaps: list[float] = []
    not_convex = 0
    trainable = session.manifest.weights.trainable
    for x, y in inputs(x_example, y_example):
        X = x.double()
        bounds = random_bounds(y.numpy()) if domain.kind == "box" else {}
        solution = session.argmin(x.numpy(), lower=bounds.get("lower"), upper=bounds.get("upper"))
        at = coordinates(bounds, domain.mu)
        true = _solve(session.manifest, reference.in_coordinates(by_torch.of_arrays(judge, X), at), len(x))
        _worst(figures, "y", solution.y, torch.from_numpy(at.y(true.y)))
        _worst(figures, "energy", solution.energy, torch.from_numpy(true.energy))
        gaps += [float(g) for g in solution.gap]
        not_convex += int((solution.status == icnnrt.Status.NOT_CONVEX).sum())

        solution = solution[~solution.unsafe(every_model=True)]
        of_cuts, points = _of(solution, domain)
        met = of_cuts.scale * by_torch.slopes(judge, torch.from_numpy(np.array(solution.x)).double(), points)
        solution = solution[by_torch.same_slopes(met, solution.slopes, solution.slopes.dtype)]
        if len(solution) == 0:
            continue
        y_bar = np.cos(np.arange(solution.y.size, dtype=np.float64)).reshape(solution.y.shape).astype(solution.y.dtype)
        for adjoint, depth in depths:
            cotangents = session.vjp(solution, y_bar, adjoint=adjoint)
            bars = true_adjoint(judge, trainable, solution, y_bar.astype(np.float64), depth, domain, spec.step_size)
            _worst(figures, adjoint, cotangents.x, bars.x)
            for name, bar in zip(trainable, bars.theta, strict=True):
                _worst(figures, adjoint, cotangents.weights[name], bar)
            if cotangents.lower is not None and cotangents.upper is not None:
                _worst(figures, adjoint, cotangents.lower, torch.from_numpy(bars.shift - bars.scale))
                _worst(figures, adjoint, cotangents.upper, torch.from_numpy(bars.scale))
    return {
        "not_convex": float(not_convex),
        "gap_median": float(np.median(gaps)),
        "gap_max": float(np.max(gaps)),
    }


def random_bounds(y: NDArray[Any], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Lower and upper, of shape and dtype of y, of boxes around and beside [0, 1]^n; an entry in ten has no width."""
    rng = np.random.default_rng(seed)
    lower = rng.uniform(-1.5, 0.5, y.shape)
    width = rng.uniform(0.1, 2.0, y.shape) * (rng.random(y.shape) > 0.1)
    return {"lower": lower.astype(y.dtype), "upper": (lower + width).astype(y.dtype)}


def _solve(
    manifest: Manifest, value_and_gradient: Callable[[Doubles], tuple[Doubles, Doubles]], B: int
) -> reference.Trajectory:
    """What the package's solver should find from the centre of its domain, in p."""
    spec, (n,) = manifest.solver, manifest.y_shape
    assert spec is not None
    assert manifest.domain is not None
    model = MODELS[manifest.domain.kind]
    centre = np.full((B, n), model.centre(n))
    if spec.step_size is None:
        return reference.bundle_entropy_argmin(value_and_gradient, centre, spec.iterations, spec.steps, model)
    return bregman.bregman_argmin(value_and_gradient, centre, spec.iterations, spec.step_size, model)


def _of(solution: icnnrt.ArgminSolution, domain: Domain) -> tuple[Coordinates, Doubles]:
    """The coordinates of a solution's cuts, [B, 1, n] where they are of each sample, and its cut points as y."""
    lower, upper = solution.lower, solution.upper
    bounds = {} if lower is None or upper is None else {"lower": lower, "upper": upper}
    at = coordinates(bounds, domain.mu)
    if bounds:
        at = Coordinates(at.shift[:, None], at.scale[:, None])
    return at, at.y(solution.cut_points.astype(np.float64))


class Bars(NamedTuple):
    """Cotangents by torch in float64; shift and scale are those of `Coordinates`."""

    theta: list[Tensor]
    x: Tensor
    shift: Doubles
    scale: Doubles


def true_adjoint(
    judge: nn.Module,
    trainable: Sequence[str],
    solution: icnnrt.ArgminSolution,
    y_bar: Doubles,
    depth: int,
    domain: Domain = UNIT_BOX,
    step_size: float | None = None,
) -> Bars:
    """Cotangents of the solution's own cuts: the numpy reference's recursion, torch's autograd, all in float64.

    From the same cuts, so that a figure tells of the adjoint graph alone and not of what the solver magnified.
    """
    x = torch.from_numpy(np.array(solution.x)).double()
    at, points = _of(solution, domain)
    B, K, n = points.shape
    scale = np.broadcast_to(np.asarray(at.scale, np.float64), points.shape)
    model = MODELS[domain.kind]

    def hvp_in_p(p: Doubles, s: Doubles) -> Doubles:
        rows = Coordinates(*(c[:, 0] if np.ndim(c) else c for c in at))
        product: Doubles = rows.scale * by_torch.hessian_product(judge, x, rows.y(p), rows.scale * s)
        return product

    trajectory = reference.Trajectory(
        *(getattr(solution, field).astype(np.float64) for field in reference.Trajectory._fields)
    )
    if domain.kind == "box" and step_size is None:
        # The answer in p by its multipliers: (y − lower)/(upper − lower) loses digits.
        p = certificate.implied_point(trajectory.slopes, trajectory.lam, model)
    else:
        p = Coordinates(*(c[:, 0] if np.ndim(c) else c for c in at)).p(trajectory.y)
    trajectory = trajectory._replace(y=p)
    p_bar = scale[:, 0] * y_bar
    if step_size is None:
        cuts = reference.argmin_adjoint(trajectory, p_bar, hvp_in_p, depth, model)
    else:
        cuts = bregman.bregman_adjoint(trajectory, p_bar, hvp_in_p, step_size, model)
    seed = scale * cuts.seed
    theta_bar, x_bar, met = by_torch.pushed(judge, x, points, cuts.offset_bar, seed, trainable)
    products = np.zeros((B, K, n))
    if depth == K:
        flat = points.reshape(B * K, n), seed.reshape(B * K, n)
        products = by_torch.hessian_product(judge, x.repeat_interleave(K, 0), *flat).reshape(B, K, n)
    of_bounds = reference.coordinates_adjoint(trajectory.cut_points, met, cuts, trajectory.y, y_bar, products)
    return Bars(theta_bar, x_bar, *of_bounds)
