"""min ½ z'Qz + p'z over z with linear constraints, as a torch layer, differentiable in all its data."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from icnnrt.mathematics.qp_advice import qp_advice
from icnnrt.mathematics.qp_reference import STEPS, precision_of
from icnnrt.mathematics.qp_status import STATUSES, QPStatus, advise
from icnnrt_models.layers.kernels import Kernel, kernel, run_on
from icnnrt_models.layers.qp_script import Data, Solution, precision, qp_script
from icnnrt_models.networks.energy import check_size

__all__ = ["OnUnsafe", "QPLayer", "QPResult"]

OnUnsafe = Literal["nan", "skip", "raise"]


class QPResult(NamedTuple):
    """The answer of a layer with `multipliers`; B samples."""

    z: Tensor  # [B, n], NaN unless SOLVED or INACCURATE, and so the multipliers
    lam: Tensor  # [B, m] > 0 pushes back from h, < 0 from h_lower
    nu: Tensor  # [B, q]
    bound_multipliers: Tensor  # [B, n] the same of lower and upper
    slack: Tensor  # [B, m] of the side that λ points at, > 0; no gradient
    residual: Tensor  # [B, 3] float64, relative stationarity, feasibility, duality gap; no gradient
    status: Tensor  # [B] int32, of icnnrt.Status


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
    gradient is taken of SOLVED samples alone. `on_unsafe` says what becomes of the others:

        "nan"    gradients are NaN, of shared data too: never silently those of fewer samples
        "skip"   they add 0 to every gradient, whatever the loss makes of their NaN; for a loss that leaves them out
        "raise"  forward raises, with the status and the remedy

    Gradients are those of the KKT conditions (Amos, Kolter, *OptNet*, ICML 2017), of the multipliers too if a loss uses
    them; once, not twice, and in reverse: `torch.func.grad`, `vjp` and `jacrev`, alone or with `torch.func.vmap`, whose
    dimension becomes part of the batch of one call. Where a multiplier and its slack are both 0 there is a kink, and
    the gradient is one-sided or between.

    The layer has no weights. In eager mode it is the operator icnnrt::qp_solve, which torch.export and
    `icnnrt_exporters` turn into ai.icnnrt::QPSolve; under torch.jit.trace it is the solver itself, so that libtorch
    runs it alone.

    Args:
        multipliers: return a `QPResult` instead of z.
        on_unsafe: "nan", "skip" or "raise", see above.
        steps: the most interior-point steps; 8 to 14 are usual.

    Raises:
        ValueError: a sentence with the argument, what was expected, what came, and the remedy.
    """

    def __init__(self, *, multipliers: bool = False, on_unsafe: OnUnsafe = "nan", steps: int = STEPS) -> None:
        super().__init__()
        check_on_unsafe(on_unsafe, "z")
        check_size("steps", steps, 1, f"give the most interior-point steps, {STEPS} is usual")
        self.multipliers = bool(multipliers)
        self.on_unsafe: OnUnsafe = on_unsafe
        self.steps = steps

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
        with warnings.catch_warnings():
            # Numbers of variables and constraints are constants of a trace, as they should be.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            data = _checked(Q, p, G, h, A, b, lower, upper, h_lower)
        start = data.p.new_zeros((1, 0))
        if torch.jit.is_tracing():
            found = Solution(*_scripted()(*data, self.steps, self.on_unsafe == "skip", self.on_unsafe == "raise"))
        else:
            found = Solution(*differentiable(*data, start, self.steps, self.on_unsafe == "skip"))
            if self.on_unsafe == "raise" and not torch.compiler.is_compiling():
                _demand_solved(found, data, self.steps)
        if not self.multipliers:
            return found.z
        slack, residual = found.slack.detach(), found.residual.detach()
        return QPResult(found.z, found.lam, found.nu, found.mu, slack, residual, _statuses(found.status))

    def extra_repr(self) -> str:
        return f"multipliers={self.multipliers}, on_unsafe={self.on_unsafe!r}, steps={self.steps}"


# ---------------------------------------------------------------- arguments


def check_on_unsafe(on_unsafe: str, answer: str) -> None:
    if on_unsafe not in get_args(OnUnsafe):
        raise ValueError(
            f"on_unsafe must be 'nan', 'skip' or 'raise', got {on_unsafe!r}: choose 'skip' if your loss leaves out "
            f"samples whose {answer} is NaN."
        )


def _checked(
    Q: Tensor,
    p: Tensor,
    G: Tensor | None,
    h: Tensor | float | None,
    A: Tensor | None,
    b: Tensor | None,
    lower: Tensor | float | None,
    upper: Tensor | float | None,
    h_lower: Tensor | float | None,
) -> Data:
    """All data with a leading axis, of B or 1; what is absent has no rows, or no columns."""
    given = {"Q": Q, "p": p, "G": G, "h": h, "A": A, "b": b, "lower": lower, "upper": upper, "h_lower": h_lower}
    for name in ("Q", "p"):
        if not isinstance(given[name], Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(given[name]).__name__}: pass torch.as_tensor of it.")
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"p must be float32 or float64, got {p.dtype}: convert the data with .float() or .double().")
    for name, datum in given.items():
        if isinstance(datum, Tensor) and (datum.dtype != p.dtype or datum.device != p.device):
            raise ValueError(
                f"{name} must be of the dtype and on the device of p, {p.dtype} on {p.device}, got {datum.dtype} on "
                f"{datum.device}: convert it with .to(p)."
            )
    if p.dim() not in (1, 2):
        raise ValueError(f"p must have shape [n] or [B, n], got {_shape(p)}: flatten what one problem decides on.")
    n = p.shape[-1]
    if n < 1:
        raise ValueError(f"p must have at least one column, got {_shape(p)}: there is nothing to decide.")
    if Q.dim() not in (2, 3) or Q.shape[-2:] != (n, n):
        raise ValueError(
            f"Q must be square and fit p, shape [{n}, {n}] or [B, {n}, {n}], got {_shape(Q)}: for a diagonal pass "
            "torch.diag_embed of it."
        )

    def matrix(name: str, M: Tensor | None, partners: str, needed: bool) -> Tensor:
        if M is None:
            if needed:
                raise ValueError(f"{name} must be given with {partners}, got None: pass both or neither.")
            return p.new_zeros((1, 0, n))
        if not isinstance(M, Tensor) or M.dim() not in (2, 3) or M.shape[-1] != n:
            raise ValueError(
                f"{name} must have a row of {n} numbers for each constraint, [rows, {n}] or [B, rows, {n}], got "
                f"{_shape(M)}: its columns are those of p."
            )
        if not needed:
            raise ValueError(f"{partners} must be given with {name}, got None: pass the right-hand side.")
        return M if M.dim() == 3 else M.unsqueeze(0)

    def vector(name: str, v: Tensor | float | None, size: int, of: str) -> Tensor:
        if v is None:
            return p.new_zeros((1, 0))
        if not isinstance(v, Tensor):
            if not isinstance(v, (int, float)):
                raise ValueError(
                    f"{name} must be a tensor, [{size}] or [B, {size}], or one number, got {type(v).__name__}: pass "
                    "torch.as_tensor of it."
                )
            return p.new_full((1, size), float(v))
        if v.dim() == 0:
            return v.expand(1, size)
        if v.dim() > 2 or v.shape[-1] != size:
            raise ValueError(
                f"{name} must have {size} entries, as {of} has, [{size}] or [B, {size}], got {_shape(v)}: give one "
                "for each."
            )
        return v if v.dim() == 2 else v.unsqueeze(0)

    G_ = matrix("G", G, "h or h_lower", h is not None or h_lower is not None)
    A_ = matrix("A", A, "b", b is not None)
    m, q = G_.shape[1], A_.shape[1]
    if h is None:
        h = torch.inf
    data = Data(
        Q if Q.dim() == 3 else Q.unsqueeze(0),
        p if p.dim() == 2 else p.unsqueeze(0),
        G_,
        vector("h_lower", h_lower, m, "the rows of G"),
        vector("h", h, m, "the rows of G"),
        A_,
        vector("b", 0.0 if b is None else b, q, "the rows of A"),
        vector("lower", lower, n, "p"),
        vector("upper", upper, n, "p"),
    )
    if not torch.jit.is_tracing():
        _check_batches(data)
    return data


def _shape(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_batches(data: Data) -> None:
    """One batch, of those that are not shared."""
    first: tuple[str, Any] | None = None
    for name, datum in zip(data._fields, data, strict=True):
        size = datum.shape[0]
        if isinstance(size, int) and size == 1:
            continue
        if first is None:
            first = name, size
        elif size != first[1]:
            raise ValueError(
                f"{name} must hold as many samples as {first[0]}, {first[1]}, or one for all, got {size}: repeat or "
                "index one of them."
            )


def _statuses(codes: Tensor) -> Tensor:
    """The `icnnrt.Status` of each `QPStatus`, in operations that hold no device in a trace."""
    parts = (int(status) * (codes == code).to(codes.dtype) for code, status in enumerate(STATUSES))
    return functools.reduce(torch.add, parts)


def _demand_solved(found: Solution, data: Data, steps: int) -> None:
    # Under vmap all of its samples are asked, so the index of one has more than one number.
    statuses, residuals = (torch.func.debug_unwrap(a, recurse=True) for a in (found.status, found.residual))
    bad = torch.nonzero(statuses).tolist()
    if bad:
        at = tuple(bad[0])
        status, residual = STATUSES[int(statuses[at])], residuals[at].detach().numpy(force=True)
        if len(at) == 1:
            (i,) = at
            own = {n: a[i if len(a) > 1 else 0].numpy(force=True) for n, a in zip(data._fields, data, strict=True)}
            why = qp_advice(i, status, residual, own, steps=steps, ray=False).partition(": ")[2]
        else:
            a, b, c = residual.tolist()
            why = advise(status, residual=(a, b, c), steps=steps, ray=False)
        sample = at[0] if len(at) == 1 else list(at)
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"on_unsafe: sample {sample}{more} ended with {status.name}: {why}.")


# ---------------------------------------------------------------- the operators


class Kernels(NamedTuple):
    """The two operators on the CPU, numpy in and out, arguments and results in the order of ai.icnnrt's."""

    solve: Kernel  # 10 inputs -> 9 outputs
    adjoint: Kernel  # 12 inputs -> 4 outputs


def kernels(dtype: torch.dtype, steps: int) -> Kernels | None:
    """What answers in eager mode on the CPU instead of torch: icnnrt's native kernels, None where there are none.

    One function to replace: `icnnrt_models.layers.quadratic_program.kernels = lambda dtype, steps: None` takes torch's
    solver.
    """
    name = str(dtype).removeprefix("torch.")
    solve, adjoint = (kernel(f"qp_{role}", name) for role in ("solve", "adjoint"))
    return Kernels(solve, adjoint) if solve and adjoint and steps == STEPS else None


def _batch(data: Sequence[Tensor]) -> Any:
    """The largest leading axis: of all that is not shared; a symbol of a trace is none of the numbers it may be."""
    return next((a.shape[0] for a in data if not (isinstance(a.shape[0], int) and a.shape[0] == 1)), 1)


def _wide(data: Sequence[Tensor], B: int) -> list[Tensor]:
    return [a.detach().double().expand(B, *a.shape[1:]) for a in data]


def _or(bound: Tensor, like: Tensor, none: float) -> Tensor:
    return bound if bound.shape[1] == like.shape[1] else torch.full_like(like, none)


@torch.library.custom_op("icnnrt::qp_solve", mutates_args=())
def qp_solve(
    Q: Tensor,
    p: Tensor,
    G: Tensor,
    h_lower: Tensor,
    h: Tensor,
    A: Tensor,
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
    start: Tensor,
    steps: int,
    skip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ai.icnnrt::QPSolve; every leading axis is B or 1, and what is absent has no columns. `skip` is of the
    gradient."""
    data = (Q, p, G, h_lower, h, A, b, lower, upper, start)
    found = kernels(p.dtype, steps) if p.device.type == "cpu" else None
    if found is not None:
        return cast(Any, run_on(found.solve, data))
    B, dtype = _batch(data), p.dtype
    if B == 0:
        return cast(Any, tuple(a.clone() for a in _outputs(data, 0)))
    Q, p, G, h_lower, h, A, b, lower, upper, start = _wide(data, B)
    inf = float("inf")
    whole = Data(Q, p, G, _or(h_lower, h, -inf), h, A, b, _or(lower, p, -inf), _or(upper, p, inf))
    # Without TorchScript's optimiser, which takes a second at every new shape and gains nothing afterwards.
    with torch.no_grad(), torch.jit.optimized_execution(False):
        solution = qp_script().solve(*whole, start, precision(data[1]), steps)
    floats = [a.to(dtype).clone(memory_format=torch.contiguous_format) for a in solution[:6]]
    return cast(Any, (*floats, solution.residual.clone(), solution.status, solution.ray.to(dtype).clone()))


def _outputs(data: Sequence[Tensor], B: Any) -> tuple[Tensor, ...]:
    p, n, m, q = data[1], data[1].shape[1], data[2].shape[1], data[5].shape[1]
    floats = [p.new_empty((B, size)) for size in (n, m, q, n, m, n)]
    residual = p.new_empty((B, 3), dtype=torch.float64)
    return (*floats, residual, p.new_empty((B,), dtype=torch.int32), p.new_empty((B, 2 * n + m + q)))


@qp_solve.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    data = arguments[:10]
    return _outputs(data, _batch(data))


@torch.library.custom_op("icnnrt::qp_adjoint", mutates_args=())
def qp_adjoint(
    Q: Tensor,
    G: Tensor,
    A: Tensor,
    lam: Tensor,
    mu: Tensor,
    slack: Tensor,
    box_slack: Tensor,
    status: Tensor,
    z_bar: Tensor,
    lam_bar: Tensor,
    nu_bar: Tensor,
    mu_bar: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ai.icnnrt::QPAdjoint: d_z, d_λ, d_ν, d_μ; a cotangent without columns is zero."""
    data = (Q, G, A, lam, mu, slack, box_slack, status, z_bar, lam_bar, nu_bar, mu_bar)
    found = kernels(z_bar.dtype, STEPS) if z_bar.device.type == "cpu" else None
    if found is not None:
        return cast(Any, run_on(found.adjoint, data))
    B, dtype = z_bar.shape[0], z_bar.dtype
    if B == 0:
        return cast(Any, tuple(z_bar.new_empty((0, a.shape[1])) for a in (z_bar, lam, A, mu)))
    good = status == QPStatus.SOLVED
    Q, G, A, lam, mu, slack, box_slack, _, z_bar, lam_bar, nu_bar, mu_bar = _wide(data, B)
    bars = torch.cat([_or(lam_bar, lam, 0.0), _or(mu_bar, mu, 0.0)], 1)
    nu_bar = _or(nu_bar, A[:, :, 0], 0.0)
    with torch.no_grad(), torch.jit.optimized_execution(False):
        d = qp_script().adjoint(Q, G, A, lam, mu, slack, box_slack, z_bar, bars, nu_bar)
    return cast(Any, tuple(torch.where(good[:, None], a, torch.nan).to(dtype).contiguous() for a in d))


@qp_adjoint.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, A, lam, *_, z_bar, _, _, _ = arguments
    B, n = z_bar.shape
    return tuple(z_bar.new_empty((B, size)) for size in (n, lam.shape[1], A.shape[1], n))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    Q, p, G, h_lower, h, A, b, lower, upper, _, _, skip = inputs
    z, lam, nu, mu, slack, box_slack, _, status, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(Q, G, A, z, lam, nu, mu, slack, box_slack, status)
    ctx.sizes = [tuple(a.shape) for a in (Q, p, G, h_lower, h, A, b, lower, upper)]
    ctx.skip = skip


def _backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
    Q, G, A, z, lam, nu, mu, slack, box_slack, status = ctx.saved_tensors
    none = z.new_zeros((1, 0))
    if all(bar is None for bar in bars[:4]):
        return (None,) * 12
    z_bar, *others = (none if bar is None else bar for bar in bars[:4])
    z_bar = torch.zeros_like(z) if bars[0] is None else z_bar
    d = _Adjoint.apply(Q, G, A, lam, mu, slack, box_slack, status, z_bar, *others)
    if ctx.skip:
        kept = (status == QPStatus.SOLVED).unsqueeze(1)
        d = [torch.where(kept, a, 0.0) for a in d]
        z, lam, nu, mu = (torch.where(kept, a, 0.0) for a in (z, lam, nu, mu))
    d_z, d_lam, d_nu, d_mu = d

    def outer(a: Tensor, c: Tensor) -> Tensor:
        return a.unsqueeze(2) * c.unsqueeze(1)

    def at(side: Tensor, a: Tensor) -> Tensor:
        return torch.where(side, -a, 0.0 * a)

    makers: tuple[Callable[[], Tensor], ...] = (
        lambda: 0.5 * (outer(d_z, z) + outer(z, d_z)),
        lambda: d_z,
        lambda: outer(lam, d_z) + outer(d_lam, z),
        lambda: at(lam < 0, d_lam),
        lambda: at(lam > 0, d_lam),
        lambda: outer(nu, d_z) + outer(d_nu, z),
        lambda: -d_nu,
        lambda: at(mu < 0, d_mu),
        lambda: at(mu > 0, d_mu),
    )
    gradients: list[Tensor | None] = []
    for needed, size, make in zip(ctx.needs_input_grad, ctx.sizes, makers, strict=False):
        if not needed:
            gradients.append(None)
        elif 0 in size[1:] and all(isinstance(s, int) for s in size[1:]):
            gradients.append(z.new_zeros(size))
        else:
            # Of a shared datum the sum over the batch.
            shared = isinstance(size[0], int) and size[0] == 1
            gradients.append(make().sum(0, keepdim=True) if shared else make())
    return (*gradients, None, None, None)


def _refuse_second(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "QPLayer can be differentiated once, got a request for a second derivative: take the penalty or Hessian of "
        "something else, or detach its gradient."
    )


qp_solve.register_autograd(_backward, setup_context=_setup)
qp_adjoint.register_autograd(_refuse_second)


# ---------------------------------------------------------------- vmap: its dimension E is folded into the batch


def _folded(arguments: Sequence[Any], in_dims: Sequence[int | None], E: int, B: int, each: Sequence[int]) -> list[Any]:
    """[E, B, ...] -> [E·B, ...] for every tensor.

    What has no E and a leading axis of 1 stays shared, but for the arguments `each`, which the operator does not share.
    """
    folded: list[Any] = []
    for i, (a, dim) in enumerate(zip(arguments, in_dims, strict=True)):
        if not isinstance(a, Tensor) or (dim is None and a.shape[0] == 1 and i not in each):
            folded.append(a)
            continue
        a = a.unsqueeze(0) if dim is None else a.movedim(dim, 0)
        folded.append(a.expand(E, B, *a.shape[2:]).reshape(E * B, *a.shape[2:]))
    return folded


def _unfolded(outputs: Sequence[Tensor], E: int, B: int) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(a.reshape(E, B, *a.shape[1:]) for a in outputs), (0,) * len(outputs)


def _solve_under(
    operator: Callable[..., Any], info: Any, in_dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    E = info.batch_size
    B = _batch([a if d is None else a.select(d, 0) for a, d in zip(arguments[:10], in_dims, strict=False)])
    return _unfolded(operator(*_folded(arguments, in_dims, E, B, ())), E, B)


def _adjoint_under(
    operator: Callable[..., Any], info: Any, in_dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    E, z_bar = info.batch_size, arguments[8]
    B = z_bar.shape[0] if in_dims[8] is None else z_bar.movedim(in_dims[8], 0).shape[1]
    # All but Q, G, A, and cotangents without columns, have a row for each sample.
    each = [i for i, a in enumerate(arguments) if i in range(3, 9) or (i > 8 and a.shape[-1] > 0)]
    return _unfolded(operator(*_folded(arguments, in_dims, E, B, each)), E, B)


@qp_solve.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
    return _solve_under(torch.ops.icnnrt.qp_solve, info, in_dims, arguments)


@qp_adjoint.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
    return _adjoint_under(torch.ops.icnnrt.qp_adjoint, info, in_dims, arguments)


class _Adjoint(torch.autograd.Function):
    """The operator of the way back for the same; a derivative of it is refused."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return cast(tuple[Tensor, ...], torch.ops.icnnrt.qp_adjoint(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        return _refuse_second(ctx, *bars)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
        return _adjoint_under(_Adjoint.apply, info, in_dims, arguments)


class _Solve(torch.autograd.Function):
    """The operator for the transforms of torch.func, which take no derivative of one that torch.library registered."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return cast(tuple[Tensor, ...], torch.ops.icnnrt.qp_solve(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _setup(ctx, inputs, output)
        ctx.mark_non_differentiable(output[7])

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *bars)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
        return _solve_under(_Solve.apply, info, in_dims, arguments)


def differentiable(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator, also under torch.func; torch.export keeps the operator itself."""
    if torch.compiler.is_compiling():
        return cast(tuple[Tensor, ...], torch.ops.icnnrt.qp_solve(*arguments))
    return cast(tuple[Tensor, ...], _Solve.apply(*arguments))


# ---------------------------------------------------------------- TorchScript


@functools.cache
def _scripted() -> Any:
    """The operator as TorchScript's own code, differentiable by autograd.

    The answer is held fixed, and one Newton step from it, which is 0, is recorded with a fixed matrix: its derivative
    is that of the KKT conditions, so it is the adjoint, once.
    """
    solve, adjoint = qp_script()
    numbers32, numbers64 = list(precision_of(np.float32)), list(precision_of(np.float64))
    pointed_at, moved = _pointed_at, _moved

    def layer(
        Q: Tensor,
        p: Tensor,
        G: Tensor,
        h_lower: Tensor,
        h: Tensor,
        A: Tensor,
        b: Tensor,
        lower: Tensor,
        upper: Tensor,
        steps: int,
        skip: bool,
        demand: bool,
        numbers32: list[float],
        numbers64: list[float],
    ) -> Solution:
        dtype = p.dtype
        B = 1
        for size in (
            Q.size(0),
            p.size(0),
            G.size(0),
            h_lower.size(0),
            h.size(0),
            A.size(0),
            b.size(0),
            lower.size(0),
            upper.size(0),
        ):
            if size != 1:
                B = size
        n, m = p.size(1), h.size(1)
        infinity = float("inf")
        double = torch.float64
        Q, p, G = Q.to(double).expand(B, n, n), p.to(double).expand(B, n), G.to(double).expand(B, m, n)
        A, b = A.to(double).expand(B, A.size(1), n), b.to(double).expand(B, b.size(1))
        h = h.to(double).expand(B, m)
        h_lower = h_lower.to(double).expand(B, m) if h_lower.size(1) == m else torch.full_like(h, -infinity)
        lower = lower.to(double).expand(B, n) if lower.size(1) == n else torch.full_like(p, -infinity)
        upper = upper.to(double).expand(B, n) if upper.size(1) == n else torch.full_like(p, infinity)
        numbers = torch.tensor(numbers64, dtype=double, device=p.device)
        if dtype == torch.float32:
            numbers = torch.tensor(numbers32, dtype=double, device=p.device)
        # Fixed by detach, not by no_grad alone: TorchScript's optimiser takes Q.mT in there for the one outside, which
        # then has no derivative.
        fixed = Data(
            Q.detach(),
            p.detach(),
            G.detach(),
            h_lower.detach(),
            h.detach(),
            A.detach(),
            b.detach(),
            lower.detach(),
            upper.detach(),
        )
        with torch.no_grad():
            # fmt: off
            found = solve(
                fixed.Q, fixed.p, fixed.G, fixed.h_lower, fixed.h, fixed.A, fixed.b, fixed.lower, fixed.upper,
                fixed.p[:, :0], numbers, steps,
            )
            # fmt: on
        if demand:
            assert bool((found.status == 0).all()), "on_unsafe: a quadratic program has no solution that could be found"
        z, lam, nu, mu = found.z, found.lam, found.nu, found.mu
        if torch.is_grad_enabled():
            good = found.status == 0
            kept = good.unsqueeze(1)
            with torch.no_grad():
                eye = torch.eye(n, dtype=double, device=p.device)
                fixed_Q = torch.where(kept.unsqueeze(2), fixed.Q, eye)
                fixed_G = torch.where(kept.unsqueeze(2), fixed.G, 0.0)
                fixed_A = torch.where(kept.unsqueeze(2), fixed.A, 0.0)
                z, lam = torch.where(kept, found.z, 0.0), torch.where(kept, found.lam, 0.0)
                nu, mu = torch.where(kept, found.nu, 0.0), torch.where(kept, found.mu, 0.0)
            column = z.unsqueeze(2)
            r_z = 0.5 * torch.matmul(Q + Q.mT, column) + torch.matmul(G.mT, lam.unsqueeze(2))
            r_z = (r_z + torch.matmul(A.mT, nu.unsqueeze(2))).squeeze(2) + p
            bound = torch.cat([pointed_at(found.lam, h_lower, h), pointed_at(found.mu, lower, upper)], 1)
            t = torch.cat([torch.matmul(G, column).squeeze(2), z], 1) - bound
            r_nu = torch.matmul(A, column).squeeze(2) - b
            if skip:
                r_z, t, r_nu = torch.where(kept, r_z, 0.0), torch.where(kept, t, 0.0), torch.where(kept, r_nu, 0.0)
            # fmt: off
            d_z, d_lam, d_nu, d_mu = adjoint(
                fixed_Q, fixed_G, fixed_A, found.lam, found.mu, found.slack, found.box_slack, r_z, t, r_nu
            )
            # fmt: on
            moves = [moved(found.z, d_z, kept, skip), moved(found.lam, d_lam, kept, skip)]
            moves += [moved(found.nu, d_nu, kept, skip), moved(found.mu, d_mu, kept, skip)]
            z, lam, nu, mu = moves[0], moves[1], moves[2], moves[3]
        return Solution(
            z.to(dtype),
            lam.to(dtype),
            nu.to(dtype),
            mu.to(dtype),
            found.slack.to(dtype),
            found.box_slack.to(dtype),
            found.residual,
            found.status,
            found.ray.to(dtype),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(layer)
    return lambda *arguments: scripted(*arguments, numbers32, numbers64)


def _pointed_at(multiplier: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The bound that a multiplier points at; of one that is not known both, so that neither has a gradient then."""
    both = torch.where(torch.isfinite(lower), lower, 0.0) + torch.where(torch.isfinite(upper), upper, 0.0)
    known = torch.where(multiplier < 0, lower, torch.where(multiplier > 0, upper, 0.0))
    return torch.where(torch.isnan(multiplier), both, known)


def _moved(value: Tensor, d: Tensor, kept: Tensor, skip: bool) -> Tensor:
    """value with the derivative of d; where not kept with that of 0 or, unless `skip`, of NaN."""
    still = d - d.detach()
    if not skip:
        # √0 has the derivative ∞, and ∞·0 is NaN.
        poison = torch.where(kept, 1.0, 0.0 * still).sqrt()
        return value + torch.where(kept, still, poison)
    return value + torch.where(kept, still, 0.0)
