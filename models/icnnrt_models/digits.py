"""Image completion on scikit-learn's bundled digits: the left half of an 8×8 image is given, the right half asked for.

The recipe behind `models/digits_completion` and `icnnrt demo`. The network is trained through the argmin itself: the
loss is the squared error of y* = argmin_y f(x, y) − H(y), as in section 6.2 of Amos, Xu, Kolter (2017).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from icnnrt_models.layers.argmin import BundleEntropyArgmin
from icnnrt_models.networks.picnn import PICNN

SIDE = 8
HALF = SIDE * SIDE // 2  # 32 pixels given, 32 to complete
LEVELS = 16.0  # pixels are counts 0..16
TEST_IMAGES = 360
SPLIT_SEED = 0
ITERATIONS = 8

Images = NDArray[np.float32]


class Halves(NamedTuple):
    """Left halves x [N, 32] and right halves y [N, 32], pixels in [0, 1]."""

    x: Images
    y: Images


class Split(NamedTuple):
    train: Halves
    test: Halves


def load() -> Split:
    """The 1,797 digits, 360 drawn for testing with a fixed seed, the rest for training. Needs scikit-learn."""
    from sklearn.datasets import load_digits

    images = (load_digits().images / LEVELS).astype(np.float32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))

    def halves(rows: NDArray[np.int64]) -> Halves:
        chosen = images[rows]
        half = SIDE // 2
        return Halves(chosen[:, :, :half].reshape(-1, HALF), chosen[:, :, half:].reshape(-1, HALF))

    return Split(halves(order[TEST_IMAGES:]), halves(order[:TEST_IMAGES]))


def picture(x: Images, y: Images) -> Images:
    """Halves put together again: [N, 8, 8]."""
    half = SIDE // 2
    return np.concatenate([x.reshape(-1, SIDE, half), y.reshape(-1, SIDE, half)], axis=2)


def baselines(split: Split) -> dict[str, float]:
    """Test mean squared errors of the mean right half, of the mirrored left half, and of ridge regression.

    Ridge's penalty is the best of a grid on the last fifth of the training images, and its predictions are clipped to
    [0, 1]: the strongest form of the baseline.
    """
    train, test = split
    cut = len(train.x) * 4 // 5
    candidates = [
        (mse(ridge(Halves(train.x[:cut], train.y[:cut]), a, train.x[cut:]), train.y[cut:]), a)
        for a in (1e-2, 1e-1, 1.0, 3.0, 10.0, 30.0)
    ]
    penalty = min(candidates)[1]
    mirrored = test.x.reshape(-1, SIDE, SIDE // 2)[:, :, ::-1].reshape(-1, HALF)
    return {
        "mean image": mse(np.broadcast_to(train.y.mean(0), test.y.shape), test.y),
        "mirror": mse(mirrored, test.y),
        "ridge regression": mse(ridge(train, penalty, test.x), test.y),
    }


def ridge(train: Halves, penalty: float, x: Images) -> Images:
    """Ridge regression of y on x with an intercept, clipped to [0, 1]."""
    mean_x, mean_y = train.x.mean(0), train.y.mean(0)
    A = (train.x - mean_x).astype(np.float64)
    W = np.linalg.solve(A.T @ A + penalty * np.eye(A.shape[1]), A.T @ (train.y - mean_y))
    return np.clip((x - mean_x) @ W + mean_y, 0.0, 1.0).astype(np.float32)


def mse(y: NDArray[np.floating], true: NDArray[np.floating]) -> float:
    return float(np.mean((np.asarray(y, dtype=np.float64) - true) ** 2))


def energy(seed: int = 0) -> PICNN:
    """The untrained network: also the factory for `icnnrt export icnnrt_models.digits:energy --checkpoint ...`."""
    return PICNN(HALF, HALF, hidden=(64, 64), activation="softplus", generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Epoch:
    """What training reports after each pass over the data."""

    number: int  # from 1
    epochs: int
    train_mse: float


def train(
    data: Halves,
    *,
    epochs: int = 40,
    batch_size: int = 64,
    learning_rate: float = 5e-3,
    iterations: int = ITERATIONS,
    seed: int = 0,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> BundleEntropyArgmin:
    """Train an energy through its argmin by Adam with a one-cycle learning rate; the layer returned holds it.

    Deterministic for a seed on one machine.
    """
    network = energy(seed)
    layer = BundleEntropyArgmin(network, iterations=iterations)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    batches = -(-len(data.x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=epochs * batches)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    network.train()
    for number in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            loss = torch.nn.functional.mse_loss(layer(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            network.project_()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        on_epoch(Epoch(number, epochs, total / len(x)))
    network.eval()
    return layer
