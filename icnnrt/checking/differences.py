"""Derivatives against central differences: along random directions, of inputs or of weights, at several steps h.

    told         Σ bar'step, with step = [(a + h d) − (a − h d)]/2h as the dtype rounds it: the rounding of a counts not
    differences  [loss(a + h d) − loss(a − h d)]/2h

Where a network of pieces is differentiated, a difference that straddles a kink is none of its derivatives; so of the
steps the one that comes nearest counts, and the median over the samples is judged.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from icnnrt.checking.problems import STEPS
from icnnrt.checking.report import Array, Arrays, Check, judged, skipped
from icnnrt.checking.trial import Trial
from icnnrt.errors import InputError

# The relative error the median may have: truncation and rounding at those steps, with a margin of 10 or more.
RELATIVE: Final = {"float64": 1e-3, "float32": 1e-1}
# What the rounding of an entry of y* may make of a difference over the longest of them.
NOISE: Final = {"float64": 1e-7, "float32": 1e-5}
Derivatives = tuple[Array, Array]  # [steps, samples], told two ways; NaN where a sample was left out
Told = Callable[[Arrays], Array]  # steps of arrays -> what they do to a loss
Loss = Callable[..., Array]  # arrays by their names -> [B]
Judge = Callable[[Derivatives], Check]
FEW: Final = 16  # θ̄ of one sample takes a run of its own, so only so many are tried
WEIGHT_DIRECTIONS: Final = 2


def rows(products: NDArray[Any]) -> Array:
    """The sum over all but the first dimension, in float64."""
    return np.asarray(products.reshape(len(products), -1).sum(1), np.float64)


def paired(bars: Arrays) -> Told:
    """What a step of some arrays does to a loss [B] with these cotangents."""
    return lambda step: np.sum([rows(bars[name] * moved) for name, moved in step.items()], axis=0)


def along(loss: Loss, at: Arrays, d: Arrays, told: Told, steps: tuple[float, ...]) -> Derivatives:
    """What `told` says of the steps, and differences of the loss, which takes the arrays by their names."""
    found = []
    for h in steps:
        ahead, behind = ({name: (a + t * d[name]).astype(a.dtype) for name, a in at.items()} for t in (h, -h))
        step = {}
        for name, a in at.items():  # an absent bound stays where it is
            step[name] = np.subtract(ahead[name], behind[name], out=np.zeros(a.shape), where=np.isfinite(a)) / (2 * h)
        found.append((told(step), (loss(**ahead) - loss(**behind)) / (2 * h)))
    told_each, differences = zip(*found, strict=True)
    return np.array(told_each), np.array(differences)


def by_weights(trial: Trial, name: str, bar: Callable[[int], Arrays], loss: Loss, judge: Judge) -> Check:
    """Judge θ̄ of one sample at a time, as a kink that one of them straddles would spoil the sum of all.

    bar(i) is that of sample i; loss(few) are the losses of a slice, with the weights as they are then. All trainable
    weights are moved together: changed in place and, whatever happens, put back.
    """
    session, few = trial.session, slice(min(FEW, len(trial.X)))
    old, before = {key: session.weights[key] for key in trial.manifest.weights.trainable}, session.weights_id
    if not old:
        return skipped(name, "no weight is trainable")
    # All cotangents first: once the weights change, an answer is one of other weights.
    each = [bar(i) for i in range(few.stop)]
    told = paired({key: np.stack([one[key] for one in each]) for key in old})

    def moved(**weights: NDArray[Any]) -> Array:
        session.update_weights(weights)
        return loss(few)

    try:
        directions = (trial.directions(old, batched=False) for _ in range(WEIGHT_DIRECTIONS))
        found = [along(moved, old, d, told, STEPS[trial.T]) for d in directions]
    except InputError as error:  # a frozen export: its weights are constants of the graphs
        return skipped(name, f"the weights cannot be changed in memory: {error}")
    finally:
        if session.weights_id != before:
            session.update_weights(old)
    return judge((np.concatenate([a for a, _ in found], 1), np.concatenate([b for _, b in found], 1)))


def head(trial: Trial, name: str, loss: Loss, at: Arrays, told: Told, what: str, d: Arrays | None = None) -> Check:
    """A derivative that a graph returns against differences; `what` says of what."""
    d = trial.directions(at) if d is None else d
    return judge_head(trial, name, along(loss, at, d, told, STEPS[trial.T]), what)


def judge_head(trial: Trial, name: str, found: Derivatives, what: str) -> Check:
    """Of a graph that returns a derivative: the error relative to the median size of what it told, or 1."""
    told, by_steps = (a.reshape(*a.shape[:2], -1) for a in found)
    scale = max(1.0, float(np.median(np.abs(told).max((0, 2), initial=0.0))))
    error = np.abs(by_steps - told).max(2, initial=0.0).min(0) / scale
    detail = f"median relative error against differences of {what}, worst {error.max():.1e}"
    return judged(name, float(np.median(error)), RELATIVE[trial.T], detail)


def judge_adjoint(trial: Trial, name: str, found: Derivatives, y_bar: NDArray[Any]) -> Check:
    """Of an answer's derivative, by the error relative to each; ȳ [B, n], for as many directions as there are."""
    bound = RELATIVE[trial.T]
    kept = np.isfinite(found).all((0, 1))
    told, by_steps = (a[:, kept] for a in found)
    unsafe = f"; {(~kept).sum()} left out as unsafe" if not kept.all() else ""
    size = np.maximum(np.abs(told), np.abs(by_steps)).min(0, initial=np.inf)
    # Where a derivative is zero, or less than what the rounding of y* makes of a difference, both sides agree, or not,
    # by chance. Under a ReLU network y* often does not move at all.
    length = np.tile(np.linalg.norm(y_bar, axis=1), kept.size // len(y_bar))[kept]
    usual = float(np.sqrt(np.mean(size**2))) if size.size else 0.0
    telling = size > np.maximum(NOISE[trial.T] * length / bound, 0.1 * usual)
    if not telling.any():
        return skipped(name, f"no sample has a gradient that is safe and above noise{unsafe}", bound)
    error = np.abs(told - by_steps).min(0)[telling] / size[telling]
    detail = f"median relative error of {len(error)} derivatives, worst {error.max():.1e}"
    if len(error) < len(size):
        detail += f"; {len(size) - len(error)} near zero"
    return judged(name, float(np.median(error)), bound, detail + unsafe)
