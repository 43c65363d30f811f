"""A network that goes through quadratic programs, in use: z(x) with a status for every sample, and its gradients."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import batch, choice, finite_rows, refused, sample
from icnnrt.mathematics.qp_settings import USUAL, Settings
from icnnrt.mathematics.qp_status import QPStatus, advise, statuses
from icnnrt.mathematics.status import Status
from icnnrt.printable import show
from icnnrt.serving.adjoint import ON_UNSAFE, Cotangents, leave_out, own
from icnnrt.serving.domain_arguments import no_energy
from icnnrt.serving.heads import weights_bar
from icnnrt.serving.session import Session
from icnnrt.serving.solution import Array, Floats, Solution


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class QPNetworkSolution(Solution):
    """z of B samples, the answer of a network that goes through quadratic programs, with the certificate of each.

    The length is B; `solution[i]`, a slice or a mask selects samples and gives a QPNetworkSolution of them.
    """

    x: Floats
    """[B, *x_shape] in the package's dtype, the inputs as they were run."""
    z: Floats
    """[B, n] in the package's dtype; NaN where a program has no solution."""
    status: NDArray[np.int32]
    """[B] int32, a `Status` each: of the first program on the sample's way that did not converge, if any."""
    residual: Array
    """[B, 3] float64, relative stationarity, feasibility and duality gap, the worst of all programs, of their
    answers before they are rounded to float32; NaN with z."""
    info: Mapping[str, Any]
    """How it was computed: providers, native (whether compiled kernels ran), steps (the most, None where it is what the
    network was exported with), seconds."""
    weights_id: str
    """Which weights it was computed with; a session refuses to differentiate an answer of other weights."""
    settings: Settings = USUAL
    """The tolerance and the steps that were asked for, which `vjp` keeps to."""

    @property
    def y(self) -> Floats:
        """z, by the name that every answer has."""
        return self.z

    def advice(self, i: int) -> str:
        """One sentence with numbers: how sample `i` went and what would make it better."""
        i = sample(i, len(self))
        a, b, c = (float(r) for r in self.residual[i])
        course = self.settings.asked(self.z.dtype)
        return f"sample {i}: " + advise(Status(self.status[i]), residual=(a, b, c), ray=False, **course)


def _refused(what: str) -> Callable[..., NoReturn]:
    """A call that energies alone have."""

    def call(self: "QPSession", *arguments: object, **keywords: object) -> NoReturn:
        raise no_energy(what)

    call.__name__, call.__doc__ = what, f"Of energies alone, see `EnergySession.{what}`: here it raises `InputError`."
    return call


class QPSession(Session):
    """Serves a network that goes through quadratic programs: z(x), and gradients of a loss on z."""

    _KINDS = ("qp",)

    def solve_qp(
        self, x: object, *, tolerance: float | None = None, steps: int | None = None, strict: bool | None = None
    ) -> QPNetworkSolution:
        """z(x) of a package of kind "qp", a network that goes through quadratic programs: x [B, *x_shape] -> z [B, n].

        x is an array or nested lists of numbers, converted to the package's dtype; integers and booleans must convert
        exactly. Returns a `QPNetworkSolution` with status and residual of each sample: where no z meets the constraints
        of a program, or its objective falls without end, z is NaN and the others are as they would be alone. A sample
        with NaN or infinity in x is not run and has status NOT_FINITE_INPUT. With `strict`, by default what `load` was
        told, `CertificateError` is raised if any sample is not CONVERGED.

        tolerance, steps:  of all programs, in place of those that the network was exported with: the relative KKT
                           residual at which a sample is CONVERGED, and the most interior point steps. Packages written
                           by earlier versions have no such settings

        Raises `InputError` for a wrong shape or dtype, and for settings that do not fit.
        """
        began = time.perf_counter()
        X = batch(x, "x", self.dtype, self.manifest.x_shape)
        self.runner.check_open()
        finite = finite_rows(X)
        fill = {"status": QPStatus.NOT_FINITE_INPUT}
        settings = Settings.checked(tolerance, steps, None, self.dtype)
        out, weights_id = self.runner.run("solve", {"x": X, **self._fed(settings)}, where=finite, fill=fill)
        status = statuses(out["status"])
        # Solved programs may be followed by layers that overflow.
        lost = ~np.isfinite(out["z"]).all(1) & (status == Status.CONVERGED)
        status = np.where(lost, np.int32(Status.NOT_FINITE), status)
        info = self.runner.info("solve", began, ran=bool(finite.any()), steps=settings.steps)
        found = QPNetworkSolution(X, out["z"], status, out["residual"], info, weights_id, settings)
        return self._judged(found, strict)

    def _fed(self, settings: Settings) -> dict[str, Array]:
        """What the graphs take of them: all that they have, as what was fed stays until it is fed anew."""
        signature = self.manifest.graphs["solve"].signature
        assert signature is not None, "a package that is open lists what its graphs take and give"
        feeds: dict[str, Array] = {}
        for name, kind in (("tolerance", np.float64), ("steps", np.int64)):
            value = getattr(settings, name)
            if name in signature.inputs:
                feeds[name] = np.array(value or 0, kind)
            elif value is not None:
                remedy = "export the network anew to have it"
                raise refused(name, "none, as the package was written without that setting", show(value), remedy)
        return feeds

    def vjp(self, solution: Solution, y_bar: object, *, adjoint: str = "exact", on_unsafe: str = "raise") -> Cotangents:
        """θ̄ and x̄ of a loss on z with z̄ = ∂ℓ/∂z, [B, n]: the vector-Jacobian product of `solve_qp`.

        solution:   what `solve_qp` of this session returned, or of another session with the same package and weights
        y_bar:      array or nested lists of finite numbers, converted as `solve_qp` converts x
        adjoint:    has no say here: there is one
        on_unsafe:  "raise", or "skip" to leave samples without a trustworthy gradient out of the sum: all that are not
                    CONVERGED

        Returns and raises what `EnergySession.vjp` does.
        """
        found = own(self.runner, QPNetworkSolution, "solve_qp", solution)
        choice(on_unsafe, "on_unsafe", ON_UNSAFE)
        z̄ = batch(y_bar, "y_bar", self.dtype, self.manifest.y_shape, length=len(found))
        leave_out(~found.ok, found.advice, z̄, on_unsafe)
        feeds = {"x": found.x, "z_bar": z̄, **self._fed(found.settings)}
        out, _ = self.runner.run("solve_adjoint", feeds, made_with=found.weights_id, where=found.ok)
        return Cotangents(weights_bar(out), out["x_bar"], ~found.ok, np.zeros(len(found), bool))

    value = _refused("value")
    gradient = _refused("gradient")
    value_and_gradient = _refused("value_and_gradient")
    hvp = _refused("hvp")
    hessian = _refused("hessian")
    value_gradient_hessian = _refused("value_gradient_hessian")
    gradient_x = _refused("gradient_x")
    pullback = _refused("pullback")
    argmin = _refused("argmin")
    argmin_polyhedron = _refused("argmin_polyhedron")
    vjp_polyhedron = _refused("vjp_polyhedron")
    prove_convexity = _refused("prove_convexity")
