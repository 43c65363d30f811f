"""Train, export and measure the digits completion package beside this file.

    python models/digits_completion/recipe.py

writes digits_completion.icnn, completion.png and metrics.json here. Needs the extra `demo`; about two minutes.
"""

import json
from pathlib import Path

import torch

from icnnrt_exporters.demo import evaluate, export_digits
from icnnrt_models import digits

HERE = Path(__file__).parent
SEED = 0


def main() -> None:
    # Timings and figures of the card are for one thread: small matrices gain nothing from a second.
    torch.set_num_threads(1)
    split = digits.load()
    layer = digits.train(
        split.train, seed=SEED, on_epoch=lambda e: print(f"epoch {e.number}/{e.epochs}  train MSE {e.train_mse:.5f}")
    )
    package = HERE / "digits_completion.icnn"
    metadata = {
        "data": "scikit-learn load_digits, 1437 training and 360 test images",
        "seed": SEED,
        "recipe": "models/digits_completion/recipe.py",
    }
    export_digits(layer, split.test, package, progress=print, metadata=metadata)
    report = evaluate(layer, split, package, HERE / "completion.png").as_dict()
    report["package"], report["picture"] = package.name, "completion.png"
    (HERE / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
