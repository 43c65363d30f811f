"""A module as it is exported, for a while: in eval mode, and its gradients those at the answers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from icnnrt_models.layers.quadratic_program import QPLayer


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Every part in eval mode and no layer smoothed, and afterwards as it was."""
    modes = [(part, part.training) for part in module.modules()]
    smoothed = [(part, part.smoothing) for part, _ in modes if isinstance(part, QPLayer) and part.smoothing is not None]
    if smoothed:
        warnings.warn(
            "module: the smoothing of its QPLayer is left out of what is exported, whose gradients are those at the "
            "answers; pass smoothing=None to have the same in torch",
            stacklevel=4,
        )
    module.eval()
    for layer, _ in smoothed:
        layer.smoothing = None
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for layer, smoothing in smoothed:
            layer.smoothing = smoothing
