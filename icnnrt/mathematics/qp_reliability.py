"""Whether the gradient of a quadratic program exists, told from its `share` and `weak` of `qp_adjoint`; and why not.

NO_GRADIENT: a part of the loss has no gradient, as the answer is not unique, or rows that hold it depend on each other
and the loss tells their multipliers apart. What is handed out is that of the rest: its solution of least norm, in units
of the equilibrated problem, so that it does not depend on the units of the data.

KINK: a row is weakly active, its multiplier and its slack both as good as 0. What is handed out is the derivative of
one side. Or rows that hold z depend on each other, and what is of the data of these is shared out among them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.mathematics.namespace import NUMPY, Array, Namespace
from icnnrt.mathematics.qp_adjoint import WEAK, held

__all__ = [
    "DEPENDENT",
    "KINK",
    "LOST",
    "NO_GRADIENT",
    "OFF_PATH",
    "dependent",
    "existing",
    "gradient_advice",
    "moved",
    "moves",
    "reliable",
    "weak_rows",
]

# The share of the loss from which on it counts, by the precision of the data; less is rounding.
LOST: Final = {"float32": 1e-3, "float64": 1e-6}
NAMED: Final = 4  # so many rows are named
NO_GRADIENT: Final = (
    "a part of the loss has no gradient, as the answer or its multipliers are not unique there; add a small multiple "
    "of the identity to Q, or leave out rows that depend on others"
)
OFF_PATH: Final = (
    "no point of the central path was found: there is none where the constraints leave no interior, nor where the "
    "objective does not tell far points apart, and a smoothing that is far from the size of the objective finds none; "
    "leave smoothing out for the gradient at the answer, or take one nearer that size"
)
DEPENDENT: Final = (
    "rows that hold z depend on each other, and gradients by h, b and the bounds are shared out among them, while "
    "those by Q and p are what they are; leave out rows that follow from others, or take smoothing"
)
KINK: Final = (
    "multiplier and slack of a row are both as good as 0, and the gradient is that of one side; move the bounds, or "
    "average over nearby data"
)


def reliable(share: NDArray[Any], weak: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    """[B]: samples that have an answer, and a gradient there; share is NaN of the others. dtype: of the data."""
    return (share <= LOST[dtype]) & (weak == 0)


def moves(*rows: int) -> list[NDArray[np.float64]]:
    """By how much to move each of so many rows of G, of A and of the box, in units of its largest entry.

    So `dependent` tells whether rows that hold z depend on each other: no z meets what each of them is moved by, and a
    cotangent (0, λ̄, ν̄, μ̄) of that has a share without a gradient. Then their multipliers are not unique, nor is any
    gradient by what is theirs.
    """
    rng = np.random.default_rng(0)
    return [rng.uniform(0.5, 1.5, count) for count in rows]


def moved(G: NDArray[Any], A: NDArray[Any], box: NDArray[Any]) -> list[NDArray[np.float64]]:
    """That cotangent, λ̄ [B, m], ν̄ [B, q] and μ̄ [B, n], for G [B, m, n], A [B, q, n] and box [B, n]."""
    sizes = *(np.abs(M).max(2, initial=0.0) for M in (G, A)), np.ones_like(box)
    return [move * size for move, size in zip(moves(*(size.shape[1] for size in sizes)), sizes, strict=True)]


def dependent(share: Any, dtype: str) -> Any:
    """[B]: whether rows that hold z depend on each other, by the share of the cotangents of `moves`; NaN tells none."""
    return share > LOST[dtype]


def existing(xp: Namespace, d: Sequence[Array], share: Array) -> list[Array]:
    """d [B, k] of the adjoint's rows, NaN where a part of the loss, share [B] of it, has no gradient; in float64."""
    exists = xp.column(share) <= LOST["float64"]
    return [xp.where(exists, a, float("nan")) for a in d]


def gradient_advice(
    i: int,
    share: float,
    weak: int,
    data: Mapping[str, NDArray[Any]],
    answer: Mapping[str, NDArray[Any]],
    dependent: bool = False,
) -> str:
    """One sentence on the gradient of sample `i`, which has an answer.

    share, weak:  as the operator gave them
    data:         Q, G and A of that sample, in their own dtype
    answer:       lam, mu, slack and box_slack of that sample
    dependent:    whether rows that hold z depend on each other
    """
    if share == np.inf:
        return f"sample {i}: NO_GRADIENT: {OFF_PATH}"
    if share > LOST[data["Q"].dtype.name]:
        return (
            f"sample {i}: NO_GRADIENT ({share:.2g} of the loss in equilibrated units): {NO_GRADIENT}; else it is that "
            "of the rest"
        )
    if weak:
        rows = weak_rows(data, answer)
        named = ", ".join(rows[:NAMED]) + f" and {len(rows) - NAMED} more" * (len(rows) > NAMED)
        return f"sample {i}: KINK ({named}): {KINK}"
    if dependent:
        return f"sample {i}: KINK: {DEPENDENT}"
    return f"sample {i}: reliable, {share:.1e} of the loss has no gradient, and no row is weakly active"


def weak_rows(data: Mapping[str, NDArray[Any]], answer: Mapping[str, NDArray[Any]]) -> list[str]:
    """The weakly active rows of G and the box of one sample, as "G[0]" and "z[2]"."""
    Q, G, A = (np.asarray(data[name], np.float64)[None] for name in "QGA")
    m, n = G.shape[1:]
    multiplier, slack = (
        np.concatenate([answer[a], answer[b]])[None, None].astype(np.float64)
        for a, b in (("lam", "mu"), ("slack", "box_slack"))
    )
    A = np.pad(A, ((0, 0), (0, int(not A.shape[1])), (0, 0)))
    with np.errstate(all="ignore"):
        at = held(
            NUMPY,
            0.5 * (Q + Q.swapaxes(1, 2)),
            G,
            A,
            multiplier,
            slack,
            np.zeros((1, 1, n)),
            0.0 * slack,
            A[:, None, :, 0],
        )
    (weak,) = np.nonzero(at.nearness[0, 0] < WEAK[data["Q"].dtype.name])
    return [f"G[{i}]" if i < m else f"z[{i - m}]" for i in weak]
