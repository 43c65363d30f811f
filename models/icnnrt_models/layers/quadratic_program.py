"""min ½ z'Qz + p'z over z with linear constraints, as a torch layer, differentiable in all its data."""

import functools
import time
import warnings
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from icnnrt.arguments import flag, instance, refused
from icnnrt.mathematics.qp_advice import qp_advice
from icnnrt.mathematics.qp_pattern import QPPattern
from icnnrt.mathematics.qp_reference import STEPS
from icnnrt.mathematics.qp_settings import Settings, checked_smoothing, checked_tolerance
from icnnrt.mathematics.qp_status import STATUSES, advise
from icnnrt_models.layers.on_unsafe import OnUnsafe, chosen, unsafe
from icnnrt_models.layers.qp_operators import NAN, RAISE, SKIP, TAKE, differentiable, untimed
from icnnrt_models.layers.qp_plan import text_of
from icnnrt_models.layers.qp_script import Data, Solution
from icnnrt_models.layers.qp_tensors import leading
from icnnrt_models.layers.qp_trace import qp_trace

__all__ = ["QPLayer", "QPResult"]

UNSAFE: Final = {"nan": NAN, "skip": SKIP, "raise": RAISE, "use": TAKE}


class QPResult(NamedTuple):
    """The answer of a layer with `multipliers`; B samples."""

    z: Tensor  # [B, n], NaN unless SOLVED or INACCURATE, and so the multipliers
    lam: Tensor  # [B, m] > 0 pushes back from h, < 0 from h_lower
    nu: Tensor  # [B, q]
    bound_multipliers: Tensor  # [B, n] the same of lower and upper
    slack: Tensor  # [B, m] of the side that λ points at, > 0; no gradient
    # [B, 3] float64, relative stationarity, feasibility, duality gap, before z is rounded to float32; no gradient
    residual: Tensor
    status: Tensor  # [B] int32, of icnnrt.Status
    steps: Tensor  # [B] int32, that were taken, of certificates aside


class QPLayer(nn.Module):
    """z* of a convex quadratic program, one for each sample, as a layer.

    Problem::

        min over z in R^n of  ½ z'Qz + p'z   s.t.  h_lower <= Gz <= h,   Az = b,   lower <= z <= upper

    `forward(Q, p, G=None, h=None, A=None, b=None, *, lower=None, upper=None, h_lower=None) -> z` [B, n], or a
    `QPResult` with `multipliers`. Data are float32 or float64, of one dtype; computed is in float64.

        Q        [B, n, n]   positive semidefinite; its symmetric part is used
        p        [B, n]
        G        [B, m, n]   with h, h_lower [B, m] or both; infinite bounds are none
        A        [B, q, n]   with b [B, q]
        lower, upper         [B, n], or one number

    A datum without the batch axis, or with one of size 1, is shared by all samples, and its gradient is the SUM over
    the batch. Of nothing but shared data the answer is [1, n].

    Every sample has a status of its own, an `icnnrt.Status`, and up to rounding never depends on
    its neighbours: where no z meets the constraints, the objective falls without end, or the data hold NaN, z is NaN. A
    gradient is taken of SOLVED samples alone, and of them only where the loss has one (it has not where the answer is
    not unique and the loss tells one from another). `on_unsafe` says what becomes of the others:

        "nan"    gradients are NaN, of shared data too: never silently those of fewer samples
        "use"    those that are INACCURATE have one all the same, as good as their residual; else as "nan"
        "skip"   they add 0 to every gradient, whatever the loss makes of their NaN; for a loss that leaves them out
        "raise"  forward raises, with the status and the remedy, for which torch.compile breaks its graph; under
                 torch.export it cannot, and acts as "nan": ask the status there, with `multipliers`. Backward raises
                 where the loss has no gradient or a kink, or a gradient is asked for by data of rows that hold z and
                 depend on each other, which is theirs together; but not in compiled code, where it acts as "nan"

    Derivatives are those of the KKT conditions (Amos, Kolter, *OptNet*, ICML 2017), of the multipliers too if a loss
    uses them: in reverse and forward, by autograd and by `torch.func` (`grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`), alone
    or with `torch.func.vmap`, whose dimension becomes part of the batch of one call. Second derivatives are those at a
    fixed active set, of which the answer is a rational function of its data; across a change of it there is none.
    Where a multiplier and its slack are both 0 there is a kink, and the derivative is one-sided or between. Under
    torch.jit.trace, and in what `icnnrt_exporters` write, a loss that has no gradient gets that of the part that has.

    The layer has no weights. It is the operator icnnrt::qp_solve: torch.compile, with fullgraph=True too, and
    torch.export keep it as it is, so that the same kernel runs as in eager mode; `icnnrt_exporters` turn it into
    ai.icnnrt::QuadraticProgram. Compiled it has a gradient, once, and no forward mode, which raises a RuntimeError; so
    does the bare operator. Under torch.jit.trace it is the solver itself, so that libtorch runs it alone.

    Args:
        multipliers: return a `QPResult` instead of z.
        on_unsafe: "nan", "use", "skip" or "raise", see above.
        steps: the most interior-point steps, by default 60; 8 to 14 are usual.
        tolerance: the relative KKT residual at which a sample is CONVERGED, by default 1e-9 in float64 and 1e-6 in
            float32.
        seconds: the most time of a call: what runs out is judged as it stands, as in `icnnrt.qp`. Native kernels alone
            look at the clock, under torch.compile, torch.export and torch.func too; where none answers (other devices
            than the CPU, an install without them, torch.jit.trace) the call is refused. In ONNX it is the operator's
            input `seconds`, of which portable bodies take no notice; packages leave it out with a warning, as
            `icnnrt.load` has limits of its own.
        pattern: an `icnnrt.QPPattern`, where Q, G and A may be other than 0: native kernels then factor no zeros, and
            answer the same. It pays from some tens of variables on where most entries are 0. Samples that do not keep
            to it are solved all the same, as slowly as without; gradients are of every entry, as without.
        smoothing: κ > 0, for the gradient at the point of the central path where every multiplier times its slack is κ,
            in units of the objective, instead of at the answer, which stays what it is (see
            `icnnrt.mathematics.qp_smoothing`). It is that of a smooth function, tells of constraints that do not hold
            yet, and is for learning across changes of the active set. In reverse and once alone; under torch.jit.trace,
            and in what `icnnrt_exporters` write, the gradient is that at the answer.

    Raises:
        InputError: a sentence with the argument, what was expected, what came, and the remedy.
    """

    def __init__(
        self,
        *,
        multipliers: bool = False,
        on_unsafe: OnUnsafe | Literal["use"] = "nan",
        steps: int | None = None,
        tolerance: float | None = None,
        seconds: float | None = None,
        pattern: QPPattern | None = None,
        smoothing: float | None = None,
    ) -> None:
        super().__init__()
        self.multipliers = flag(multipliers, "multipliers")
        self.on_unsafe = chosen(on_unsafe, "z", "use")
        # That a tolerance is one of float32 is known when the data are.
        self.tolerance, asked, self.seconds = Settings.checked(tolerance, steps, seconds, np.float64)
        self.steps = STEPS if asked is None else asked
        remedy = "make one by icnnrt.QPPattern(Q, G, A)"
        self.pattern = None if pattern is None else instance(pattern, "pattern", QPPattern, "a QPPattern", remedy)
        self._plan = text_of(self.pattern)
        self.smoothing = None if smoothing is None else checked_smoothing(smoothing)

    def forward(
        self,
        Q: Tensor,
        p: Tensor,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        *,
        lower: Tensor | float | None = None,
        upper: Tensor | float | None = None,
        h_lower: Tensor | float | None = None,
    ) -> Tensor | QPResult:
        """z [B, n] of each problem, or all of its answer."""
        given = dict(zip(Data._fields, (Q, p, G, h_lower, h, A, b, lower, upper), strict=True))
        if torch.jit.is_tracing():
            with warnings.catch_warnings():
                # Numbers of variables and constraints are constants of a trace, as they should be.
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                data = _data(given)
        else:
            data = _data(given)
        if self.tolerance is not None and data.p.dtype == torch.float32:
            checked_tolerance(self.tolerance, np.float32)
        if self.pattern is not None and not torch.jit.is_tracing():
            self.pattern.check_sizes(data.Q.shape[-1], data.G.shape[-2], data.A.shape[-2])
        tolerance, skip, use = self.tolerance or 0.0, self.on_unsafe == "skip", self.on_unsafe == "use"
        if torch.jit.is_tracing():
            if self.seconds is not None:
                raise untimed("a trace, which holds the method itself")
            found = Solution(*qp_trace()(*data, self.steps, skip, self.on_unsafe == "raise", use, tolerance))
        else:
            began = None if self.seconds is None or torch.compiler.is_compiling() else time.perf_counter()
            start = data.p.new_zeros((1, 0))
            unsafe = UNSAFE[self.on_unsafe]
            found = Solution(
                *differentiable(
                    *(*data, start, self.steps, unsafe, tolerance),
                    *(self._plan, self.smoothing or 0.0, self.seconds or 0.0),
                )
            )
            if self.on_unsafe == "raise" and not torch.compiler.is_exporting():
                _demand_solved(found, data, Settings(self.tolerance, self.steps, self.seconds), began)
        if not self.multipliers:
            return found.z
        slack, residual = found.slack.detach(), found.residual.detach()
        told = slack, residual, _statuses(found.status), found.steps
        return QPResult(found.z, found.lam, found.nu, found.mu, *told)

    def extra_repr(self) -> str:
        settings = f"steps={self.steps}, tolerance={self.tolerance}, seconds={self.seconds}, smoothing={self.smoothing}"
        settings += f", pattern={self.pattern}" * bool(self.pattern)
        return f"multipliers={self.multipliers}, on_unsafe={self.on_unsafe!r}, {settings}"


def _data(given: dict[str, Any]) -> Data:
    p = instance(given["p"], "p", Tensor, "a tensor [n] or [B, n]", "pass torch.as_tensor of it")
    if p.dtype not in (torch.float32, torch.float64):
        raise refused("p", "float32 or float64", p.dtype, "convert the data with .float() or .double()")
    found, _ = leading(given, p, "p", exact=True)
    return Data(**found)


def _statuses(codes: Tensor) -> Tensor:
    """The `icnnrt.Status` of each `QPStatus`, in operations that hold no device in a trace."""
    parts = (int(status) * (codes == code).to(codes.dtype) for code, status in enumerate(STATUSES))
    return functools.reduce(torch.add, parts)


@torch.compiler.disable
def _demand_solved(found: Solution, data: Data, settings: Settings, began: float | None) -> None:
    elapsed = None if began is None else time.perf_counter() - began
    # Under vmap all of its samples are asked, so the index of one has more than one number.
    of = found.status, found.residual, found.steps
    statuses, residuals, taken = (torch.func.debug_unwrap(a, recurse=True) for a in of)
    bad = torch.nonzero(statuses).tolist()
    if not bad:
        return
    at = tuple(bad[0])
    status, residual = STATUSES[int(statuses[at])], residuals[at].detach().numpy(force=True)
    course = settings.told(str(data.p.dtype).removeprefix("torch."), int(taken[at]), elapsed)
    if len(at) == 1:
        (i,) = at
        own = {name: a[i if len(a) > 1 else 0].numpy(force=True) for name, a in data._asdict().items()}
        why = qp_advice(i, status, residual, own, ray=False, **course).partition(": ")[2]
    else:
        stationarity, feasibility, gap = residual.tolist()
        why = advise(status, residual=(stationarity, feasibility, gap), ray=False, **course)
    raise unsafe([i[0] if len(i) == 1 else i for i in bad], status, why)
