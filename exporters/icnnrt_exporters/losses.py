"""Losses on y* for training graphs: the loss and its gradient ȳ, as a traced head."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.func import grad

from icnnrt.errors import ExportError
from icnnrt_exporters.heads import Head, Input, trace

Loss = Callable[[Tensor, Tensor], Tensor]

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
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ExportError(
                f"loss: expected one of {', '.join(LOSSES)} or a function (y, target) -> loss, got {loss!r}; "
                "write it in torch if it is another one"
            )
        return loss, LOSSES[loss]
    if not callable(loss):
        raise ExportError(f"loss: expected a name or a function (y, target) -> loss, got {type(loss).__name__}")
    name = getattr(loss, "__name__", type(loss).__name__)
    ours = LOSSES.get(name, loss) is loss
    return (name if name.isidentifier() and ours else "custom"), loss


def loss_and_gradient(loss: Loss, y: Tensor, target: Tensor) -> Head:
    """y [B, n], target [B, ...] -> loss [], ȳ = ∂loss/∂y [B, n]. A loss for each sample, [B], is averaged."""

    def mean(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(y, target)
        value = value.mean() if value.dim() else value
        return value, value

    try:
        value = loss(y.detach().clone(), target)
    except Exception as error:
        raise ExportError(
            f"loss: it fails on y {list(y.shape)} and target {list(target.shape)} ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}); give target_example in the "
            "shape and dtype that it takes"
        ) from error
    if not isinstance(value, Tensor) or value.dim() > 1 or not value.is_floating_point():
        came = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ExportError(f"loss: expected a float scalar or one number for each sample, got {came}")

    def head(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        y_bar, value = grad(mean, has_aux=True)(y, target)
        return value, y_bar

    return trace(head, [Input("loss/y", y, 0), Input("target", target, 0)], ["loss", "loss/y_bar"])
