"""Losses on y* for training graphs: the loss and its gradient ȳ, as an ONNX graph."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor
from torch.func import grad

from icnnrt import arguments
from icnnrt.errors import ExportError
from icnnrt_exporters.graphs.onnx_head import to_onnx
from icnnrt_exporters.tracing.heads import Input, trace
from icnnrt_exporters.tracing.place import first_line, kind_and_line

Loss = Callable[[Tensor, Tensor], Tensor]

ROWS: Final = 11  # in the batch that is traced: no size that a shape is likely to have
# Largest relative difference from torch, in value and gradient: the rounding of sums and of powers.
PARITY: Final = {torch.float64: 1e-9, torch.float32: 1e-4}
HUBER_DELTA: Final = 0.1  # entries of y lie in [0, 1], so a delta of 1 would never leave the quadratic part


def squared_error(y: Tensor, target: Tensor) -> Tensor:
    """mean (y − target)², over samples and entries."""
    return (y - target).square().mean()


def binary_cross_entropy(y: Tensor, target: Tensor) -> Tensor:
    """−mean [t log y + (1 − t) log(1 − y)], over samples and entries, t in [0, 1].

    y counts as at least ε from 0 and 1, ε = 1e-6 in float32 and 1e-12 in float64: a saturated entry has a finite loss.
    """
    edge = 1e-6 if y.dtype == torch.float32 else 1e-12
    p = y.clamp(edge, 1.0 - edge)
    return -(target * p.log() + (1.0 - target) * (1.0 - p).log()).mean()


def huber(y: Tensor, target: Tensor) -> Tensor:
    """mean of ½ d² where d = |y − target| <= 0.1, and of 0.1 (d − 0.05) beyond: outliers count linearly."""
    d = (y - target).abs()
    inner = d.clamp(max=HUBER_DELTA)
    return (inner * (d - 0.5 * inner)).mean()


LOSSES: Final[Mapping[str, Loss]] = MappingProxyType(
    {"squared_error": squared_error, "binary_cross_entropy": binary_cross_entropy, "huber": huber}
)


def named(loss: str | Loss) -> tuple[str, Loss]:
    """The name a package shows for a loss, and the function."""
    if not callable(loss):
        also, remedy = "a function (y, target) -> loss", "write it in torch if it is another one"
        name = arguments.choice(loss, "loss", tuple(LOSSES), remedy, also=also, kind=ExportError)
        return name, LOSSES[name]
    name = getattr(loss, "__name__", type(loss).__name__)
    ours = LOSSES.get(name, loss) is loss
    return (name if name.isidentifier() and ours else "custom"), loss


def loss_graph(loss: Loss, y: Tensor, target: Tensor) -> ir.Model:
    """y [B, n], target [B, ...] -> loss [], ȳ = ∂loss/∂y [B, n]. A loss for each sample, [B], is averaged.

    Traced, translated, and compared with torch on random y and the given targets, in batches of two sizes: an operator
    of the user's loss that were translated wrongly would train towards something else, and nothing would show it.
    """

    def mean(y: Tensor, target: Tensor) -> Tensor:
        value = loss(y, target)
        return value.mean() if value.dim() else value

    def aside(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        value = mean(y, target)
        return value, value

    def head(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        y_bar, value = grad(aside, has_aux=True)(y, target)
        return value, y_bar

    T = y.dtype
    y, target = y[:1].expand(ROWS, -1).contiguous(), target.detach()
    rows = target[:1].expand(ROWS, *target.shape[1:]).contiguous()
    _check_loss(loss, y, rows)
    try:
        model = to_onnx(trace(head, [Input("loss/y", y, 0), Input("target", rows, 0)], ["loss", "loss/y_bar"]))
    except Exception as error:
        reason = str(error).removeprefix("energy: ") if isinstance(error, ExportError) else first_line(error)
        reason = " ".join(reason.replace(". ", "; ").split())
        raise ExportError(f"loss: it does not export ({reason}); write it with operators of torch alone") from error

    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for B in (ROWS, 3):
        t = target[torch.arange(B) % len(target)]
        leaf = torch.rand(B, y.shape[1], generator=generator, dtype=torch.float64).to(T).requires_grad_()
        value = mean(leaf, t)
        (y_bar,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
        found = session.run(["loss", "loss/y_bar"], {"loss/y": leaf.detach().numpy(), "target": t.numpy()})
        for true, came, least in zip((value.detach(), y_bar), map(torch.from_numpy, found), (1.0, 1e-6), strict=True):
            apart = float((came - true).abs().nan_to_num(0.0).max())
            scale = max(least, float(true.abs().nan_to_num(0.0).max()))
            if (came.isnan() != true.isnan()).any() or apart > PARITY[T] * scale:
                raise ExportError(
                    f"loss: what ONNX computes of {B} samples differs from torch (by {apart:.1e}); write it with other "
                    "operators of torch"
                )
    return model


def _check_loss(loss: Loss, y: Tensor, target: Tensor) -> None:
    """It takes such a batch, and gives what can be followed."""
    try:
        value = loss(y.detach().clone().requires_grad_(), target)
    except Exception as error:
        raise ExportError(
            f"loss: it fails on y {list(y.shape)} and target {list(target.shape)} ({kind_and_line(error)}); "
            "give target_example in the shape and dtype that it takes"
        ) from error
    batch = isinstance(value, Tensor) and tuple(value.shape) in ((), (len(y),))
    if not isinstance(value, Tensor) or not batch or not value.is_floating_point():
        came = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        scalar = "a float scalar or one number for each sample"
        raise arguments.refused("loss", scalar, came, "average over the entries", kind=ExportError)
    if not value.requires_grad:
        expected, remedy = "a function of y that torch can differentiate", "remove detach(), rounding and comparisons"
        raise arguments.refused("loss", expected, "one that y does not reach", remedy, kind=ExportError)
