"""y* = argmin over a polyhedron of f(x, y) + (μ/2) ‖y‖² as a torch layer, differentiable in all that it depends on."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icnnrt.arguments import sample
from icnnrt.mathematics.bundle_qp import PolyhedronTrajectory, bundle_qp_uncertainty
from icnnrt.mathematics.certificate import DIGITS
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.status import Status, advise_polyhedron, imprecise
from icnnrt.serving.polyhedron import TOLERANCE
from icnnrt_models.layers.bundle_qp import (
    PolyhedronCotangents,
    bundle_qp_adjoint,
    bundle_qp_argmin,
    bundle_qp_implicit,
    on,
)
from icnnrt_models.layers.energy_at import (
    EnergyAt,
    OnceDifferentiable,
    Point,
    context_of,
    differentiated,
    float_of,
    hvp,
    plain,
    y_dim_of,
)
from icnnrt_models.layers.pieces import is_piecewise_linear
from icnnrt_models.layers.quadratic_program import OnUnsafe, check_on_unsafe
from icnnrt_models.networks.energy import check_size

__all__ = ["PolyhedronAdjoint", "PolyhedronArgmin", "PolyhedronResult"]

PolyhedronAdjoint = Literal["auto", "prop3", "implicit", "exact"]


class Constraints(NamedTuple):
    """{y: Gy <= h, Ay = b, lower <= y <= upper}; infinite bounds are none."""

    G: Tensor  # [B, m, n]
    h: Tensor  # [B, m]
    A: Tensor  # [B, q, n]
    b: Tensor  # [B, q]
    lower: Tensor  # [B, n]
    upper: Tensor  # [B, n]


class PolyhedronResult(NamedTuple):
    """The answer for B samples with its certificate, without gradient; floats are float64.

    NaN where there is no answer.
    """

    y: Float[Tensor, "batch n"]  # the best point met, feasible to 1e-9 of the size of the constraints
    energy: Float[Tensor, " batch"]  # f(x, y) + (μ/2) ‖y‖²
    lower_bound: Float[Tensor, " batch"]  # no feasible energy is below it, up to the rounding of f, if f is convex in y
    gap: Float[Tensor, " batch"]  # energy − lower_bound
    residual: Float[Tensor, "batch 3"]  # relative stationarity, feasibility and duality gap of the last model
    status: Int[Tensor, " batch"]  # int32, of icnnrt.Status
    cuts: Int[Tensor, " batch"]  # int64, how many models were solved
    lam: Float[Tensor, "batch m"]  # multipliers of Gy <= h: by how much the optimum falls if h grows
    nu: Float[Tensor, "batch q"]  # multipliers of Ay = b
    bound_multipliers: Float[Tensor, "batch n"]  # of lower and upper: > 0 at an upper, < 0 at a lower one
    ray: Float[Tensor, "batch n"]  # of an UNBOUNDED sample the direction along which f falls, as in PolyhedronSolution
    uncertainty: Float[Tensor, " batch"]  # by how much rounding may have moved the gap

    def advice(self, i: int) -> str:
        """One sentence with numbers: how sample `i` went and what would make it better."""
        i = sample(i, len(self.status))
        return f"sample {i}: " + advise_polyhedron(
            Status(int(self.status[i])),
            gap=float(self.gap[i]),
            cuts=int(self.cuts[i]),
            uncertainty=float(self.uncertainty[i]),
        )


class PolyhedronArgmin(nn.Module):
    """The argmin of an energy convex in y under linear constraints, as a layer.

    Problem, one per row of x::

        y* = argmin over y of  f(x, y; θ) + (μ/2) ‖y‖²   s.t.  Gy <= h,  Ay = b,  lower <= y <= upper

    `forward(x, *, G=None, h=None, A=None, b=None, lower=None, upper=None, y_init=None) -> y` [B, n], in the dtype of
    the energy's weights, float32 or float64; programs and certificates are float64 always.

        G        [B, m, n]   with h [B, m], of which infinite entries are no bound
        A        [B, q, n]   with b [B, q]
        lower, upper         [B, n], or one number; infinite bounds are none
        y_init   [B, n]      0 where not given; the first cut is at the feasible point nearest to it. A constant

    A constraint without the batch axis, or with one of size 1, is shared by all samples, and its gradient is the SUM
    over the batch. All have gradients, and so have x and the weights, once, not twice.

    `icnnrt.mathematics.bundle_qp` states the method: cuts and constraints in one quadratic program an iteration, so
    that every answer is feasible; the same as `icnnrt.EnergySession.argmin_polyhedron`, on the device of the data. A
    sample is done once its gap is within the tolerance, and depends on its neighbours by rounding alone.

    `solve`, of the same arguments, gives a `PolyhedronResult`: y with certificate, multipliers and a status for each
    sample; nothing is recorded for autograd. `last` is that of the last call of `forward`.

    Which adjoint is right (as `icnnrt.serving.polyhedron_adjoint` has them):

    - "prop3": the cuts of the model that gave y*, held fixed: exact for energies of pieces (ReLU). Keeps the graph of f
      at every cut.
    - "implicit": the optimality conditions at y*: exact for smooth energies (softplus) at convergence. Takes n
      Hessian-vector products.
    - "exact": the derivative of the iterations themselves; for pieces the same as "prop3", for smooth energies true of
      the algorithm, but not near the derivative of the argmin.
    - "auto", the default: "prop3" if the operators that autograd records between y and f are affine maps and maxima,
      "implicit" if one of them is smooth; an error where it cannot be told.

    Energies that have both kinks and curvature in y are served by none of them well. autograd alone goes through the
    layer, neither torch.func's transforms nor forward mode.

    A gradient is taken of samples that are CONVERGED, PRECISION or, unless by "implicit", GAP, whose programs were all
    solved, and of whose energy rounding leaves no more than 1e-3 open. `on_unsafe` says what becomes of the others:

        "nan"    gradients are NaN, of weights and shared constraints too: never silently those of fewer samples
        "skip"   they add 0 to every gradient, whatever the loss makes of their NaN; but f must be finite at finite x
        "raise"  forward raises, with the status and the remedy

    Args:
        energy: a module with forward(x, y) -> [batch], convex in y, that autograd can differentiate. One with `context`
            and `value` (`ContextEnergy`) has its x path computed once.
        iterations: the most cuts K; small μ and many variables need more.
        mu: μ >= 0; with 0 f and the polyhedron together have to bound y: where f falls without end along a ray of the
            polyhedron, as far as it was followed, the status is UNBOUNDED, with the ray, and y is NaN.
        adjoint: "auto", "prop3", "implicit" or "exact", see above.
        tolerance: the gap, relative to max(1, |lower_bound|), at which a sample is done; None for 1e-9 in float64 and
            1e-5 in float32.
        on_unsafe: "nan", "skip" or "raise", see above.
        y_dim: n, needed only for an energy without an attribute `y_dim`.

    Raises:
        ValueError: a sentence with the argument, what was expected, what came, and the remedy.
    """

    last: PolyhedronResult | None

    def __init__(
        self,
        energy: nn.Module,
        iterations: int = 100,
        mu: float = 1.0,
        adjoint: PolyhedronAdjoint = "auto",
        tolerance: float | None = None,
        *,
        on_unsafe: OnUnsafe = "nan",
        y_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_size("iterations", iterations, 1, "give the most cuts K")
        if not (isinstance(mu, (int, float)) and math.isfinite(mu) and mu >= 0):
            raise ValueError(f"mu must be a finite number >= 0, got {mu!r}: it is the curvature of (mu/2) ‖y‖².")
        if adjoint not in get_args(PolyhedronAdjoint):
            raise ValueError(
                f"adjoint must be 'auto', 'prop3', 'implicit' or 'exact', got {adjoint!r}: choose 'prop3' for ReLU "
                "networks, 'implicit' for smooth ones."
            )
        if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 <= tolerance < math.inf):
            raise ValueError(
                f"tolerance must be a finite number >= 0, got {tolerance!r}: leave it out for 1e-9 in float64 and 1e-5 "
                "in float32."
            )
        check_on_unsafe(on_unsafe, "y")
        self.energy = energy
        self.y_dim = y_dim_of(energy, y_dim)
        self.iterations = iterations
        self.mu = float(mu)
        self.adjoint: PolyhedronAdjoint = adjoint
        self.tolerance = tolerance
        self.on_unsafe: OnUnsafe = on_unsafe
        self.last = None

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        *,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        lower: Tensor | float | None = None,
        upper: Tensor | float | None = None,
        y_init: Float[Tensor, "batch n"] | None = None,
    ) -> Float[Tensor, "batch n"]:
        """y* for each row of x."""
        like = self._like(x)
        P = self._polyhedron(x, G, h, A, b, lower, upper)
        start = self._start(x, y_init)
        context = context_of(self.energy, _cleaned(x))
        weights = differentiated(self.energy)
        inputs = (x, *context, *P, *weights.values())
        kept: list[PolyhedronResult] = []
        y = cast(Tensor, _Argmin.apply(self, kept, tuple(weights), len(context), like, start, *inputs))
        (self.last,) = kept
        return y.to(like.dtype)

    @torch.no_grad()
    def solve(
        self,
        x: Float[Tensor, "batch ..."],
        *,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        lower: Tensor | float | None = None,
        upper: Tensor | float | None = None,
        y_init: Float[Tensor, "batch n"] | None = None,
    ) -> PolyhedronResult:
        """y* with its certificate and multipliers, without gradient."""
        P = Constraints(*map(plain, self._polyhedron(x, G, h, A, b, lower, upper)))
        context = tuple(map(plain, context_of(self.energy, _cleaned(x))))
        cuts = _Cuts(EnergyAt(self.energy, context, (), 1.0), self._like(x).dtype, "exact", record=False)
        start = self._start(x, y_init)
        return _result(_run(self, cuts, P, start), x, cuts.dtype)

    def extra_repr(self) -> str:
        tolerance = "" if self.tolerance is None else f", tolerance={self.tolerance}"
        return (
            f"y_dim={self.y_dim}, iterations={self.iterations}, mu={self.mu}, adjoint={self.adjoint!r}{tolerance}, "
            f"on_unsafe={self.on_unsafe!r}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The last answer is no part of what is copied or written.
        return {**self.__dict__, "last": None}

    def _like(self, x: Tensor) -> Tensor:
        """Some tensor of the energy's dtype, on x's device."""
        like = float_of(self.energy, x)
        if like.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"energy must have weights in float32 or float64, got {like.dtype}: convert it with .float() or "
                ".double()."
            )
        return like

    def _start(self, x: Tensor, y_init: Tensor | None) -> Tensor:
        shape = (x.shape[0], self.y_dim)
        if y_init is None:
            return torch.zeros(shape, dtype=torch.float64, device=x.device)
        if not isinstance(y_init, Tensor) or y_init.shape != shape:
            raise ValueError(
                f"y_init must have shape {list(shape)}, got {_shape(y_init)}: give one row of {self.y_dim} numbers for "
                "each row of x, or leave it out to start from 0."
            )
        if not bool(torch.isfinite(y_init).all()):
            raise ValueError("y_init must be finite, got NaN or infinity: leave it out to start from 0.")
        return plain(y_init).double()

    def _polyhedron(
        self,
        x: Tensor,
        G: Tensor | None,
        h: Tensor | None,
        A: Tensor | None,
        b: Tensor | None,
        lower: Tensor | float | None,
        upper: Tensor | float | None,
    ) -> Constraints:
        """All constraints in float64 with a leading axis of B; what is absent has no rows, or is infinite."""
        n = self.y_dim

        def rows(name: str, value: Any, shape: tuple[int | None, ...]) -> Tensor:
            wanted = ", ".join("rows" if s is None else str(s) for s in shape)
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.device != x.device:
                came = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{name} must be a tensor of floats on the device of x, {x.device}, got {came}: pass "
                    f"torch.as_tensor({name}, dtype=torch.float64, device=x.device)."
                )
            batched = value if value.dim() > len(shape) else value[None]
            fits = batched.dim() == len(shape) + 1 and batched.shape[0] in (1, x.shape[0])
            if not fits or any(s is not None and s != came for s, came in zip(shape, batched.shape[1:], strict=True)):
                raise ValueError(
                    f"{name} must have shape [{wanted}] or [{x.shape[0]}, {wanted}], got {_shape(value)}: give one for "
                    "all samples, or one for each row of x."
                )
            return batched.double().expand(x.shape[0], *batched.shape[1:])

        def system(left: str, M: Tensor | None, right: str, v: Tensor | None) -> tuple[Tensor, Tensor]:
            if M is None and v is None:
                empty = torch.zeros((x.shape[0], 0, n), dtype=torch.float64, device=x.device)
                return empty, empty[:, :, 0]
            if M is None or v is None:
                missing, other = (left, right) if M is None else (right, left)
                raise ValueError(f"{missing} must be given with {other}, got None: pass both or neither.")
            matrix = rows(left, M, (None, n))
            return matrix, rows(right, v, (matrix.shape[1],))

        def bound(name: str, value: Any, none: float) -> Tensor:
            if value is None or isinstance(value, (int, float)):
                number = none if value is None else float(value)
                return torch.full((x.shape[0], n), number, dtype=torch.float64, device=x.device)
            if isinstance(value, Tensor) and value.dim() == 0:
                value = value.expand(n)
            return rows(name, value, (n,))

        infinity = math.inf
        return Constraints(
            *system("G", G, "h", h),
            *system("A", A, "b", b),
            bound("lower", lower, -infinity),
            bound("upper", upper, infinity),
        )


def _shape(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _finite_rows(x: Tensor) -> Tensor:
    return x.isfinite().flatten(1).all(1) if x.dim() > 1 else x.isfinite()


def _cleaned(x: Tensor) -> Tensor:
    """x with 0 in the samples that hold NaN or infinity, which are not run."""
    return torch.where(_finite_rows(x).view(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))


class _Cuts:
    """f and ∇f of float64 points, for the bundle method, and their graphs if they are to be kept.

    The energy sees ŷ, y in its own dtype; f is told at y along the cut that touches at ŷ, so that every cut is one of
    f.
    """

    def __init__(self, energy: EnergyAt, dtype: torch.dtype, adjoint: PolyhedronAdjoint, record: bool) -> None:
        self.energy, self.dtype, self.adjoint = energy, dtype, adjoint
        self.record = record and adjoint != "implicit"
        self.points: list[Point] = []

    def __call__(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rounded = y.to(self.dtype)
        point = self.energy.at(rounded, create_graph=self.record)
        if self.adjoint == "auto":
            self.adjoint = _chosen(point)
            self.record = self.record and self.adjoint != "implicit"
        if self.record:
            self.points.append(point)
        f, g = point.f.detach().double(), point.g.detach().double()
        return f + (g * (y - rounded)).sum(1), g


def _chosen(point: Point) -> PolyhedronAdjoint:
    pieces = is_piecewise_linear(point.f, point.y)
    if isinstance(pieces, str):
        raise ValueError(
            f"adjoint must be given for this energy, got 'auto': its {pieces} does not tell whether it is piecewise "
            "linear in y; build the layer with adjoint='prop3' if it is (ReLU networks), 'implicit' if it is smooth."
        )
    return "prop3" if pieces else "implicit"


def _run(layer: PolyhedronArgmin, cuts: _Cuts, P: Constraints, y_init: Tensor) -> PolyhedronTrajectory:
    tolerance = layer.tolerance
    if tolerance is None:
        tolerance = TOLERANCE[str(cuts.dtype).removeprefix("torch.")]
    with torch.inference_mode(False):
        return bundle_qp_argmin(cuts, P, layer.iterations, layer.mu, y_init, tolerance, cuts.dtype)


def _result(T: PolyhedronTrajectory, x: Tensor, dtype: torch.dtype) -> PolyhedronResult:
    """The answers, with the multipliers of the constraints in the last model of each sample."""
    P, n = T.polyhedron, T.y.shape[1]
    of_rows, of_equalities, of_bounds = (np.zeros(a.shape) for a in (P.h, P.b, P.lower))
    for k, (samples, s) in enumerate(T.models, start=1):
        last = T.cuts[samples] == k
        at = samples[last]
        of_rows[at], of_equalities[at], of_bounds[at] = s.lam[last, k:], s.nu[last], s.mu[last, :n]
    of_f = (T.y, T.energy, T.gap, T.slopes, T.offsets, T.cut_points, T.lam)
    with np.errstate(invalid="ignore", over="ignore"):
        doubt = bundle_qp_uncertainty(*of_f, str(dtype).removeprefix("torch."))
    finite = _finite_rows(x)
    lost = ~finite | on(x, np.asarray(~np.isfinite(T.y).all(1)))
    floats = (T.y, T.energy, T.lower_bound, T.gap, T.residual, of_rows, of_equalities, of_bounds, doubt)
    y, energy, lower_bound, gap, residual, lam, nu, bounds, uncertainty = (
        on(x, a).masked_fill(lost.view(-1, *[1] * (a.ndim - 1)), math.nan) for a in floats
    )
    status = torch.where(finite, on(x, T.status), int(Status.NOT_FINITE_INPUT)).to(torch.int32)
    ray, cuts = on(x, T.ray).masked_fill(~finite[:, None], 0.0), on(x, T.cuts)
    return PolyhedronResult(y, energy, lower_bound, gap, residual, status, cuts, lam, nu, bounds, ray, uncertainty)


def _trusted(T: PolyhedronTrajectory, result: PolyhedronResult, adjoint: PolyhedronAdjoint) -> Tensor:
    """[B]: the gradient of that sample can be taken. Whether Newton's program is solved is known on the way back."""
    # As `icnnrt.mathematics.certificate.differentiable`.
    status, unit = result.status, result.lower_bound.abs().clamp(min=1.0)
    trusted = ((status <= Status.GAP) | (status == Status.PRECISION)) & (result.uncertainty <= DIGITS * unit)
    if adjoint == "implicit":
        return trusted & (status != Status.GAP)
    assert T.projection is not None
    for k, (samples, solution) in enumerate((T.projection, *T.models)):
        poor = (T.best[samples] >= k) & (solution.status != QPStatus.SOLVED)
        if adjoint == "prop3":  # a point on a ray is held fixed, as every cut point is
            poor &= solution.status != QPStatus.DUAL_INFEASIBLE
        trusted = trusted.index_fill(0, on(trusted, samples[poor]), False)
    return trusted


def _demand_trusted(result: PolyhedronResult, trusted: Tensor, adjoint: PolyhedronAdjoint, dtype: str) -> None:
    bad = (~trusted).nonzero().flatten().tolist()
    if bad:
        i = bad[0]
        status, doubt = Status(int(result.status[i])), float(result.uncertainty[i])
        most = DIGITS * max(1.0, abs(float(result.lower_bound[i])))
        why = result.advice(i).removeprefix(f"sample {i}: ")
        if status in (Status.CONVERGED, Status.GAP, Status.PRECISION) and doubt > most:
            why = imprecise(doubt, most, dtype)
        elif status == Status.CONVERGED or (status in (Status.GAP, Status.PRECISION) and adjoint != "implicit"):
            why = "a program on the way was inaccurate: scale the constraints, or raise mu"
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"on_unsafe: sample {i}{more} ended with {status.name}: {why}.")


class _Argmin(torch.autograd.Function):
    """The solve, and its adjoint with respect to x where it is spoilt, the context, the constraints and the weights.

    The graphs of f and ∇_y f at the cut points are kept from the solve: see `icnnrt_models.layers.argmin`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: PolyhedronArgmin,
        kept: list[PolyhedronResult],
        names: tuple[str, ...],
        n_context: int,
        like: Tensor,
        y_init: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        needed = ctx.needs_input_grad[6:]
        recorded = any(needed)
        x, context, weights = inputs[0], inputs[1 : 1 + n_context], inputs[7 + n_context :]
        P = Constraints(*map(plain, inputs[1 + n_context : 7 + n_context]))
        # Fresh leaves: a context tensor's own history holds the x path, which ordinary autograd runs later.
        context = tuple(plain(c).requires_grad_(need) for c, need in zip(context, needed[1:], strict=False))
        overrides: dict[str, Tensor] | None = None
        if not all(p.is_leaf for p in weights):
            # Inside functional_call weights may depend on one another: cut that here too.
            weights = tuple(p.detach().requires_grad_() for p in weights)
            overrides = dict(zip(names, weights, strict=True))
        # What is chosen by "auto" is asked for only where it matters.
        adjoint = layer.adjoint if recorded or layer.on_unsafe == "raise" else "exact"
        cuts = _Cuts(EnergyAt(layer.energy, context, (), 1.0, overrides), like.dtype, adjoint, recorded)
        T = _run(layer, cuts, P, y_init)
        result = _result(T, x, cuts.dtype)
        kept.append(result)
        trusted = _trusted(T, result, cuts.adjoint)
        if layer.on_unsafe == "raise":
            _demand_trusted(result, trusted, cuts.adjoint, str(cuts.dtype).removeprefix("torch."))
        if recorded:
            points = cuts.points
            if cuts.adjoint == "implicit":
                with torch.inference_mode(False):
                    points = [cuts.energy.at(result.y.nan_to_num().to(like.dtype), create_graph=True)]
            ctx.adjoint, ctx.on_unsafe, ctx.trajectory, ctx.needed = cuts.adjoint, layer.on_unsafe, T, needed
            ctx.n_context = n_context
            # Saved this way, not as attributes, they are freed with the rest of the graph.
            flat = [tensor for point in points for tensor in point]
            ctx.save_for_backward(trusted, plain(x), *context, *weights, *flat)
        return result.y.clone()  # another tensor than what is kept

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        needed, n_context = ctx.needed, ctx.n_context
        trusted, x, *saved = ctx.saved_tensors
        n_given = len(needed) - 7  # context and weights; beside them there are x and six constraints
        given, flat = saved[:n_given], iter(saved[n_given:])
        points = [Point(*point) for point in zip(flat, flat, flat, strict=True)]
        of_given = (*needed[1 : 1 + n_context], *needed[7 + n_context :])
        wanted = [t for t, need in zip(given, of_given, strict=True) if need]
        with torch.no_grad():
            y_bar = torch.where(trusted[:, None], y_bar, 0.0)
            cotangents, solved = _cotangents(ctx.adjoint, ctx.trajectory, points, y_bar)
            trusted = trusted & solved
            if ctx.on_unsafe == "raise" and not bool(trusted.all()):
                raise ValueError(
                    f"on_unsafe: Newton's program at y* of sample {int((~trusted).nonzero()[0])} was not solved: raise "
                    "mu, or scale the constraints."
                )
            pulled = iter(_pull_back(points, cotangents, trusted, wanted))
            lost = math.nan if ctx.on_unsafe == "nan" else 0.0

            def rows(a: Tensor) -> Tensor:
                return torch.where(trusted.view(-1, *[1] * (a.dim() - 1)), a, lost)

            def total(a: Tensor) -> Tensor:
                return torch.where(trusted.all(), a, lost) if ctx.on_unsafe == "nan" else a

            found: list[Tensor] = []
            for i, need in enumerate(needed):
                if not need:
                    continue
                if i == 0:  # x itself: its context has the gradient, but not where it was cleaned
                    found.append(rows(torch.zeros_like(x)))
                elif i <= n_context:
                    found.append(rows(next(pulled)))
                elif i <= n_context + 6:
                    found.append(rows(cotangents.polyhedron[i - n_context - 1]))
                else:
                    found.append(total(next(pulled)))
        if torch.is_grad_enabled():  # create_graph=True
            found = list(OnceDifferentiable.apply("PolyhedronArgmin", torch.zeros((), requires_grad=True), *found))
        gradients = iter(found)
        return (*[None] * 6, *(next(gradients) if need else None for need in needed))


def _cotangents(
    adjoint: PolyhedronAdjoint, T: PolyhedronTrajectory, points: list[Point], y_bar: Tensor
) -> tuple[PolyhedronCotangents, Tensor]:
    """The cotangents, and which samples have them."""
    if adjoint != "implicit":
        of_points = (lambda i, s: hvp(points[i], s).double()) if adjoint == "exact" else None
        return bundle_qp_adjoint(T, y_bar, of_points), torch.ones_like(y_bar[:, 0], dtype=torch.bool)
    (point,) = points
    eye = torch.eye(y_bar.shape[1], dtype=point.g.dtype, device=y_bar.device)
    hessian = torch.stack([hvp(point, e.expand_as(point.g)) for e in eye], 1).double()
    found = bundle_qp_implicit(T, y_bar, point.g.detach().double(), hessian)
    return found, ~found.seed.isnan().flatten(1).all(1)


def _pull_back(
    points: list[Point], cotangents: PolyhedronCotangents, trusted: Tensor, wanted: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Σ_i ∇[ē_i f(x, y_i) + seed_i' ∇_y f(x, y_i)] with respect to `wanted`; zeros for what f does not depend on."""
    offset_bar = torch.where(trusted[:, None], cotangents.offset_bar, 0.0)
    seed = torch.where(trusted[:, None, None], cotangents.seed, 0.0)
    # Most cuts hold no answer: they cost nothing then.
    counts = ((offset_bar != 0) | (seed != 0).any(2)).any(0).tolist()
    outputs, seeds = [], []
    for i, (point, counted) in enumerate(zip(points, counts, strict=False)):
        if not counted:
            continue
        outputs.append(point.f)
        seeds.append(offset_bar[:, i].to(point.f.dtype))
        if point.g.requires_grad:
            outputs.append(point.g)
            seeds.append(seed[:, i].to(point.g.dtype))
    if not outputs or not wanted:
        return tuple(torch.zeros_like(w) for w in wanted)
    # The graph stays: whether backward may be called again is decided by who holds it.
    return torch.autograd.grad(outputs, wanted, seeds, retain_graph=True, materialize_grads=True)
