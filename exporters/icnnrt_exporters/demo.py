"""`icnnrt demo`: train on real digits, export, reload without torch, complete images, check, and draw."""

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import icnnrt
from icnnrt_exporters.assembly.train_spec import TrainSpec
from icnnrt_exporters.exporter import export
from icnnrt_models import BundleEntropyArgmin, digits

SHOWN = 10


@dataclass(frozen=True)
class Report:
    """What the demo measured. Errors are mean squared errors on the 360 test images, pixels in [0, 1]."""

    test_mse: float
    baselines: dict[str, float]
    torch_difference: float
    """max |y − y of torch| over all test images. In float32 the optimum of a smooth energy is known to the square root
    of its rounding; the next figure tells that both answers are as good."""
    torch_energy_difference: float
    """max |energy − energy of torch|, the same objective at both answers."""
    gap_median: float
    gap_max: float
    residual_max: float
    status: dict[str, int]
    batch_milliseconds_per_image: float
    single_milliseconds: float
    """Median time of one image completed alone."""
    gradient_check: float
    """max |x̄ − x̄ of torch| / max |x̄ of torch| of the exact adjoint, over 32 test images."""
    package: str
    picture: str
    parity: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_digits(layer: BundleEntropyArgmin, data: digits.Halves, path: Path, **keywords: Any) -> None:
    """Export a trained digits network, to be tuned on the device by squared error and Adam; shared with the recipe of
    models/digits_completion."""
    x, y = torch.from_numpy(data.x[:16]), torch.from_numpy(data.y[:16])
    training = TrainSpec(loss="squared_error", optimizer="adam")
    export(layer.energy, layer, x, y, path, name="digits_completion", train=training, overwrite=True, **keywords)


def evaluate(layer: BundleEntropyArgmin, split: digits.Split, package: Path, picture: Path) -> Report:
    """Reload the package with onnxruntime, complete every test image, and compare with torch and with the baselines."""
    x, true = split.test
    session = icnnrt.load(package)
    solution = session.argmin(x)
    by_torch = layer.solve(torch.from_numpy(x))

    few = x[:32]
    part = session.argmin(few)
    y_bar = (part.y - true[:32]).astype(np.float32)
    cotangents = session.vjp(part, y_bar, on_unsafe="skip")
    leaf = torch.from_numpy(few).requires_grad_()
    (x_bar,) = torch.autograd.grad(layer(leaf), leaf, torch.from_numpy(y_bar))
    kept = ~cotangents.skipped
    differences = np.abs(cotangents.x - x_bar.numpy())[kept].max(initial=0.0)
    largest = np.abs(x_bar.numpy())[kept].max(initial=np.finfo(np.float32).tiny)

    shown = np.linspace(0, len(x) - 1, SHOWN).astype(int)
    draw(picture, x[shown], solution.y[shown], true[shown])
    counts = Counter(icnnrt.Status(int(s)).name for s in solution.status)
    return Report(
        test_mse=digits.mse(solution.y, true),
        baselines=digits.baselines(split),
        torch_difference=float(np.abs(solution.y - by_torch.y.numpy()).max()),
        torch_energy_difference=float(np.abs(solution.energy - by_torch.energy.numpy()).max()),
        gap_median=float(np.median(solution.gap)),
        gap_max=float(solution.gap.max()),
        residual_max=float(solution.residual.max()),
        status=dict(counts),
        batch_milliseconds_per_image=1e3 * _median_seconds(lambda: session.argmin(x), 3) / len(x),
        single_milliseconds=1e3 * _median_seconds(lambda: session.argmin(x[:1]), 30),
        gradient_check=float(differences / largest),
        package=str(package),
        picture=str(picture),
        parity=dict(session.manifest.parity),
    )


def draw(target: Path, x: digits.Images, completed: NDArray[np.floating], true: digits.Images) -> None:
    """One row an image: given, completed, true."""
    from matplotlib.figure import Figure

    given = digits.picture(x, np.full_like(true, np.nan))
    columns = {
        "given": given,
        "completed": digits.picture(x, completed.astype(np.float32)),
        "true": digits.picture(x, true),
    }
    figure = Figure(figsize=(1.05 * len(x), 3.6), layout="constrained")
    axes = figure.subplots(len(columns), len(x))
    for row, (title, images) in zip(axes, columns.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image, cmap="gray_r", vmin=0.0, vmax=1.0)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_facecolor("#dde6f0")  # what is not given
        row[0].set_ylabel(title, fontsize=12)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def _median_seconds(call: Any, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
