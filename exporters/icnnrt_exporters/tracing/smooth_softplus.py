"""softplus as a package computes it: log(1 + e^{βs}) / β, everywhere.

Torch's softplus is s itself where βs > threshold. At torch's own threshold of 20 that is a step down, by

    log(1 + e^−20) / β = 2.1e-9 / β,

which float32 rounds away, but float64 does not: there torch's function is not convex. The step serves torch's backward
rule, which forms e^{βs}; no graph here does. So a threshold of 20 or more counts as 37, above which the two branches
agree to the last bit of float64, in the graphs (`lowering`) and in what they are compared with (`smoothed`) alike. Both
differ from torch's function by at most 2.1e-9 / β, and their slopes by 2.1e-9, where βs > 20. A lower threshold was
chosen by somebody, and stays.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

DEFAULT: Final = 20.0  # torch's
SAME: Final = 37.0  # e^−37 < 2^−53: from here on log(1 + e^z) rounds to z


def smooth_threshold(threshold: float) -> float:
    """The threshold in its place."""
    return max(float(threshold), SAME) if threshold >= DEFAULT else float(threshold)


def smoothed(energy: nn.Module) -> nn.Module:
    """The module itself, its forward changed to compute the softplus above."""
    forward = energy.forward

    def smooth(*arguments: Any) -> Any:
        with _Smooth():
            return forward(*arguments)

    energy.forward = smooth
    return energy


class _Smooth(TorchFunctionMode):
    SOFTPLUS = (F.softplus, torch.ops.aten.softplus.default, torch.ops.aten.softplus)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in self.SOFTPLUS:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("input", "beta", "threshold"), args, strict=False)) | dict(kwargs or {})
        s = given.pop("self", given.pop("input", None))
        return func(s, given.get("beta", 1), smooth_threshold(given.get("threshold", DEFAULT)))
