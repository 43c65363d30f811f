"""Adapt a network that knows the digits 0 to 4 to 5 to 9, as a device would: with onnxruntime, without torch.

    python models/digits_completion/adapt.py               # seconds; prints what was learnt
    python models/digits_completion/adapt.py --write       # and writes adapted.json here
    python models/digits_completion/adapt.py --pretrain    # first trains digits_0to4.icnn anew: needs torch; a minute

It needs icnnrt, onnxruntime, and scikit-learn for the images.

The device has 200 images of 5 to 9. What it knew already it keeps by going on to see the images of 0 to 4 that it
was trained on (replay), which are 93 kB of pixels. The same by the command line, with the data that this writes:

    python models/digits_completion/adapt.py --data adapt.npz
    icnnrt tune models/digits_completion/digits_0to4.icnn adapt.npz --out adapted.icnn --epochs 20 --lr 3e-3
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import icnnrt

HERE = Path(__file__).parent
PACKAGE = HERE / "digits_0to4.icnn"
SEED = 0
TEST_IMAGES = 360  # the same 360 as in recipe.py
NEW_IMAGES = 200
EPOCHS, BATCH_SIZE, LEARNING_RATE = 20, 32, 3e-3
DRAWS = 5  # of the 200 images


class Digits(NamedTuple):
    """Left halves x [N, 32], right halves y [N, 32], pixels in [0, 1], and which digit each is."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    label: NDArray[np.int64]

    def rows(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "Digits":
        return Digits(self.x[rows], self.y[rows], self.label[rows])


def load() -> tuple[Digits, Digits]:
    """Training and test images, split as `icnnrt_models.digits.load` does, without torch."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"adapt.py: the images come with scikit-learn, which is not installed here ({error}); "
            "pip install scikit-learn, or pass --data FILE where it is installed and tune on that file here."
        ) from None

    found = load_digits()
    order = np.random.default_rng(SEED).permutation(len(found.images))
    images, label = (found.images[order] / 16.0).astype(np.float32), found.target[order]
    whole = Digits(images[:, :, :4].reshape(-1, 32), images[:, :, 4:].reshape(-1, 32), label)
    return whole.rows(np.arange(TEST_IMAGES, len(label))), whole.rows(np.arange(TEST_IMAGES))


def pretrain(train: Digits) -> None:
    """Train on 0 to 4 alone and export with a training graph: squared error, Adam. Needs torch."""
    import torch

    from icnnrt_exporters import TrainSpec, export
    from icnnrt_models import digits

    torch.set_num_threads(1)
    known = train.rows(train.label < 5)
    layer = digits.train(
        digits.Halves(known.x, known.y),
        seed=SEED,
        on_epoch=lambda e: print(f"epoch {e.number}/{e.epochs}  train MSE {e.train_mse:.5f}"),
    )
    export(
        layer.energy,
        layer,
        torch.from_numpy(known.x[:16]),
        torch.from_numpy(known.y[:16]),
        PACKAGE,
        metadata={"data": f"scikit-learn load_digits, the {len(known.x)} training images of 0 to 4", "seed": SEED},
        train=TrainSpec(loss="squared_error", optimizer="adam"),
        overwrite=True,
        progress=print,
    )


def device_data(train: Digits, draw: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """200 images of 5 to 9, and for replay every training image of 0 to 4."""
    new = np.random.default_rng(draw).choice(np.flatnonzero(train.label >= 5), NEW_IMAGES, replace=False)
    chosen = train.rows(np.concatenate([new, np.flatnonzero(train.label < 5)]))
    return chosen.x, chosen.y


def adapt(train: Digits, test: Digits, draw: int) -> dict[str, float]:
    """Tune on the device's data and measure both halves of the test images before and after."""
    with icnnrt.load(PACKAGE) as session:

        def errors() -> tuple[float, float]:
            wrong = ((session.argmin(test.x).y - test.y) ** 2).mean(1)
            return float(wrong[test.label >= 5].mean()), float(wrong[test.label < 5].mean())

        (new_before, old_before), began = errors(), time.perf_counter()
        tuner = icnnrt.FineTuner(session, learning_rate=LEARNING_RATE)
        fitted = tuner.fit(*device_data(train, draw), epochs=EPOCHS, batch_size=BATCH_SIZE, seed=draw)
        seconds = time.perf_counter() - began
        new_after, old_after = errors()
    return {
        "new_before": new_before,
        "new_after": new_after,
        "old_before": old_before,
        "old_after": old_after,
        "new_change": new_after / new_before - 1,
        "old_change": old_after / old_before - 1,
        "steps": tuner.steps,
        "refused": sum(epoch.refused for epoch in fitted.epochs),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", action="store_true", help="make digits_0to4.icnn anew first; needs torch")
    parser.add_argument("--write", action="store_true", help="write the figures to adapted.json next to this file")
    parser.add_argument("--data", type=Path, help="only write the device's data to this .npz, for `icnnrt tune`")
    arguments = parser.parse_args()
    train, test = load()
    if arguments.data:
        x, y = device_data(train, SEED)
        np.savez(arguments.data, x=x, y=y)
        return
    if arguments.pretrain:
        pretrain(train)
    found = []
    for draw in range(DRAWS):
        found.append(adapt(train, test, draw))
        told = ", ".join(f"{key} {value:.4g}" for key, value in found[-1].items())
        print(f"draw {draw}: {told}")
    report = {
        "images": {"new": NEW_IMAGES, "replayed": int((train.label < 5).sum())},
        "epochs": EPOCHS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "draws": found,
    }
    if arguments.write:
        (HERE / "adapted.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
