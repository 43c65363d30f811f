"""Cuts to solve: such as compete at random, and such as the bundle method makes on a network."""

import functools
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics import reference

Start = Literal["cold", "warm"]
DISTINCT = 8  # samples; larger batches repeat them, which costs every contender the same as so many others
HIDDEN = (64, 64)
STRENGTH = 5.0  # of the energy, times one freshly drawn, whose solves are over in a cut or two


class Cuts(NamedTuple):
    """B samples of k cuts, rounded to the dtype they are used in."""

    slopes: NDArray[Any]  # [B, k, n]
    offsets: NDArray[Any]  # [B, k]
    lam_start: NDArray[Any]  # [B, k_prev]: k_prev = 0 when cold, k − 1 when warm


def cuts(start: Start, k: int, n: int, B: int, dtype: str) -> Cuts:
    """Cold: random cuts that compete. Warm: the k-th model of a solve, with the multipliers of the one before."""
    made = random_cuts(0, DISTINCT, k, n) if start == "cold" else bundle_cuts(k, n)
    sample = np.arange(B) % DISTINCT
    return Cuts(*(np.ascontiguousarray(a[sample], dtype=dtype) for a in made))


def random_cuts(seed: int, B: int, k: int, n: int, scale: float = 3.0) -> Cuts:
    """v differs from cut to cut by about as much as y can change it; the larger the scale, the more steps."""
    rng = np.random.default_rng(seed)
    slopes = scale * rng.standard_normal((B, k, n)) / np.sqrt(n) * 3
    return Cuts(slopes, 0.3 * scale * rng.standard_normal((B, k)), np.empty((B, 0)))


@functools.cache
def bundle_cuts(k: int, n: int) -> Cuts:
    """The first k cuts of DISTINCT samples on a network of ReLU units."""
    import torch

    from icnnrt_models import FICNN
    from icnnrt_models.layers.argmin import BundleEntropyArgmin

    generator = torch.Generator().manual_seed(0)
    energy = FICNN(4, n, hidden=HIDDEN, activation="relu", dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for parameter in energy.layers[-1].parameters():
            parameter.mul_(STRENGTH)
    x = torch.randn(DISTINCT, 4, generator=generator, dtype=torch.float64)
    solved = BundleEntropyArgmin(energy, iterations=k).solve(x)
    start = solved.lam_history[:, k - 2, : k - 1] if k > 1 else solved.lam_history[:, 0, :0]
    return Cuts(*(tensor.numpy() for tensor in (solved.slopes, solved.offsets, start)))


def start_of(made: Cuts) -> NDArray[Any] | None:
    """lam_start as the solvers in Python take it."""
    return made.lam_start if made.lam_start.shape[1] else None


def steps_taken(made: Cuts) -> list[int]:
    """Interior-point steps until nothing changes any more, by the reference, one number for each distinct sample."""
    taken = []
    for i in range(min(len(made.slopes), DISTINCT)):
        G, e, start = (a[i : i + 1].astype(np.float64) for a in made)
        lam = start if start.shape[1] else None
        final = reference.bundle_entropy_solve(G, e, lam).residual[0, 2]
        low, high = 0, reference.STEPS  # the gap of the best iterate never grows with more steps
        while low < high:
            middle = (low + high) // 2
            if reference.bundle_entropy_solve(G, e, lam, middle).residual[0, 2] <= final:
                high = middle
            else:
                low = middle + 1
        taken.append(low)
    return taken
