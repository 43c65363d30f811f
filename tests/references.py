"""What tests compare with, in float64 numpy: functions of energies, and what follows from multipliers or a Hessian."""

from typing import NamedTuple

import numpy as np

from icnnrt.mathematics import cut_model
from icnnrt.mathematics.domains import UNIT_BOX, Domain
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.reference import Array


def sigmoid(s: Array) -> Array:
    """σ(s) = 1 / (1 + e^−s), without overflow and exact in both tails."""
    return np.asarray(NUMPY.sigmoid(s), np.float64)


def softplus(s: Array) -> Array:
    """log(1 + e^s) without overflow."""
    return np.maximum(s, 0.0) + np.log1p(np.exp(-np.abs(s)))


def negative_entropy(y: Array) -> Array:
    """−H(y) = Σ y log y + (1−y) log(1−y), [..., n] -> [...]; 0 log 0 = 0; NaN outside [0, 1]."""
    return np.asarray(UNIT_BOX.regulariser(NUMPY, y)[..., 0], np.float64)


class Evaluation(NamedTuple):
    """What multipliers λ imply."""

    y: Array  # [B, n] y(−G'λ)
    dual: Array  # [B]
    complementarity: Array  # [B] the duality gap of the model


def evaluate(G: Array, e: Array, lam: Array, domain: Domain = UNIT_BOX) -> Evaluation:
    """Primal point, dual value and duality gap that belong to λ [B, k]."""
    with np.errstate(all="ignore"):
        model = cut_model.certified(NUMPY, domain, G, e[:, None], lam[:, None])
    return Evaluation(model.y[:, 0], model.lower_bound[:, 0, 0], model.gap[:, 0, 0])


def implicit_adjoint(hessian: Array, y: Array, y_bar: Array, domain: Domain = UNIT_BOX) -> Array:
    """c_y with (∇²f + D⁻¹) c_y = −ȳ: θ̄ = ∇θ [c_y' ∇_y f(x, y*)] for smooth f solved to convergence.

    hessian [B, n, n] at y [B, n]. With D = F F', solved as (I + F'∇²f F) z = −F'ȳ, c_y = F z, which stays regular
    where y saturates, and where D has no inverse, as on the simplex. Blind to kinks: wrong for ReLU networks.
    """
    s = domain.logits(NUMPY, y)[:, None, :]
    HF = domain.root_transposed(NUMPY, s, hessian)  # F' applied to every row of ∇²f: ∇²f F
    system = np.eye(y.shape[1]) + domain.root_transposed(NUMPY, s, HF.swapaxes(1, 2))
    z = np.linalg.solve(system, -domain.root_transposed(NUMPY, s, y_bar[:, None]).swapaxes(1, 2))[:, :, 0]
    return domain.root(NUMPY, s[:, 0], np.asarray(z, np.float64))
