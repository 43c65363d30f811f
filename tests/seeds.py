"""Other draws for every test: ICNNRT_TEST_SEED=n adds n to each seed that a test gives torch or numpy.

What a test says must hold for other draws too. Seeds that the library itself uses stay as they are, and so do those of
programs that a test starts. Hypothesis has its own: `--hypothesis-seed`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHIFT = int(os.environ.get("ICNNRT_TEST_SEED", "0"))
HERE = str(Path(__file__).parent) + os.sep


def _shifted(seed: Any) -> Any:
    """The seed, moved if two calls up is a file of this folder."""
    of_a_test = sys._getframe(2).f_code.co_filename.startswith(HERE)
    return seed + SHIFT if of_a_test and isinstance(seed, int) else seed


def shift_numpy() -> None:
    plain = np.random.default_rng

    def default_rng(seed: Any = None) -> np.random.Generator:
        return plain(_shifted(seed))

    np.random.default_rng = default_rng


def shift_torch() -> None:
    try:
        import torch
    except ImportError:
        return
    plain = torch.manual_seed

    def manual_seed(seed: Any) -> torch.Generator:
        return plain(_shifted(seed))

    class Generator(torch.Generator):
        def manual_seed(self, seed: Any) -> torch.Generator:
            return super().manual_seed(_shifted(seed))

    torch.manual_seed = manual_seed
    torch.Generator = Generator  # type: ignore[misc]
