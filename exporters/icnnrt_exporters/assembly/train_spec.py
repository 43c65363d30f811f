"""What `export(..., train=TrainSpec(...))` puts into train.onnx."""

import fnmatch
import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from icnnrt import arguments
from icnnrt.arguments import shown
from icnnrt.errors import ExportError
from icnnrt.format import package
from icnnrt.format.signatures import NEW, STEP_OUTPUTS
from icnnrt_exporters.assembly.losses import Loss, named
from icnnrt_exporters.assembly.optimizers import AnyOptimizer, resolve

AdjointName = Literal["exact", "prop3"]
# Of the inputs and outputs that train.onnx has beyond those of the other graphs.
NAMES = frozenset(("target", "learning_rate", *STEP_OUTPUTS))
PREFIXES = ("state.", NEW)
refused = functools.partial(arguments.refused, kind=ExportError)
TARGET_DTYPES = (torch.float64, torch.float32, torch.int64)


@dataclass(frozen=True)
class TrainSpec:
    """One step of fine-tuning: loss of y*, exact gradient through the argmin, optimiser, projection.

    Args:
        loss: "squared_error", "binary_cross_entropy", "huber", or a torch function of y [B, n] and target [B, ...]
            that returns a scalar, or [B], which is averaged. `icnnrt_exporters.assembly.losses` states the three.
        optimizer: "sgd" (momentum 0.9), "adam", "adamw", or SGD(...), Adam(...), AdamW(...) with other settings. The
            learning rate is an input of the graph.
        weights: which weights move: "all" that require a gradient, "last" (those of the last layer), or patterns of
            state_dict names such as ["layers.2.*"]. The others stay as they are, and cost nothing.
        clip_norm: the most that the norm of the gradient of all weights together may be, as
            torch.nn.utils.clip_grad_norm_ has it; None does not clip.
        adjoint: "exact", or "prop3" (cheaper, right for piecewise-linear energies only).
        target_example: a batch of targets where they are not like y: for tracing a loss of one's own.
    """

    loss: str | Loss = "squared_error"
    optimizer: str | AnyOptimizer = "adam"
    weights: str | Sequence[str] = "all"
    clip_norm: float | None = None
    adjoint: AdjointName = "exact"
    target_example: Tensor | None = None

    def __post_init__(self) -> None:
        named(self.loss)
        resolve(self.optimizer)
        if self.clip_norm is not None:
            expected, remedy = "a positive number or None", "None does not clip"
            arguments.number(self.clip_norm, "clip_norm", above=0.0, expected=expected, remedy=remedy, kind=ExportError)
        remedy = "choose 'exact' unless the energy is piecewise linear"
        arguments.choice(self.adjoint, "adjoint", get_args(AdjointName), remedy, kind=ExportError)

    def target(self, y_example: Tensor) -> Tensor:
        """A batch of targets to trace with."""
        example = y_example if self.target_example is None else self.target_example
        if not isinstance(example, Tensor) or example.dim() < 1 or example.shape[0] == 0:
            raise refused("target_example", "a batch of one target or more", shown(example), "pass a tensor [B, ...]")
        if example.dtype not in TARGET_DTYPES:
            raise refused("target_example", "float32, float64 or int64", str(example.dtype), "convert it")
        return example

    @staticmethod
    def check_names(names: Iterable[str]) -> None:
        """No weight bears the name of an input or output of train.onnx."""
        for name in names:
            if name in NAMES or name.startswith(PREFIXES):
                raise ExportError(
                    f"energy: a weight is called {name!r}, as an input or output of the training graph is or may be; "
                    "rename it in the module"
                )

    def chosen(self, trainable: Sequence[str]) -> tuple[str, ...]:
        """The weights that move, in the order of the graph."""
        if self.weights == "all":
            chosen = list(trainable)
        elif self.weights == "last":
            chosen = _last_layer(trainable)
        else:
            listed = () if isinstance(self.weights, str) or not isinstance(self.weights, Sequence) else self.weights
            if not listed or not all(isinstance(pattern, str) for pattern in listed):
                one = isinstance(self.weights, str)
                remedy = f"write [{self.weights!r}] for one pattern" if one else "'all' trains every weight"
                raise refused("weights", "'all', 'last' or a list of patterns", repr(self.weights), remedy)
            for pattern in self.weights:
                if not any(fnmatch.fnmatchcase(name, pattern) for name in trainable):
                    raise ExportError(
                        f"weights: the pattern {pattern!r} fits none of the weights that require a gradient; they are "
                        f"{', '.join(trainable) or 'none'}"
                    )
            chosen = [name for name in trainable if any(fnmatch.fnmatchcase(name, p) for p in self.weights)]
        if not chosen:
            raise ExportError(
                "weights: no weight of the energy requires a gradient, so there is nothing to train; call "
                "requires_grad_()"
            )
        return tuple(chosen)

    def described(self, updated: tuple[str, ...], y_example: Tensor) -> package.TrainingSpec:
        """What the manifest says of it."""
        optimizer = resolve(self.optimizer)
        settings: dict[str, float] = {}
        for key, setting in asdict(optimizer).items():
            values = setting if isinstance(setting, tuple) else (setting,)
            names = [key] if len(values) == 1 else [f"{key}[{i}]" for i in range(len(values))]
            settings |= {name: float(v) for name, v in zip(names, values, strict=True)}
        target = self.target(y_example)
        return package.TrainingSpec(
            loss=named(self.loss)[0],
            optimizer=type(optimizer).__name__,
            settings=settings,
            slots=optimizer.slots,
            weights=updated,
            adjoint=self.adjoint,
            clip_norm=self.clip_norm,
            target_shape=tuple(target.shape[1:]),
            target_dtype=str(target.dtype).removeprefix("torch."),
        )


def _last_layer(names: Sequence[str]) -> list[str]:
    """The names that share the last one's layer: the innermost numbered module, or else its module alone."""
    if not names:
        return []
    parts = _place(names[-1])
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbered:
        return [name for name in names if _place(name) == parts]
    layer = parts[: numbered[-1] + 1]
    return [name for name in names if _place(name)[: len(layer)] == layer]


def _place(name: str) -> list[str]:
    """The path of the module that a parameter belongs to; torch keeps what it is made of one module further down."""
    *module, own = name.split(".")
    if own.isdigit():  # of a list of parameters
        module.append(own)
    return module[: module.index("parametrizations")] if "parametrizations" in module else module
