"""A module as it is exported, for a while: in eval mode, and its gradients those at the answers."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from torch import nn

from icnnrt_models.layers.quadratic_program import QPLayer

# Of a QPLayer what packages do not hold, and what there is instead.
LEFT_OUT: Final = {
    "smoothing": "is left out of what is exported, whose gradients are those at the answers; pass smoothing=None to "
    "have the same in torch",
    "seconds": "are left out of what is exported, as portable bodies know no clock; pass "
    "icnnrt.load(..., limits=icnnrt.Limits(seconds=...)) to end calls",
}


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Every part in eval mode and no layer with what is `LEFT_OUT`, and afterwards as it was."""
    modes = [(part, part.training) for part in module.modules()]
    layers = [part for part, _ in modes if isinstance(part, QPLayer)]
    left_out = [(layer, name, a) for layer in layers for name in LEFT_OUT if (a := getattr(layer, name)) is not None]
    for name, instead in LEFT_OUT.items():
        if any(name == other for _, other, _ in left_out):
            warnings.warn(f"module: the {name} of its QPLayer {instead}", stacklevel=4)
    module.eval()
    for layer, name, _ in left_out:
        setattr(layer, name, None)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for layer, name, value in left_out:
            setattr(layer, name, value)
