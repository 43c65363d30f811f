"""A zoo of energies in the styles that people write them: each a small module, and what is to be found out about it.

Nothing here depends on the dtype: `build` converts. The verdict is what an honest look at the traced graph can say of
convexity in y:

    proven     it follows from rules on the operators: affine in y, sums, non-negative weights, convex non-decreasing
               functions of what is convex, squares of what is affine, maxima, log-sum-exp
    violated   it is not convex, and points in [0, 1]^n show it
    unknown    it is convex, but for reasons that no rule on operators sees
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

Verdict = Literal["proven", "violated", "unknown"]


class Style(NamedTuple):
    make: Callable[[], nn.Module]
    verdict: Verdict
    x_shape: tuple[int, ...] = (3,)
    n: int = 4
    kind: Literal["energy", "gradient"] = "energy"


def positive_(*layers: Any) -> None:
    """Non-negative weights, in place: what training with a clamp leaves."""
    with torch.no_grad():
        for layer in layers:
            layer.weight.abs_()


class Clamped(nn.Module):
    """The plainest: clamps inside forward, and skip connections from y to every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.y0, self.y1 = nn.Linear(4, 6), nn.Linear(4, 5)
        self.x0 = nn.Linear(3, 6, bias=False)
        self.z1, self.z2 = nn.Linear(6, 5, bias=False), nn.Linear(5, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.relu(self.y0(y) + self.x0(x))
        z = F.relu(F.linear(z, self.z1.weight.clamp(min=0)) + self.y1(y))
        return F.linear(z, torch.clamp(self.z2.weight, min=0.0), self.z2.bias).squeeze(-1)


class Gated(nn.Module):
    """A partially convex network with gates from x and batch norm on the x path."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3))
        self.y_gate, self.y0, self.b0 = nn.Linear(3, 4), nn.Linear(4, 6, bias=False), nn.Linear(3, 6)
        self.z_gate, self.z1, self.y1 = nn.Linear(6, 6), nn.Linear(6, 1, bias=False), nn.Linear(4, 1)
        positive_(self.z1)
        norm = self.u[1]
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u = self.u(x)
        z = F.softplus(self.y0(y * self.y_gate(x)) + self.b0(x))
        return (self.z1(z * F.relu(self.z_gate(u))) + self.y1(y))[:, 0]


class Normed(nn.Module):
    """Layer norm and GELU on the x path, ELU on the y path."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.Mish())
        self.y, self.z = nn.Linear(4, 8), nn.Linear(8, 8)
        positive_(self.z)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.elu(self.z(F.elu(self.y(y) + self.x(x)))).sum(dim=1)


class Recurrent(nn.Module):
    """A GRU reads the context; its last state moves a CELU network."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 5, batch_first=True)
        self.y, self.z = nn.Linear(4, 5), nn.Linear(5, 1)
        positive_(self.z)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _, h = self.gru(x)
        return self.z(F.celu(self.y(y) + h[-1], alpha=0.7)).squeeze(1)


class RecurrentCell(nn.Module):
    """The same by hand, with a cell and a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 5)
        self.y = nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return F.softplus(self.y(y) + h, beta=3.0).mean(1)


class ConvolutionalContext(nn.Module):
    """Images as context: strided and padded convolutions, batch norm, mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.LeakyReLU(0.2),
            nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
            nn.Conv2d(4, 3, (2, 1), dilation=(1, 2)),
            nn.Flatten(),
        )
        self.x, self.y = nn.LazyLinear(6), nn.Linear(4, 6)
        self.forward(torch.zeros(1, 2, 7, 7), torch.zeros(1, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.leaky_relu(self.y(y) + self.x(self.features(x)), 0.1).sum(1)


class GroupedContext(nn.Module):
    """Depthwise convolutions, group norm, SiLU, max pooling and adaptive pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=4, padding_mode="reflect"),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.MaxPool2d(2, padding=1),
            nn.Conv2d(8, 4, 1, groups=2),
            nn.AdaptiveAvgPool2d((2, 3)),
            nn.Flatten(),
        )
        self.x, self.y = nn.Linear(24, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.logsumexp(self.y(y) + self.x(self.features(x)), dim=1)


class DecodedContext(nn.Module):
    """A decoder on the x path: transposed convolutions, interpolation, replicated borders, global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.mix = nn.Conv1d(4, 4, 3, padding=1, padding_mode="replicate")
        self.y = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.interpolate(F.selu(self.up(x)), scale_factor=2.0, mode="linear")
        h = torch.sigmoid(self.mix(h)).amax(2) + F.adaptive_avg_pool1d(h, 1).squeeze(2)
        return (F.relu(self.y(y) + h) ** 2).sum(1)


class ImageEnergy(nn.Module):
    """Convolutions over y itself, as for image completion: strided, grouped, max and mean pooling, non-negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.x = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(3, 4)
        self.second, self.last = nn.Conv2d(4, 4, 2, stride=2, padding=1, groups=2), nn.Linear(4, 1)
        positive_(self.second, self.last)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.softplus(self.first(y.reshape(-1, 1, 4, 4)) + self.x(x)[:, :, None, None])
        z = F.max_pool2d(F.relu(self.second(z) - 0.5), 2, stride=1)
        return self.last(F.avg_pool2d(z, 2).mean((2, 3))).view(-1)


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight


class Softened(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


class Parametrised(nn.Module):
    """torch's parametrisations keep the weights non-negative."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.x = nn.Linear(4, 6), nn.Linear(3, 6)
        self.z1, self.z2 = nn.Linear(6, 6), nn.Linear(6, 1)
        parametrize.register_parametrization(self.z1, "weight", Softened())
        parametrize.register_parametrization(self.z2, "weight", Squared())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.softplus(self.y(y) + self.x(x).tanh())
        return self.z2(F.softplus(self.z1(z)))


class WeightNormed(nn.Module):
    """Weight norm and spectral norm, non-negative weights as exponentials."""

    def __init__(self) -> None:
        super().__init__()
        self.x = parametrizations.spectral_norm(nn.Linear(3, 6))
        self.y = parametrizations.weight_norm(nn.Linear(4, 6))
        self.log_z = nn.Parameter(torch.randn(6, 6) * 0.3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.relu(self.y(y) + torch.sin(self.x(x)))
        return F.softplus(z @ self.log_z.exp().T).sum(1)


class InPlace(nn.Module):
    """In-place activations, sums and assignments to slices."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.x, self.z = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 6)
        positive_(self.z)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.x(x).relu_()
        z = self.y(y)
        z += h
        z.relu_()
        w = torch.zeros_like(z)
        w[:, :3] = z[:, 3:]
        w[:, 3:].add_(z[:, :3])
        w = F.relu(self.z(w), inplace=True)
        return w.sum(1).mul_(0.1).add_(x[:, 0] ** 3)


class LeakySquared(nn.Module):
    """leaky_relu² on the first layer, which is affine in y: its slope never falls. Later ones have leaky ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.x, self.z = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 3)
        positive_(self.z)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.leaky_relu(self.y(y) + self.x(x), negative_slope=0.2) ** 2
        return F.leaky_relu(self.z(z), negative_slope=0.3).sum(1)


class SoftplusSquared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.y, self.x, self.z = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 3)
        positive_(self.z)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.softplus(self.z(F.softplus(self.y(y) + self.x(x)).square())).square().sum(1)


class ReHU(nn.Module):
    """Rectified Huber units: 0, then s²/2δ, then s − δ/2."""

    def __init__(self, delta: float = 0.7) -> None:
        super().__init__()
        self.delta = delta
        self.y, self.x, self.z = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 3)
        positive_(self.z)

    def rehu(self, s: Tensor) -> Tensor:
        quadratic = s * s / (2.0 * self.delta)
        return torch.where(s <= 0, torch.zeros_like(s), torch.where(s < self.delta, quadratic, s - self.delta / 2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rehu(self.z(self.rehu(self.y(y) + self.x(x)))).sum(1)


class LearnedSlopes(nn.Module):
    """PReLU with one learned slope a channel, all in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.x, self.z, self.act = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 1), nn.PReLU(6)
        positive_(self.z)
        with torch.no_grad():
            self.act.weight.uniform_(0, 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.z(self.act(self.y(y) + self.x(x))).squeeze(1)


class Selu(nn.Module):
    """SELU's slope falls at zero, from 1.76 to 1.05: not convex."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.selu(2.0 * y - 1.0 + 0.1 * self.x(x).tanh()).sum(1)


class LogSumExp(nn.Module):
    """Soft maxima of affine pieces, and a log-add-exp of two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces, self.others, self.x = nn.Linear(4, 12), nn.Linear(4, 2), nn.Linear(3, 12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pieces = (self.pieces(y) + self.x(x)).view(-1, 3, 4)
        two = self.others(y)
        return torch.logsumexp(5.0 * pieces, dim=(1, 2)) / 5.0 + torch.logaddexp(two[:, 0], two[:, 1])


class MaxAffine(nn.Module):
    """Maxima over pieces, in the three ways torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces, self.x = nn.Linear(4, 12), nn.Linear(3, 12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pieces = (self.pieces(y) + self.x(x)).unflatten(1, (3, 4))
        z = pieces.max(dim=1).values
        return torch.maximum(z[:, 0], z[:, 1]) + pieces.amax(dim=(1, 2)) + z[:, 2:].max(-1)[0]


class HingeSpline(nn.Module):
    """A learned convex spline for every entry: hinges at fixed knots with non-negative weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-1, 2, 7))
        self.weight, self.mix, self.x = nn.Parameter(torch.randn(5, 7)), nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = self.mix(y) + 0.3 * self.x(x)
        hinges = F.relu(s[..., None] - self.knots)
        return (hinges * F.softplus(self.weight)).sum((1, 2))


class TableSpline(nn.Module):
    """The same by looking segments up: slopes that rise from knot to knot make it convex, which no operator shows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-1, 2, 7))
        self.rise, self.mix = nn.Parameter(torch.randn(8)), nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = self.mix(y) + x[:, :1]
        slopes = torch.cumsum(F.softplus(self.rise), 0)
        steps = torch.cat([self.knots.new_zeros(1), slopes[1:-1] * (self.knots[1:] - self.knots[:-1])])
        values = torch.cat([self.knots.new_zeros(1), torch.cumsum(steps, 0)])
        segment = torch.bucketize(s.detach(), self.knots)
        start = torch.cat([self.knots[:1], self.knots])
        return (values[segment] + slopes[segment] * (s - start[segment])).sum(1)


class Quadratics(nn.Module):
    """Dense layers with low-rank quadratic skips from y, and a full-rank one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.low0, self.low1 = nn.Parameter(torch.randn(6, 2, 4) * 0.5), nn.Parameter(torch.randn(5, 2, 4) * 0.5)
        self.y0, self.y1, self.z1 = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(6, 5, bias=False)
        self.x, self.factor = nn.Linear(3, 6), nn.Parameter(torch.randn(4, 4))
        positive_(self.z1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        quadratic = torch.einsum("bi,hri->bhr", y, self.low0).pow(2).sum(-1)
        z = F.softplus(quadratic + self.y0(y) + self.x(x))
        z = F.softplus(self.z1(z) + torch.einsum("bi,hri->bhr", y, self.low1).square().sum(2) + self.y1(y))
        L = torch.tril(self.factor, -1) + torch.diag_embed(F.softplus(torch.diagonal(self.factor)))
        return z.sum(1) + 0.5 * ((y - 0.5) @ L).square().sum(1)


class Scalars(nn.Module):
    """Numbers that float32 cannot hold, in every place where an operator takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.x = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5)), nn.Linear(3, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = torch.addmm(self.bias, y, self.weight, beta=0.1, alpha=1.0 / 3.0)
        s = torch.add(s, self.x(x), alpha=0.7)
        z = F.softplus(s, beta=1.1, threshold=40.0) + F.elu(s, alpha=0.3) + F.hardtanh(s, 0.1, math.inf)
        z = (z.clamp(min=0.2) + 1e-3) ** 1.7
        return 0.1 * z.sum(1) + torch.where(y > 0.3, y - 0.3, 0.1 * (y - 0.3)).sum(1) + (1.1 - y).clamp(0.1).sum(1)


class Hypernetwork(nn.Module):
    """x makes the weights of the network of y."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4 * 6), nn.Linear(3, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        W = self.first(x).view(x.size(0), 6, 4)
        z = F.softplus(torch.bmm(W, y.unsqueeze(2)).squeeze(2))
        return (z * F.softplus(self.second(x))).sum(1)


class AttentiveContext(nn.Module):
    """A transformer layer reads a set of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True, activation="gelu")
        self.y = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.softplus(self.y(y) + self.layer(x).mean(1)).sum(1)


class Rearranged(nn.Module):
    """Split, stack, flip, roll, repeat and index by a buffer, on both paths."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.y, self.x = nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = y[:, self.order].chunk(2, dim=1)
        both = torch.cat([a.flip(1), torch.stack([b, a], dim=2).flatten(1), b.roll(1, 1)], dim=-1)
        z = F.relu(self.y(both) + self.x(x.repeat(1, 2)))
        first, *_, last = z.split([1, 2, 3], dim=1)
        return first.squeeze(1) + torch.narrow(last, 1, 1, 2).sum(1)


class Norms(nn.Module):
    """Norms and their smooth kin: √(1 + s²), log cosh, ‖s‖, |s|, Huber, total variation."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.x = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = self.y(y) + self.x(x)
        variation = (y[:, 1:] - y[:, :-1]).abs().sum(1)
        huber = F.huber_loss(s, torch.zeros_like(s), reduction="none", delta=0.3).sum(1)
        return torch.sqrt(1 + s**2).sum(1) + s.cosh().log().sum(1) + s.norm(dim=1) + variation + huber


class ErrorFunction(nn.Module):
    """s·erf(s) + e^{−s²}/√π, whose slope erf(s) rises: convex, by an integral and not by its operators."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.x = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = 2.0 * (self.y(y) + self.x(x))
        return (s * torch.erf(s) + torch.exp(-s * s) / math.sqrt(math.pi)).sum(1)


class LargestSum(nn.Module):
    """The sum of the two largest of five affine pieces, and of sorted ones with falling weights."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.x = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = self.y(y) + self.x(x)
        weights = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1], dtype=y.dtype)
        return s.topk(2, dim=1).values.sum(1) + (s.sort(dim=1, descending=True).values * weights).sum(1)


class Tied(nn.Module):
    """One matrix under two names, and a buffer of float constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("temperature", torch.tensor(0.1))
        positive_(self.a)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.softplus(self.a(y) + x.mean(1, keepdim=True))
        return F.softplus(self.b(z) / self.temperature).sum(1) * self.temperature


class Column(nn.Module):
    """Returns [B, 1], as a last linear layer does; batch norm on the y path in its eval form, which is affine."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Softplus(threshold=50.0), nn.Linear(6, 1))
        positive_(self.net[3])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat((x, y), dim=1))


class NegativeWeights(nn.Module):
    """Trained without a clamp: large negative weights on the z path."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.x, self.z = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 1)
        with torch.no_grad():
            self.z.weight.copy_(-self.z.weight.abs() - 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.z(F.softplus(4 * self.y(y) + self.x(x))).squeeze(1)


class Penalised(nn.Module):
    """A penalty instead of a clamp: one weight of the z path stayed below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.z = nn.Linear(4, 6), nn.Linear(6, 1)
        positive_(self.z)
        with torch.no_grad():
            self.z.weight.mul_(0.05)
            self.z.weight[0, 2] = -0.4
            self.y.weight[2] = torch.tensor([5.0, -5.0, 5.0, -5.0])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.z(F.softplus(self.y(y))).squeeze(1) + 0.1 * x.sum(1)


class Concave(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.sum(1) - ((y - 0.3) ** 2).sum(1)


class Unused(nn.Module):
    """A layer with negative weights that the result does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.x, self.z, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 1), nn.Linear(6, 2)
        positive_(self.z)
        with torch.no_grad():
            self.head.weight.fill_(-2.0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = F.relu(self.y(y) + self.x(x))
        self.head(z)
        return self.z(z).squeeze(1)


class Muted(nn.Module):
    """A dead layer: negative weights into units that nothing listens to."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.z1, self.z2 = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 1)
        positive_(self.z1, self.z2)
        with torch.no_grad():
            self.z1.weight[1:3] = -3.0
            self.z2.weight[0, 1:3] = 0.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.z2(F.softplus(self.z1(F.softplus(self.y(y) + x[:, :1])))).squeeze(1)


class GradientMap(nn.Module):
    """g = Vᵀ σ(V y + b(x)) + y/10, the gradient of a sum of softplus: its Jacobian is Vᵀ D V + 1/10."""

    def __init__(self) -> None:
        super().__init__()
        self.V, self.x = nn.Parameter(torch.randn(6, 4)), nn.Linear(3, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(y @ self.V.T + self.x(x)) @ self.V + 0.1 * y


class Monotone(nn.Module):
    """g = A σ(W y) with A unlike Wᵀ: no gradient of anything, as its Jacobian shows."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.A = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.A(torch.tanh(self.W(y) + x[:, :1]))


ZOO: dict[str, Style] = {
    "clamped": Style(Clamped, "proven"),
    "gated": Style(Gated, "proven"),
    "normed": Style(Normed, "proven"),
    "recurrent": Style(Recurrent, "proven", x_shape=(3, 2)),
    "recurrent_cell": Style(RecurrentCell, "proven", x_shape=(3, 2)),
    "convolutional_context": Style(ConvolutionalContext, "proven", x_shape=(2, 7, 7)),
    "grouped_context": Style(GroupedContext, "proven", x_shape=(4, 5, 6)),
    "decoded_context": Style(DecodedContext, "proven", x_shape=(2, 4)),
    "image_energy": Style(ImageEnergy, "proven", n=16),
    "parametrised": Style(Parametrised, "proven"),
    "weight_normed": Style(WeightNormed, "proven"),
    "in_place": Style(InPlace, "proven"),
    "leaky_squared": Style(LeakySquared, "proven"),
    "softplus_squared": Style(SoftplusSquared, "proven"),
    "rehu": Style(ReHU, "proven"),
    "learned_slopes": Style(LearnedSlopes, "proven"),
    "selu": Style(Selu, "violated"),
    "log_sum_exp": Style(LogSumExp, "proven"),
    "max_affine": Style(MaxAffine, "proven"),
    "hinge_spline": Style(HingeSpline, "proven"),
    "table_spline": Style(TableSpline, "unknown"),
    "quadratics": Style(Quadratics, "proven"),
    "scalars": Style(Scalars, "proven"),
    "hypernetwork": Style(Hypernetwork, "proven"),
    "attentive_context": Style(AttentiveContext, "proven", x_shape=(3, 4)),
    "rearranged": Style(Rearranged, "proven"),
    "norms": Style(Norms, "proven"),
    "error_function": Style(ErrorFunction, "unknown"),
    "largest_sum": Style(LargestSum, "unknown"),
    "tied": Style(Tied, "proven"),
    "column": Style(Column, "proven"),
    "negative_weights": Style(NegativeWeights, "violated"),
    "penalised": Style(Penalised, "violated"),
    "concave": Style(Concave, "violated"),
    "unused": Style(Unused, "proven"),
    "muted": Style(Muted, "proven"),
    "gradient_map": Style(GradientMap, "proven", kind="gradient"),
    "monotone": Style(Monotone, "violated", kind="gradient"),
}


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The network in eval mode; the same weights on every call, up to the dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        return ZOO[name].make().to(dtype).eval()


def examples(name: str, B: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [B, ...] and y [B, n], y in [0, 1] as far as every second row goes, wider in the others."""
    style, generator = ZOO[name], torch.Generator().manual_seed(seed)
    x = torch.randn(B, *style.x_shape, generator=generator, dtype=torch.float64)
    y = torch.rand(B, style.n, generator=generator, dtype=torch.float64)
    y[1::2] = 3.0 * y[1::2] - 1.0
    return x.to(dtype), y.to(dtype)
