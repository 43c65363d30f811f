"""One step of fine-tuning, against one argmin and against the same step in torch, on the digits package.

`step` is `FineTuner.step` and `argmin` is `session.argmin`, both as Python calls them, with all checks; a step holds an
argmin, the loss, the exact adjoint and Adam. `torch eager` is the argmin layer of icnnrt_models with the same weights,
`backward`, torch.optim.Adam and the projection.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

import icnnrt
from benchmarks import graphs, targets
from benchmarks.interleaved import Contender, Missing, first_line, race
from benchmarks.networks import DIGITS
from benchmarks.report import Row, entries
from benchmarks.settings import Settings
from benchmarks.threads import cores, threads
from icnnrt.format.package import Package

BATCHES: Final = (1, 32)  # those that the targets are for, whatever --batch says
RATE: Final = 1e-4  # small, so that the last step meets the same problem as the first
BASE: Final = "argmin"


def tune(settings: Settings) -> list[Row]:
    """A row for each number of threads and batch."""
    return [row(settings, batch, count) for count in settings.threads for batch in BATCHES]


def row(settings: Settings, B: int, count: int) -> Row:
    opened = Package.open(DIGITS)
    K, (n,) = opened.manifest.solver.iterations, opened.manifest.y_shape
    setting = {"network": "digits", "n": n, "K": K, "batch": B, "dtype": opened.manifest.dtype, "threads": count}
    settings.progress("tune " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    rng = np.random.default_rng(3)
    x = rng.random((B, *opened.manifest.x_shape)).astype(np.float32)
    target = rng.random((B, n)).astype(np.float32)
    facts: dict[str, Any] = {}
    with threads(count):
        contenders = _ours(opened, x, target, count, facts)
        try:
            contenders["torch eager"] = Contender(_by_torch(opened, x, target, facts))
        except Exception as error:
            contenders["torch eager"] = Missing(first_line(error))
        outcome = race(contenders, settings.budget, settle=count != 1)
    found = entries(contenders, outcome, BASE)
    judged = count == 1 and not settings.quick
    limits = (targets.STEP.get(B), targets.STEP_OF_TORCH.get(B)) if judged else (None, None)
    met = (
        *targets.judged("step / argmin", limits[0], found, "step", BASE, at_least=False),
        *targets.judged("torch eager / step", limits[1], found, "step", "torch eager", at_least=True),
    )
    return Row(setting, BASE, found, facts, met)


def _ours(opened: Package, x: Any, target: Any, count: int, facts: dict[str, Any]) -> dict[str, Contender | Missing]:
    library = graphs.native_library()
    native = not isinstance(library, Missing)
    contenders: dict[str, Contender | Missing] = {}
    for kind in ("native", "portable") if native else ("portable",):
        session = icnnrt.load(opened, threads=count or cores(), native=kind == "native")
        tuner = icnnrt.FineTuner(session, learning_rate=RATE)
        report = tuner.step(x, target)
        if not report.accepted:
            raise icnnrt.IcnnrtError(f"the step is refused: {report.reason}")
        facts[f"first_loss_{kind}"] = report.loss
        suffix = "" if kind == "native" or not native else " portable"
        contenders[BASE + suffix] = Contender(lambda session=session: session.argmin(x))
        contenders["step" + suffix] = Contender(lambda tuner=tuner: tuner.step(x, target))
    return contenders


def _by_torch(opened: Package, x: Any, target: Any, facts: dict[str, Any]) -> Callable[[], float]:
    import torch

    from icnnrt_models import BundleEntropyArgmin, digits

    network = digits.energy()
    network.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in opened.weights.items()})
    solver = opened.manifest.solver
    layer = BundleEntropyArgmin(network, iterations=solver.iterations, steps=solver.steps)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    X, T = torch.from_numpy(x), torch.from_numpy(target)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(layer(X), T)
        loss.backward()
        optimizer.step()
        network.project_()
        return float(loss.detach())

    facts["first_loss_torch"] = step()
    return step
