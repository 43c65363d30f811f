"""What the networks of the paper share: a path of z over layers, f from its context, weights that stay non-negative."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icnnrt.arguments import integer, refused, shown
from icnnrt_models.networks.activations import ConvexActivation, convex_activation
from icnnrt_models.networks.initialisation import Moments, draw_nonnegative, nonnegative_law, skip_share
from icnnrt_models.networks.nonnegative import NonNegativeLinear, Positivity, check_positivity


class ConvexNetwork(nn.Module, ABC):
    """f(x, y) = value(context(x), y), convex in y; `layers` hold W^(z) as `NonNegativeLinear`, but the first."""

    layers: nn.ModuleList

    def __init__(
        self, x_dim: int, y_dim: int, hidden: Sequence[int], activation: str | ConvexActivation, positivity: Positivity
    ) -> None:
        super().__init__()
        self.x_dim = x_dim
        self.y_dim = integer(y_dim, "y_dim", 1, remedy="give the number of columns of y")
        self.hidden = check_widths("hidden", hidden)
        self.positivity = check_positivity(positivity)
        self.activation = convex_activation(activation)

    def forward(self, x: Float[Tensor, "batch x_dim"], y: Float[Tensor, "batch y_dim"]) -> Float[Tensor, " batch"]:
        """f(x, y)."""
        return self.value(self.context(x), y)

    @abstractmethod
    def context(self, x: Float[Tensor, "batch x_dim"]) -> tuple[Tensor, ...]:
        """All that depends on x alone."""

    @abstractmethod
    def value(self, context: tuple[Tensor, ...], y: Float[Tensor, "batch y_dim"]) -> Float[Tensor, " batch"]:
        """f(x, y) from context(x)."""

    def project_(self) -> None:
        """W_i^(z) <- max(W_i^(z), 0) under positivity="projection"; nothing to do under "softplus"."""
        for _, linear in self._z_maps():
            linear.project_()

    def nonnegative_weights(self) -> tuple[str, ...]:
        """The `state_dict` names of W_1^(z) .. W_{k−1}^(z) under "projection", none under "softplus"."""
        return tuple(f"{name}.weight" for name, linear in self._z_maps() if linear.positivity == "projection")

    def _z_maps(self) -> list[tuple[str, NonNegativeLinear]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, NonNegativeLinear)]


def draw_z_path(
    W_z: NonNegativeLinear | None, b: Tensor, moments: Moments, z_maps: int, generator: torch.Generator | None
) -> float:
    """Draw W^(z) and b of one of the `z_maps` layers, and return the share v of variance that is left to its skips."""
    if W_z is None:
        b.zero_()
        return 1.0
    law = nonnegative_law(W_z.in_features, moments)
    v = skip_share(W_z.in_features, law, z_maps)
    W_z.set_weight_(math.sqrt(1 - v) * draw_nonnegative((W_z.out_features, W_z.in_features), law, generator))
    b.fill_(math.sqrt(1 - v) * law.bias)
    return v


# --- Arguments -----------------------------------------------------------------------------------


def check_widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    """The layer widths as a tuple, each an integer >= 1."""
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise refused(name, "a sequence of layer widths", shown(widths), f"write {name}=(200, 200), or () for no layer")
    remedy = "give every hidden layer at least one unit"
    return tuple(integer(width, f"{name}[{i}]", 1, remedy=remedy) for i, width in enumerate(widths))


def check_place(dtype: Any, device: Any, generator: Any) -> None:
    """Refuse what torch cannot make parameters of, or draw them from."""
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise refused("dtype", "a float dtype of torch, or None", shown(dtype), "give torch.float32 or torch.float64")
    try:
        torch.device("cpu" if device is None else device)
    except Exception as error:
        raise refused("device", "a device of torch, or None", shown(device), "name one such as 'cpu'") from error
    if not (generator is None or isinstance(generator, torch.Generator)):
        remedy = "give torch.Generator().manual_seed(0)"
        raise refused("generator", "a torch.Generator, or None", shown(generator), remedy)


def check_input(name: str, tensor: Tensor, width: int, like: Tensor) -> None:
    """Refuse an input that is not [batch, width] in the dtype of the parameter `like`.

    Only static sizes are looked at: a comparison of batch sizes would specialise the batch of an exported graph.
    """
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        # In a trace sizes are traced values, and a branch on one would be recorded as a constant.
        return
    if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.shape[1] != width:
        single = isinstance(tensor, Tensor) and tensor.dim() == 1
        remedy = "add the batch dimension with .unsqueeze(0)" if single else "pass one row per sample"
        raise refused(name, f"a tensor of shape [batch, {width}]", shown(tensor), remedy)
    if tensor.dtype != like.dtype and not torch.is_autocast_enabled(tensor.device.type):
        remedy = f"convert {name} with .to({like.dtype}), or build the energy with dtype={tensor.dtype}"
        raise refused(name, f"the dtype of the weights, {like.dtype}", tensor.dtype, remedy)


def check_context(context: tuple[Tensor, ...], length: int) -> None:
    """Refuse a context that another energy made."""
    if not isinstance(context, tuple) or len(context) != length:
        came = f"{len(context)} of them" if isinstance(context, tuple) else shown(context)
        remedy = "pass the result of context(x) unchanged"
        raise refused("context", f"the {length} tensors that context(x) of this energy returns", came, remedy)
