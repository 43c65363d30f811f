"""The operators icnnrt::qp_solve and icnnrt::qp_sensitivity of torch: run, exported, differentiated, under vmap.

They are ai.icnnrt::QuadraticProgram and ::QPSensitivity, or their sparse twins with a plan; `icnnrt_exporters` turn
them into QuadraticProgram and QPAdjoint, or those twins. On the CPU icnnrt's native kernels run them, elsewhere and
where there are none `qp_script`. That is decided where they run, so torch.compile and torch.func.vmap, which see an
operator and not what is in it, change nothing about it. Every leading axis is B or 1, what is absent has no columns.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from icnnrt.arguments import refused
from icnnrt.errors import InputError
from icnnrt.mathematics.qp_adjoint import gradients
from icnnrt.mathematics.qp_data import SHAPES
from icnnrt.mathematics.qp_reference import STEPS
from icnnrt.mathematics.qp_reliability import DEPENDENT, KINK, LOST, NO_GRADIENT, OFF_PATH, dependent, moves
from icnnrt.mathematics.qp_settings import Settings
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt.mathematics.qp_tangent import tangent_residuals
from icnnrt_models.layers.kernels import Kernel, kernel, run_on
from icnnrt_models.layers.namespace import TORCH
from icnnrt_models.layers.qp_plan import plan_of
from icnnrt_models.layers.qp_script import numbers, qp_script
from icnnrt_models.layers.qp_smoothed import qp_smoothed
from icnnrt_models.layers.qp_tensors import owned

__all__ = [
    *("NAN", "RAISE", "SKIP", "TAKE", "USE"),
    *("Kernels", "differentiable", "kernels", "sparse_kernels", "untimed", "whole"),
]

Tensors = tuple[Tensor, ...]
# What becomes of samples without a gradient that can be trusted; USE is of exported graphs, in which those that are not
# solved add nothing, and others what there is. TAKE counts INACCURATE ones as solved, and takes what there is.
NAN, SKIP, RAISE, USE, TAKE = range(5)


class Kernels(NamedTuple):
    """The two operators on the CPU, numpy in and out, arguments and results in the order of ai.icnnrt's."""

    solve: Kernel  # 10 inputs -> 10 outputs; settings that are not usual, and a plan, by their names
    sensitivity: Kernel  # 12 inputs -> 6 outputs; a plan by its name


def kernels(dtype: torch.dtype) -> Kernels | None:
    """What answers on the CPU instead of torch: icnnrt's native kernels, None where there are none.

    One function to replace: `icnnrt_models.layers.qp_operators.kernels = lambda dtype: None` takes torch's solver.
    """
    return _kernels("", dtype)


def sparse_kernels(dtype: torch.dtype) -> Kernels | None:
    """Those that take a plan; asked for only where there are `kernels`."""
    return _kernels("sparse_", dtype)


def _kernels(prefix: str, dtype: torch.dtype) -> Kernels | None:
    name = str(dtype).removeprefix("torch.")
    solve, sensitivity = (kernel(f"{prefix}qp_{role}", name) for role in ("solve", "sensitivity"))
    return Kernels(solve, sensitivity) if solve and sensitivity else None


def _found(like: Tensor, plan: str) -> Kernels | None:
    """What answers for tensors like this one."""
    found = kernels(like.dtype) if like.device.type == "cpu" else None
    return sparse_kernels(like.dtype) if found is not None and plan else found


OF_ROWS = frozenset(SHAPES) - {"Q", "p"}  # the data of constraints

# --- What they compute ---------------------------------------------------------------------------


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
    unsafe: int,
    tolerance: float = 0.0,
    plan: str = "",
    smoothing: float = 0.0,
    seconds: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ai.icnnrt::QuadraticProgram, or SparseQuadraticProgram with a plan, of `qp_plan.text_of`. Of the gradient are
    `unsafe`, one of those above, and `smoothing`, 0 for none. With `seconds`, 0 for none, kernels alone answer, which
    look at the clock."""
    _demand_reverse_mode()
    data = (Q, p, G, h_lower, h, A, b, lower, upper, start)
    found = _found(p, plan)
    if found is not None:
        settings = Settings(tolerance or None, None if steps == STEPS else steps, seconds or None)
        return cast(Any, run_on(found.solve, data, settings.feeds() | _feeds(plan)))
    if seconds > 0.0:
        raise untimed("none on this machine" if p.device.type == "cpu" else f"data on {p.device.type}")
    if _batch(data) == 0:
        return cast(Any, _answers(*data))
    # Without TorchScript's optimiser, which takes a second at every new shape and gains nothing afterwards.
    with torch.no_grad(), torch.jit.optimized_execution(False):
        solution = qp_script().solve(*data, *numbers(tolerance), steps)
    kinds = {"residual": torch.float64, "status": torch.int32, "steps": torch.int32}
    return cast(Any, tuple(owned(a, kinds.get(name, p.dtype)) for name, a in solution._asdict().items()))


@torch.library.custom_op("icnnrt::qp_sensitivity", mutates_args=())
def qp_sensitivity(
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
    plan: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ai.icnnrt::QPSensitivity: d_z, d_λ, d_ν, d_μ, share, weak; a cotangent without columns is zero. With a plan
    as SparseQPSensitivity."""
    _demand_reverse_mode()
    data = (Q, G, A, lam, mu, slack, box_slack, status, z_bar, lam_bar, nu_bar, mu_bar)
    found = _found(z_bar, plan)
    if found is not None:
        return cast(Any, run_on(found.sensitivity, data, _feeds(plan)))
    if len(z_bar) == 0:
        return cast(Any, _cotangents(*data))
    with torch.no_grad(), torch.jit.optimized_execution(False):
        *d, share, weak = qp_script().adjoint(*data[:7], *data[8:])
    good = status == QPStatus.SOLVED
    rows = (owned(torch.where(good.unsqueeze(1), a, torch.nan), z_bar.dtype) for a in d)
    told = owned(torch.where(good, share, torch.nan), torch.float64), owned(weak, torch.int32)
    return cast(Any, (*rows, *told))


def untimed(came: str) -> InputError:
    """What is raised where seconds are limited, and nothing looks at a clock."""
    return refused("seconds", "native kernels, which look at the clock", came, "leave it out")


def _feeds(plan: str) -> dict[str, Any]:
    return {"plan": plan_of(plan)} if plan else {}


def _batch(data: Sequence[Tensor]) -> Any:
    """The largest leading axis: of all that is not shared; a symbol of a trace is none of the numbers it may be."""
    return next((a.shape[0] for a in data if not (isinstance(a.shape[0], int) and a.shape[0] == 1)), 1)


@qp_solve.register_fake
def _answers(*arguments: Any) -> Tensors:
    """Of the sizes that the answers have."""
    _demand_reverse_mode()
    data = arguments[:10]
    B, p, n, m, q = _batch(data), data[1], data[1].shape[1], data[2].shape[1], data[5].shape[1]
    floats = [p.new_empty((B, size)) for size in (n, m, q, n, m, n)]
    residual, ray = p.new_empty((B, 3), dtype=torch.float64), p.new_empty((B, 2 * n + m + q))
    status, taken = (p.new_empty((B,), dtype=torch.int32) for _ in range(2))
    return (*floats, residual, status, ray, taken)


@qp_sensitivity.register_fake
def _cotangents(*arguments: Any) -> Tensors:
    _, _, A, lam, _, _, _, _, z_bar, *_ = arguments
    B, n = z_bar.shape
    rows = (z_bar.new_empty((B, size)) for size in (n, lam.shape[1], A.shape[1], n))
    return (*rows, z_bar.new_empty((B,), dtype=torch.float64), z_bar.new_empty((B,), dtype=torch.int32))


# --- Their derivatives ---------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    Q, _, G, _, _, A, *_ = inputs
    unsafe, _, plan, smoothing, _ = inputs[11:]
    z, lam, nu, mu, slack, box_slack, _, status, _, _ = output
    ctx.set_materialize_grads(False)
    codes = status.to(torch.int32) if status.is_floating_point() else status
    if unsafe == TAKE:  # the operator differentiates what is SOLVED
        codes = torch.where(codes == QPStatus.INACCURATE, QPStatus.SOLVED, codes)
    kept = Q, G, A, z, lam, nu, mu, slack, box_slack, codes
    ctx.smoothing = smoothing
    ctx.save_for_backward(*kept, *(inputs[: len(SHAPES)] if smoothing > 0.0 else ()))
    if hasattr(ctx, "save_for_forward"):  # a registered operator has no forward mode
        ctx.save_for_forward(*kept)
        ctx.still = [(tuple(a.shape), a.dtype) for a in output[4:]]
    ctx.shapes = [tuple(a.shape) for a in inputs[: len(SHAPES)]]
    ctx.unsafe, ctx.plan = unsafe, plan


def _pull_back(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
    Q, G, A, z, lam, nu, mu, slack, box_slack, status, *data = ctx.saved_tensors
    if all(bar is None for bar in bars[:4]):
        return (None,) * 16
    z_bar, *others = (z.new_zeros((1, 0)) if bar is None else bar for bar in bars[:4])
    z_bar = torch.zeros_like(z) if bars[0] is None else z_bar
    uppers: list[Tensor] = []
    if data:
        rows = [torch.where((status == QPStatus.SOLVED).unsqueeze(1), a, torch.nan) for a in (z, lam, nu, mu)]
        z, lam, nu, mu, *d, share, upper, box_upper = smoothed(*data, *rows, z_bar, *others, ctx.smoothing)
        weak, uppers = torch.zeros_like(status), [upper, box_upper]
    else:
        *d, share, weak = adjoint(Q, G, A, lam, mu, slack, box_slack, status, z_bar, *others, ctx.plan)
        if ctx.unsafe == RAISE and _numbers_are_known():
            asked = zip(ctx.needs_input_grad, SHAPES, ctx.shapes, strict=False)
            if any(needed and name in OF_ROWS and shape[1] for needed, name, shape in asked):
                moved_share = _moved_share(Q, G, A, lam, mu, slack, box_slack, status, ctx.plan)
                _demand_independent(status, dependent(moved_share, str(z.dtype).removeprefix("torch.")))
    kept, safe = _safe(ctx.unsafe, status, share, weak, d)
    if kept is not None:
        z, lam, nu, mu, *uppers = (torch.where(kept, a, 0.0) for a in (z, lam, nu, mu, *uppers))
    found = gradients(TORCH, z, lam, nu, mu, *safe, *uppers)

    def gradient(name: str, shape: tuple[Any, ...]) -> Tensor:
        if 0 in shape[1:] and all(isinstance(size, int) for size in shape[1:]):
            return z.new_zeros(shape)
        # Of a shared datum the sum over the batch.
        shared = isinstance(shape[0], int) and shape[0] == 1
        return found[name]().sum(0, keepdim=True) if shared else found[name]()

    asked = zip(ctx.needs_input_grad, SHAPES, ctx.shapes, strict=False)
    return (*(gradient(name, shape) if needed else None for needed, name, shape in asked), *(None,) * 7)


def _safe(
    unsafe: int, status: Tensor, share: Tensor, weak: Tensor, d: Sequence[Tensor]
) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Which samples are kept, where others are left out, [B, 1], and the adjoint as it is handed out."""
    solved = (status == QPStatus.SOLVED).unsqueeze(1)
    if unsafe == USE:
        return solved, [torch.where(solved, a, 0.0) for a in d]
    if unsafe == TAKE:
        return None, d
    has = (share <= LOST[str(d[0].dtype).removeprefix("torch.")]).unsqueeze(1)
    if unsafe == RAISE:
        _demand_gradient(solved, has, share, weak)
    kept = solved & has if unsafe == SKIP else None
    return kept, [torch.where(has, a, torch.nan if kept is None else 0.0) for a in d]


def _numbers_are_known() -> bool:
    """Not while torch traces."""
    return _get_current_dispatch_mode() is None


def _moved_share(Q: Tensor, G: Tensor, A: Tensor, lam: Tensor, mu: Tensor, *others: Any) -> Tensor:
    """That of a cotangent of `qp_reliability.moves`."""
    sizes = *(M.abs().amax(2) for M in (G, A)), torch.ones_like(mu)
    moved = zip(moves(*(size.shape[1] for size in sizes)), sizes, strict=True)
    bars = [(torch.from_numpy(move).to(size) * size).expand(len(mu), len(move)) for move, size in moved]
    return adjoint(Q, G, A, lam, mu, *others[:-1], torch.zeros_like(mu), *bars, others[-1])[4]


@torch.compiler.disable
def _demand_independent(status: Tensor, depend: Tensor) -> None:
    """Raise where rows that hold z of a solved sample depend on each other."""
    bad = torch.func.debug_unwrap((status == QPStatus.SOLVED) & depend, recurse=True)
    if bad.any():
        raise InputError(f"on_unsafe: sample {int(torch.nonzero(bad)[0][0])} has KINK: {DEPENDENT}.")


@torch.compiler.disable
def _demand_gradient(solved: Tensor, has: Tensor, share: Tensor, weak: Tensor) -> None:
    """Raise where a solved sample has no gradient, or a kink; not while torch traces, where there are no numbers."""
    if not _numbers_are_known():
        return
    solved, has, share, weak = (torch.func.debug_unwrap(a, recurse=True) for a in (solved, has, share, weak))
    lost, kink = solved & ~has, solved.squeeze(-1) & (weak > 0)
    off = lost & torch.isinf(share).unsqueeze(1)
    for bad, name, why in ((off, "NO_GRADIENT", OFF_PATH), (lost, "NO_GRADIENT", NO_GRADIENT), (kink, "KINK", KINK)):
        if bad.any():
            raise InputError(f"on_unsafe: sample {int(torch.nonzero(bad)[0][0])} has {name}: {why}.")


def _push_forward(ctx: Any, *dots: Tensor | None) -> tuple[Tensor | None, ...]:
    Q, G, A, z, lam, nu, mu, slack, box_slack, status = ctx.saved_for_forward
    if ctx.smoothing > 0.0:
        raise RuntimeError(
            "QPLayer: expected no forward mode with smoothing; take the gradient in reverse, or leave it out."
        )
    moving = zip(SHAPES, dots, strict=False)
    # What is absent has no columns, and does not broadcast.
    named = {name: dot for name, dot in moving if dot is not None and dot.shape[1]}
    bars = tangent_residuals(z, lam, nu, mu, named)
    *tangents, share, weak = adjoint(Q, G, A, lam, mu, slack, box_slack, status, *bars, ctx.plan)
    _, tangents = _safe(ctx.unsafe, status, share, weak, tangents)
    return (*tangents, *(z.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.still))


def _keep_system(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *output)
    if hasattr(ctx, "save_for_forward"):
        ctx.save_for_forward(*inputs[:8], *output)
    *data, ctx.plan = inputs
    ctx.shapes = [tuple(a.shape) for a in data]


def _pull_system_back(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
    """d = −K⁻¹ v of the cotangents v, K fixed in all but Q, G and A: of d̄ it is v̄ = −K⁻¹ d̄, and K̄ = v̄ d'."""
    Q, G, A, lam, mu, slack, box_slack, status, *d, _, _ = ctx.saved_tensors
    if all(bar is None for bar in bars[:4]):
        return (None,) * 13
    back = [torch.zeros_like(a) if bar is None else bar for a, bar in zip(d, bars, strict=False)]
    *v_bar, _, _ = adjoint(Q, G, A, lam, mu, slack, box_slack, status, *back, ctx.plan)
    found = gradients(TORCH, *d, *v_bar)

    def matrix(name: str, shape: tuple[Any, ...]) -> Tensor:
        value = found[name]()
        return value.sum(0, keepdim=True) if shape[0] == 1 and value.shape[0] != 1 else value

    of_K = (matrix(name, shape) for name, shape in zip("QGA", ctx.shapes, strict=False))
    of_v = (a if shape[1] else a.new_zeros(shape) for a, shape in zip(v_bar, ctx.shapes[8:], strict=True))
    return (*of_K, None, None, None, None, None, *of_v, None)


def _push_system_forward(ctx: Any, *dots: Tensor | None) -> tuple[Tensor | None, ...]:
    """ḋ = −K⁻¹ (v̇ + K̇ d)."""
    Q, G, A, lam, mu, slack, box_slack, status, *d, share, weak = ctx.saved_for_forward
    named = {name: dot for name, dot in zip("QGA", dots, strict=False) if dot is not None and dot.shape[1]}
    d_z, d_lam, d_nu, d_mu = d
    moved = tangent_residuals(d_z, d_lam, d_nu, d_mu, named)
    terms = [a if dot is None or not dot.shape[1] else a + dot for a, dot in zip(moved, dots[8:12], strict=True)]
    *found, _, _ = adjoint(Q, G, A, lam, mu, slack, box_slack, status, *terms, ctx.plan)
    return (*found, torch.zeros_like(share), torch.zeros_like(weak))


def _refuse(*_: Any) -> Any:
    raise RuntimeError(
        "QPLayer: expected one derivative with smoothing, but a second is asked for; leave smoothing out."
    )


class _Within(threading.local):
    """How deep this thread is in an operator whose tangent is known."""

    depth = 0


_within = _Within()


def _demand_reverse_mode() -> None:
    """torch takes an operator that it knows no tangent of to have the tangent 0."""
    if not _within.depth and getattr(forward_ad, "_current_level", -1) >= 0:
        raise RuntimeError(
            "icnnrt::qp_solve: expected no forward mode, but a tangent may be asked for, and torch would take it to be "
            "0; call QPLayer without torch.compile, or take the gradient in reverse."
        )


# --- vmap: its dimension E is folded into the batch ----------------------------------------------


def _solve_folded(operator: Callable[..., Tensors], info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
    own = [a if d is None else a.select(d, 0) for a, d in zip(arguments[:10], in_dims, strict=False)]
    return _folded(operator, info.batch_size, _batch(own), in_dims, arguments, ())


def _adjoint_folded(
    operator: Callable[..., Tensors],
    info: Any,
    in_dims: Sequence[int | None],
    *arguments: Any,
    answer: int = 3,
    z_bar: int = 8,
) -> Any:
    """`answer` and `z_bar` are where these begin: samples may share what is before, the data; all else has a row for
    each, but for cotangents without columns."""
    dim, bar = in_dims[z_bar], arguments[z_bar]
    B = bar.shape[0] if dim is None else bar.movedim(dim, 0).shape[1]
    last = range(z_bar + 1, z_bar + 4)
    each = [*range(answer, z_bar + 1), *(i for i in last if arguments[i].shape[-1] > 0)]
    return _folded(operator, info.batch_size, B, in_dims, arguments, each)


def _folded(
    operator: Callable[..., Tensors],
    E: int,
    B: Any,
    in_dims: Sequence[int | None],
    arguments: Sequence[Any],
    each: Sequence[int],
) -> tuple[Tensors, tuple[int, ...]]:
    """The operator of every tensor [E, B, ...] as one of [E·B, ...].

    What has no E and a leading axis of 1 stays shared, but for the arguments `each`, which the operator does not share.
    """

    def folded(i: int, a: Any, dim: int | None) -> Any:
        if not isinstance(a, Tensor) or (dim is None and a.shape[0] == 1 and i not in each):
            return a
        a = a.unsqueeze(0) if dim is None else a.movedim(dim, 0)
        return a.expand(E, B, *a.shape[2:]).reshape(E * B, *a.shape[2:])

    found = operator(*(folded(i, a, dim) for i, (a, dim) in enumerate(zip(arguments, in_dims, strict=True))))
    return tuple(a.reshape(E, B, *a.shape[1:]) for a in found), (0,) * len(found)


# --- For autograd and torch.func -----------------------------------------------------------------


class _Rules(NamedTuple):
    """What is known of an operator's derivatives."""

    keep: Callable[..., None]
    back: Callable[..., tuple[Tensor | None, ...]]
    forward: Callable[..., tuple[Tensor | None, ...]]
    fold: Callable[..., Any]


def _registered(operator: Any, rules: _Rules) -> Any:
    """The operator with its derivatives and vmap, as a function.

    Gradients and vmap are registered for what traces the operator itself; the transforms of torch.func take no
    derivative of what torch.library registered, and forward mode asks for none.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Tensors:
            _within.depth += 1
            try:
                # Of integers torch.func makes tangents that it then refuses.
                return tuple(a if a.is_floating_point() else a.double() for a in operator(*arguments))
            finally:
                _within.depth -= 1

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
            rules.keep(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *bars: Tensor | None) -> Any:
            return rules.back(ctx, *bars)

        @staticmethod
        def jvp(ctx: Any, *dots: Any) -> Any:
            return rules.forward(ctx, *dots)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
            return rules.fold(Function.apply, info, in_dims, *arguments)

    operator.register_autograd(rules.back, setup_context=rules.keep)
    operator.register_vmap(lambda info, in_dims, *arguments: rules.fold(operator, info, in_dims, *arguments))
    return Function.apply


solve = _registered(qp_solve, _Rules(_keep, _pull_back, _push_forward, _solve_folded))
adjoint = _registered(qp_sensitivity, _Rules(_keep_system, _pull_system_back, _push_system_forward, _adjoint_folded))
smoothed = _registered(
    qp_smoothed, _Rules(lambda *_: None, _refuse, _refuse, partial(_adjoint_folded, answer=9, z_bar=13))
)


def whole(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Those of `qp_solve`, of which a graph of torch leaves out what is as by default."""
    return (*arguments, *(0.0, "", 0.0, 0.0)[len(arguments) - 12 :])


def differentiable(*arguments: Any) -> Tensors:
    """z, λ, ν, μ, slack, box_slack, residual, status, ray and steps of `qp_solve`, with a derivative.

    Eagerly and under torch.func by a `torch.autograd.Function` around the operator; under torch.compile and
    torch.export the operator itself, opaque to both, whose derivative is registered with torch.library. Either way the
    native kernels answer where they can.
    """
    arguments = whole(arguments)
    if torch.compiler.is_compiling():
        return cast(Tensors, torch.ops.icnnrt.qp_solve(*arguments))
    *answer, status, ray, taken = solve(*arguments)
    return (*answer, status.to(torch.int32), ray, taken.to(torch.int32))
