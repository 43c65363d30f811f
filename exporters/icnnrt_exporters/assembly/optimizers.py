"""First-order optimisers written out in ONNX operators; the update rules, and their symbols, are torch.optim's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

import onnx_ir as ir

from icnnrt import arguments
from icnnrt.errors import ExportError
from icnnrt_exporters.surgery import Ops


class Step(NamedTuple):
    """What every weight's update of one step shares; scalars in the weights' dtype."""

    op: Ops
    T: ir.DataType
    learning_rate: ir.Value
    t: ir.Value  # float64: which step this is, from 1

    def scalar(self, value: float) -> ir.Value:
        return self.op.constant(value, self.T)

    def decayed(self, beta: float) -> ir.Value:
        """1 − βᵗ, float64."""
        double = ir.DataType.DOUBLE
        return self.op("Sub", self.op.constant(1.0, double), self.op("Pow", self.op.constant(beta, double), self.t))


class Optimizer(Protocol):
    """State slots, named as torch.optim names them, and the update of one weight."""

    slots: ClassVar[tuple[str, ...]]

    def update(
        self, step: Step, w: ir.Value, g: ir.Value, state: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]: ...


_check = partial(arguments.number, least=0.0, remedy="0 turns momentum and decay off", kind=ExportError)


@dataclass(frozen=True)
class SGD:
    """b <- μ b + g,  θ <- θ − lr b;  with weight decay λ, g includes λ θ.  μ = `momentum`."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __post_init__(self) -> None:
        _check(self.momentum, "momentum", below=1.0)
        _check(self.weight_decay, "weight_decay")

    def update(
        self, step: Step, w: ir.Value, g: ir.Value, state: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        op = step.op
        if self.weight_decay:
            g = op("Add", g, op("Mul", step.scalar(self.weight_decay), w))
        # torch starts with b = g, which is what b = 0 gives.
        b = op("Add", op("Mul", step.scalar(self.momentum), state[0]), g)
        return op("Sub", w, op("Mul", step.learning_rate, b)), [b]


@dataclass(frozen=True)
class Adam:
    """m <- β₁ m + (1−β₁) g,  v <- β₂ v + (1−β₂) g²,  θ <- θ − lr m̂ / (√v̂ + ε),  m̂ = m/(1−β₁ᵗ),  v̂ = v/(1−β₂ᵗ).

    Kingma and Ba (2015). With weight decay λ, g includes λ θ.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __post_init__(self) -> None:
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            came = arguments.shown(self.betas)
            raise arguments.refused("betas", "a tuple of two numbers", came, "(0.9, 0.999) is usual", kind=ExportError)
        for i, beta in enumerate(self.betas):
            _check(beta, f"betas[{i}]", below=1.0)
        _check(self.eps, "eps")
        _check(self.weight_decay, "weight_decay")

    def update(
        self, step: Step, w: ir.Value, g: ir.Value, state: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        op = step.op
        if self.weight_decay:
            g = op("Add", g, op("Mul", step.scalar(self.weight_decay), w))
        return self.descend(step, w, g, state)

    def descend(
        self, step: Step, w: ir.Value, g: ir.Value, state: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        op, (beta_1, beta_2) = step.op, self.betas
        m = op("Add", op("Mul", step.scalar(beta_1), state[0]), op("Mul", step.scalar(1.0 - beta_1), g))
        g2 = op("Mul", g, g)
        v = op("Add", op("Mul", step.scalar(beta_2), state[1]), op("Mul", step.scalar(1.0 - beta_2), g2))
        # Bias corrections are close to 0 / 0 at first, so they are formed in float64.
        rate = op("Div", step.learning_rate, op("Cast", step.decayed(beta_1), to=step.T))
        root = op("Cast", op("Sqrt", step.decayed(beta_2)), to=step.T)
        denominator = op("Add", op("Div", op("Sqrt", v), root), step.scalar(self.eps))
        return op("Sub", w, op("Mul", rate, op("Div", m, denominator))), [m, v]


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam on g alone, after θ <- θ (1 − lr λ): decoupled weight decay, Loshchilov and Hutter (2019)."""

    weight_decay: float = 1e-2

    def update(
        self, step: Step, w: ir.Value, g: ir.Value, state: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        op = step.op
        kept = op("Sub", step.scalar(1.0), op("Mul", step.learning_rate, step.scalar(self.weight_decay)))
        return self.descend(step, op("Mul", w, kept), g, state)


AnyOptimizer: TypeAlias = SGD | Adam | AdamW

BY_NAME: dict[str, AnyOptimizer] = {"sgd": SGD(momentum=0.9), "adam": Adam(), "adamw": AdamW()}


def resolve(optimizer: str | AnyOptimizer) -> AnyOptimizer:
    """The optimizer itself, or the one of that name."""
    if isinstance(optimizer, SGD | Adam):
        return optimizer
    also = "SGD(...), Adam(...), AdamW(...)"
    return BY_NAME[arguments.choice(optimizer, "optimizer", tuple(BY_NAME), also=also, kind=ExportError)]
