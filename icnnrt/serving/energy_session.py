"""An energy in use: its values and derivatives, its argmin with a certificate on every sample, gradients through it."""

from dataclasses import replace
from typing import NoReturn

from icnnrt.arguments import batch, integer, refused
from icnnrt.format.verdict import Convexity
from icnnrt.limits import each_call
from icnnrt.printable import named
from icnnrt.serving import argmin, heads, polyhedron, polyhedron_adjoint
from icnnrt.serving.adjoint import Cotangents, vjp
from icnnrt.serving.argmin import ArgminSolution
from icnnrt.serving.heads import Pulled
from icnnrt.serving.polyhedron import PolyhedronSolution
from icnnrt.serving.polyhedron_adjoint import ConstraintCotangents
from icnnrt.serving.session import Session
from icnnrt.serving.solution import Floats, Solution


class EnergySession(Session):
    """Serves an energy: f(x, y), y* = argmin over y in [0,1]^n of f(x, y) − H(y), and gradients of a loss on y*."""

    _KINDS = ("energy", "gradient")

    # --- The energy ------------------------------------------------------------------------------

    def value(self, x: object, y: object, *, out: Floats | None = None) -> Floats:
        """f(x, y), [B]; `value_and_gradient` documents x, y and out."""
        return heads.evaluated(self.runner, "value", x, y, only=("f",), out=out)["f"]

    def gradient(self, x: object, y: object, *, out: Floats | None = None) -> Floats:
        """∇_y f(x, y), [B, n]; `value_and_gradient` documents x, y and out.

        For an energy of y alone, x None, that is the map y -> ∇f(y): the transport map of optimal transport.
        """
        role = "gradient" if self.manifest.kind == "gradient" else "value"
        return heads.evaluated(self.runner, role, x, y, only=("gradient",), out=out)["gradient"]

    def value_and_gradient(
        self, x: object, y: object, *, out: tuple[Floats, Floats] | None = None
    ) -> tuple[Floats, Floats]:
        """f(x, y) and ∇_y f(x, y) for a batch: ([B], [B, n]) in the package's dtype.

        x [B, *x_shape] and y [B, n] are arrays or nested lists of numbers; y may lie anywhere, not only in the domain.
        x may be None where the energy has no context (x_shape is [0]). Floats of another width are converted; integers
        and booleans must convert exactly. A sample with NaN or infinity in x or y gets NaN and leaves the others as
        they are. A large batch is run in chunks, see `load`; large arrays of the package's dtype are read where they
        are, so nobody should write in them meanwhile.

        out: arrays that the result is written to and that are returned, one for each it has: of its shape and dtype,
        C-contiguous, writeable, and apart from x and y. What an exception leaves in them is not defined.

        Raises `InputError` for a wrong shape or dtype, or if the package holds only a gradient.
        """
        found = heads.evaluated(self.runner, "value", x, y, out=out)
        return found["f"], found["gradient"]

    def hvp(self, x: object, y: object, v: object, *, out: Floats | None = None) -> Floats:
        """∇²_y f(x, y) v, [B, n], for v [B, n]. Needs hvp.onnx, an optional head of the export."""
        return heads.evaluated(self.runner, "hvp", x, y, y_dot=v, out=out)["hvp"]

    def hessian(self, x: object, y: object, *, out: Floats | None = None) -> Floats:
        """∇²_y f(x, y), dense: [B, n, n]. Needs hessian.onnx, an optional head of the export."""
        return heads.evaluated(self.runner, "hessian", x, y, only=("hessian",), out=out)["hessian"]

    def value_gradient_hessian(
        self, x: object, y: object, *, out: tuple[Floats, Floats, Floats] | None = None
    ) -> tuple[Floats, Floats, Floats]:
        """f [B], ∇_y f [B, n] and ∇²_y f [B, n, n] in one run: of a material law, energy, stress and tangent."""
        heads.demand_value(self.manifest, "value_gradient_hessian")
        found = heads.evaluated(self.runner, "hessian", x, y, out=out)
        return found["f"], found["gradient"], found["hessian"]

    def gradient_x(self, x: object, y: object, *, out: Floats | None = None) -> Floats:
        """∇_x f(x, y), [B, *x_shape]. Needs gradient_x.onnx, an optional head of the export."""
        return heads.evaluated(self.runner, "gradient_x", x, y, out=out)["gradient_x"]

    def pullback(
        self,
        x: object,
        y: object,
        f_bar: object,
        gradient_bar: object,
        *,
        out: tuple[Floats, Floats] | None = None,
    ) -> Pulled:
        """Cotangents of f and ∇_y f to y, x and the weights: the gradients of Σ_b f̄_b f(x_b, y_b) + ḡ_b'∇_y f.

        f_bar [B], gradient_bar [B, n]. ȳ = f̄ ∇_y f + ∇²_y f ḡ; θ̄ is summed over the batch. A sample with NaN or
        infinity in any of the four has NaN in ȳ and x̄ and no part in θ̄. Needs pullback.onnx, an optional head. `out`
        are arrays for ȳ and x̄, as `value_and_gradient` documents them; what is returned are views of them.
        """
        return heads.pulled_back(self.runner, x, y, f_bar, gradient_bar, out)

    # --- Its argmin ------------------------------------------------------------------------------

    def argmin(
        self,
        x: object,
        *,
        lower: object = None,
        upper: object = None,
        y_init: object = None,
        warm: ArgminSolution | None = None,
        strict: bool | None = None,
    ) -> ArgminSolution:
        """Solve y* = argmin over y in the domain of f(x, y) + R(y) for a batch of contexts x [B, *x_shape].

        The package fixes domain and regulariser, see `icnnrt.format.manifest.Domain`: [0,1]^n with R = −H by default.

        x:       array or nested lists of numbers, converted to the package's dtype as `value_and_gradient` does
        lower:   with `upper`, the bounds of y, for a package whose domain is a box and for no other: [B, n], or [n] or
                 one number for all samples. Where both are equal they fix y
        y_init:  where the solver starts, [B, n] in the domain; its centre by default
        warm:    a solution of B earlier samples (of any weights): its y is where the solver starts, brought within
                 the bounds of now, and the centre where it is NaN. K cuts are made all the same, so a good start makes
                 the answer better, not faster
        strict:  raise `CertificateError` if any sample did not converge; by default what `load` was told

        Returns an `ArgminSolution` of B samples, each with status, gap and residual. A batch of none is fine. A sample
        with NaN or infinity in x or a bound is not run and has status NOT_FINITE_INPUT, or INFEASIBLE where a lower
        bound exceeds its upper one; the others' answers do not depend on it, up to the rounding that another batch
        size brings. Of a package that was exported although its energy is not convex, every answer is NOT_CONVEX.

        Raises `InputError` for a wrong shape, dtype or range.
        """
        return self._judged(argmin.argmin(self, x, lower, upper, y_init, warm), strict)

    def vjp(self, solution: Solution, y_bar: object, *, adjoint: str = "exact", on_unsafe: str = "raise") -> Cotangents:
        """θ̄ and x̄ of a loss on y* with ȳ = ∂ℓ/∂y*, [B, n]: the vector-Jacobian product of `argmin`.

        solution:   what `argmin` of this session returned, or of another session with the same package and weights
        y_bar:      array or nested lists of finite numbers, converted as `argmin` converts x
        adjoint:    "exact" (the derivative of the K-step algorithm) or "prop3" (the paper's, cheaper, right for
                    piecewise-linear energies); `icnnrt.serving.adjoint` explains both
        on_unsafe:  "raise", or "skip" to leave samples without a trustworthy gradient out of the sum. Those are
                    samples with status SOLVER, NOT_CONVEX or NOT_FINITE*, those where rounding leaves more than 1e-3
                    of the energy open, and for "exact" also those where any model on the way missed the residual
                    tolerance. GAP is safe: the gradient is that of the algorithm; and so is PRECISION up to that 1e-3

        Returns `Cotangents`: weights {name: θ̄} for every trainable weight, summed over the batch (not averaged),
        x [B, *x_shape], and of a box lower and upper [B, n]. Where the solver started counts as a constant, in a box as
        a constant part of the way from lower to upper, as its centre is. Skipped samples have x̄ = NaN and may have any
        ȳ, NaN too. If all are skipped, θ̄ is zero.

        Raises `CertificateError` naming unsafe samples, `InputError` for a solution of other weights or a y_bar of the
        wrong shape or dtype.
        """
        return vjp(self.runner, solution, y_bar, adjoint=adjoint, on_unsafe=on_unsafe)

    @each_call
    def argmin_polyhedron(
        self,
        x: object,
        *,
        G: object = None,
        h: object = None,
        A: object = None,
        b: object = None,
        lower: object = None,
        upper: object = None,
        mu: float | None = None,
        iterations: int | None = None,
        tolerance: float | None = None,
        y_init: object = None,
        strict: bool | None = None,
    ) -> PolyhedronSolution:
        """Solve y* = argmin of f(x, y) + (μ/2) ‖y‖² over {Gy <= h, Ay = b, lower <= y <= upper}, of any package.

        The package's own domain and regulariser, if it has any, play no part. Everything is float64 but f itself. A
        package that was exported with the head "polyhedron" runs one graph; others run the same method in Python, which
        takes several times as long, but starts each quadratic program from the last, and so may solve some more of
        badly scaled ones.

        x:             [B, *x_shape], converted to the package's dtype
        G, h, A, b:    [m, n], [m], [q, n], [q] for all samples, or with B in front; h and b may be one number
        lower, upper:  one number, [n] or [B, n]; infinite for none
        mu:            of the regulariser; with 0 the constraints have to bound y, or y is NaN and the status UNBOUNDED
        iterations:    the most cuts; a sample stops at its tolerance
        tolerance:     of the gap relative to max(1, |lower_bound|)
        y_init:        [B, n], where to start; its nearest feasible point is the first cut's. 0 by default
        strict:        raise `CertificateError` if any sample did not converge; by default what `load` was told

        What is left out of mu, iterations and tolerance is as the package was exported (`manifest.polyhedron`), else
        1, 100, and 1e-9 of a float64 package, 1e-5 of a float32 one.

        Returns a `PolyhedronSolution`: y*, gap and lower bound, multipliers of the constraints, a status per sample
        (INFEASIBLE where no y meets the constraints). Raises `InputError` for wrong arguments.
        """
        heads.demand_value(self.manifest, "argmin_polyhedron")
        given = {"G": G, "h": h, "A": A, "b": b, "lower": lower, "upper": upper}
        solution = polyhedron.argmin(self, x, given, mu, iterations, tolerance, y_init)
        return self._judged(solution, strict)

    @each_call
    def vjp_polyhedron(
        self, solution: Solution, y_bar: object, *, adjoint: str = "auto", on_unsafe: str = "raise"
    ) -> ConstraintCotangents:
        """The gradient of a loss on y* with ȳ = ∂ℓ/∂y* [B, n], by G, h, A, b, lower, upper, mu, x and the weights.

        adjoint:    "prop3" for energies of pieces, "implicit" (needs hessian.onnx) for smooth ones, "exact" (needs
                    pullback.onnx) for the derivative of the iterations; "auto" asks the graph which of the first two.
                    `icnnrt.serving.polyhedron_adjoint` tells them apart
        on_unsafe:  "raise", or "skip" to leave out samples without a trustworthy gradient: those of status SOLVER,
                    NOT_CONVEX, NOT_FINITE* or UNBOUNDED, of "implicit" those of GAP too, and those with an inaccurate
                    model on the way

        x̄ and θ̄ need the head "polyhedron" or "pullback", and are None without. With the head "polyhedron" the adjoint
        that the manifest names, `manifest.polyhedron.adjoint`, is one graph, and "auto" takes it; the other two run in
        Python and need what is said above. Raises `CertificateError` naming unsafe samples.
        """
        return polyhedron_adjoint.vjp(self, solution, y_bar, adjoint=adjoint, on_unsafe=on_unsafe)

    @each_call
    def prove_convexity(self, x: object = None, *, seed: int = 0) -> Convexity:
        """Whether f is convex in y with the weights as they are now: proven, violated (with a witness) or unknown.

        The value graph itself is followed, see `icnnrt.convexity`. x [B, *x_shape] are contexts to look for violations
        at where nothing is proven; random normal ones by default. From then on, every answer of an energy that is
        violated is NOT_CONVEX, until another look finds otherwise: as it would be of a package written now. A package
        of a gradient alone is refused with `InputError`: it has no value to look at.
        """
        heads.demand_value(self.manifest, "prove_convexity")
        seed = integer(seed, "seed", 0)
        X = None if x is None else batch(x, "x", self.dtype, self.manifest.x_shape)
        self.runner.check_open()
        weights = self.runner.weights  # one set for all, whatever is updated meanwhile

        def value(x: Floats, y: Floats) -> Floats:
            return heads.evaluated(self.runner, "value", x, y, only=("f",), weights=weights)["f"]

        from icnnrt.convexity import prove  # which no session needs to answer

        found = prove(self.package.graphs["value"], weights.arrays, value=value, x_samples=X, seed=seed)
        stated = self.manifest.convexity
        if found.verdict == "proven" and stated is not None:
            # It was repeated with other numbers for the same weights, so it rests on the same.
            found = replace(found, rests_on=stated.rests_on)
        self.convexity.looked(found, weights)
        return found

    def solve_qp(self, x: object, *, strict: bool | None = None) -> NoReturn:
        """Of packages of kind "qp" alone, see `QPSession.solve_qp`: here it raises `InputError`."""
        came = f"{named(self.manifest.name)} of kind {self.manifest.kind!r}"
        raise refused("solve_qp", "a package of kind 'qp'", came, "use argmin, or export the network with kind='qp'")
