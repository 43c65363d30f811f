"""The heads of an energy: the gradient map beside torch, and value with gradient beside value alone.

The network is a FICNN of softplus units without context, y [50], hidden 64×4, float32: y -> ∇f(y), the map of optimal
transport. `gradient` is `session.gradient` as Python calls it, with all checks; `bound` the same graph by io-binding;
`torch eager` is autograd through the module with the same weights. `value` is the part of value.onnx that f needs.
"""

from typing import Any, Final

import numpy as np
import onnxruntime

import icnnrt
from benchmarks import graphs, networks, targets
from benchmarks.interleaved import Contender, Missing, first_line, race
from benchmarks.networks import MAP
from benchmarks.report import Row, entries
from benchmarks.settings import Settings
from benchmarks.threads import cores, threads
from icnnrt.format.package import Package

BATCHES: Final = (1, 128, 100_000)  # those that the targets are for, whatever --batch says
QUICK_BATCHES: Final = (1, 128)
BASE: Final = "bound"


def heads(settings: Settings) -> list[Row]:
    """A row for each number of threads and batch."""
    path = networks.gradient_map(MAP, settings.progress)
    batches = QUICK_BATCHES if settings.quick else BATCHES
    return [row(settings, Package.open(path), batch, count) for count in settings.threads for batch in batches]


def row(settings: Settings, opened: Package, B: int, count: int) -> Row:
    (n,) = opened.manifest.y_shape
    setting = {"network": MAP.name, "n": n, "batch": B, "dtype": opened.manifest.dtype, "threads": count}
    settings.progress("heads " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    y = np.random.default_rng(4).standard_normal((B, n)).astype(np.float32)
    facts: dict[str, Any] = {}
    with threads(count):
        contenders = _contenders(opened, y, count, facts)
        outcome = race(contenders, settings.budget, settle=count != 1)
    found = entries(contenders, outcome, BASE)
    judged = count == 1 and not settings.quick
    limits = (targets.GRADIENT_OF_TORCH.get(B), targets.BOTH_OF_VALUE.get(B)) if judged else (None, None)
    met = (
        *targets.judged("torch eager / gradient", limits[0], found, "gradient", "torch eager", at_least=True),
        *targets.judged("value and gradient / value", limits[1], found, BASE, "bound value", at_least=False),
    )
    return Row(setting, BASE, found, facts, met)


def _contenders(opened: Package, y: Any, count: int, facts: dict[str, Any]) -> dict[str, Contender | Missing]:
    weights = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(a)) for name, a in opened.weights.items()}
    feeds = {"x": np.zeros((len(y), 0), np.float32), "y": y}
    session = icnnrt.load(opened, threads=count or cores())
    both = graphs.Bound(opened.graphs["value"], feeds, threads=count, library=None, weights=weights)
    contenders: dict[str, Contender | Missing] = {
        BASE: Contender(both),
        "bound value": Contender(
            graphs.Bound(
                networks.only(opened.graphs["value"], "f"), feeds, threads=count, library=None, weights=weights
            )
        ),
        "gradient": Contender(lambda: session.gradient(None, y)),
        "value": Contender(lambda: session.value(None, y)),
    }
    try:
        contenders["torch eager"] = Contender(_by_torch(opened, y, session.gradient(None, y), facts))
    except Exception as error:
        contenders["torch eager"] = Missing(first_line(error))
    return contenders


def _by_torch(opened: Package, y: Any, ours: Any, facts: dict[str, Any]) -> Any:
    import torch

    energy = networks.map_energy(MAP)
    energy.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in opened.weights.items()})
    energy.requires_grad_(False)  # no gradient of the weights is wanted, and torch need not keep what it takes
    leaf = torch.from_numpy(y).requires_grad_()
    nothing = torch.zeros(len(y), 0)

    def gradient() -> torch.Tensor:
        (g,) = torch.autograd.grad(energy(nothing, leaf).sum(), leaf)
        return g

    facts["difference"] = float(np.abs(gradient().numpy() - ours).max())
    return gradient
