"""y* = argmin over a polyhedron of f(x, y) + (μ/2) ‖y‖² as a torch layer, differentiable in all that it depends on."""

import math
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icnnrt.arguments import choice, instance, integer, number, refused, shown
from icnnrt_models.layers.energy_at import EnergyAt, context_of, differentiated, float_of, plain, y_dim_of
from icnnrt_models.layers.on_unsafe import OnUnsafe, chosen
from icnnrt_models.layers.polyhedron_argmin import Argmin, Cuts, Method, PolyhedronAdjoint
from icnnrt_models.layers.polyhedron_result import PolyhedronResult, finite_rows, result_of
from icnnrt_models.layers.qp_tensors import filled, leading


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

    `icnnrt.serving.polyhedron_adjoint` says which adjoint is right for which energy: "prop3" for pieces, which keeps
    the graph of f at every cut, "implicit" for smooth ones, which takes n Hessian-vector products, or "exact". "auto",
    the default, is "prop3" if the operators that autograd records between y and f are affine maps and maxima,
    "implicit" if one of them is smooth, and an error where it cannot be told. autograd alone goes through the layer,
    neither torch.func's transforms nor forward mode.

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
        InputError: a sentence with the argument, what was expected, what came, and the remedy.
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
        self.energy = instance(energy, "energy", nn.Module, "a module f(x, y) -> [batch]", "pass a torch.nn.Module")
        self.y_dim = y_dim_of(energy, y_dim)
        self.iterations = integer(iterations, "iterations", 1, remedy="give the most cuts K")
        self.mu = number(mu, "mu", least=0.0, remedy="it is the curvature of (mu/2) ‖y‖²")
        remedy = "choose 'prop3' for ReLU networks, 'implicit' for smooth ones"
        self.adjoint = cast(PolyhedronAdjoint, choice(adjoint, "adjoint", get_args(PolyhedronAdjoint), remedy))
        remedy = "leave it out for 1e-9 in float64 and 1e-5 in float32"
        self.tolerance = None if tolerance is None else number(tolerance, "tolerance", least=0.0, remedy=remedy)
        self.on_unsafe = chosen(on_unsafe, "y")
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
        like, P, start = self._given(x, y_init, {"G": G, "h": h, "A": A, "b": b, "lower": lower, "upper": upper})
        context = context_of(self.energy, _cleaned(x))
        weights = differentiated(self.energy)
        kept: list[PolyhedronResult] = []
        settings = self._method(), kept, tuple(weights), len(context)
        y = cast(Tensor, Argmin.apply(*settings, like, start, x, *context, *P, *weights.values()))
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
        like, P, start = self._given(x, y_init, {"G": G, "h": h, "A": A, "b": b, "lower": lower, "upper": upper})
        context = tuple(map(plain, context_of(self.energy, _cleaned(x))))
        cuts = Cuts(EnergyAt(self.energy, context, (), 1.0), like, "exact", record=False)
        return result_of(self._method().run(cuts, P, start), x, cuts.dtype)

    def extra_repr(self) -> str:
        tolerance = "" if self.tolerance is None else f", tolerance={self.tolerance}"
        return (
            f"y_dim={self.y_dim}, iterations={self.iterations}, mu={self.mu}, adjoint={self.adjoint!r}{tolerance}, "
            f"on_unsafe={self.on_unsafe!r}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # The last answer is no part of what is copied or written.
        return {**self.__dict__, "last": None}

    def _method(self) -> Method:
        return Method(self.energy, self.iterations, self.mu, self.adjoint, self.tolerance, self.on_unsafe)

    def _given(
        self, x: Tensor, y_init: Tensor | None, constraints: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Some tensor of the energy's dtype on x's device; all constraints of all samples in float64; the start."""
        instance(x, "x", Tensor, "a tensor [batch, ...]", "pass torch.as_tensor of it")
        if x.dim() == 0:
            raise refused("x", "a tensor [batch, ...]", shown(x), "give it a row for each sample")
        like = float_of(self.energy, x)
        if like.dtype not in (torch.float32, torch.float64):
            raise refused(
                "energy", "weights in float32 or float64", like.dtype, "convert it with .float() or .double()"
            )
        shape = (x.shape[0], self.y_dim)
        start = x.new_zeros(shape, dtype=torch.float64)
        if y_init is not None:
            remedy = f"give {self.y_dim} numbers for each row of x, or leave it out to start from 0"
            if not isinstance(y_init, Tensor) or y_init.shape != shape:
                raise refused("y_init", f"a tensor of shape {list(shape)}", shown(y_init), remedy)
            if not bool(torch.isfinite(y_init).all()):
                raise refused("y_init", "finite numbers", "NaN or infinity", remedy)
            start = plain(y_init).double()
        found, sizes = leading(constraints, start, "x", exact=False, n=self.y_dim, B=x.shape[0])
        found["lower"] = filled(found["lower"], start[:1], -math.inf)
        found["upper"] = filled(found["upper"], start[:1], math.inf)
        return like, tuple(a.double().expand(sizes.B, *a.shape[1:]) for a in found.values()), start


def _cleaned(x: Tensor) -> Tensor:
    """x with 0 in the samples that hold NaN or infinity, which are not run."""
    return torch.where(finite_rows(x).view(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))
