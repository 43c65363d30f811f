"""erf and erfc in float64, from exp alone: ONNX Runtime has Erf in float32 only.

Rational approximations of W. J. Cody, "Rational Chebyshev approximations for the error function", Mathematics of
Computation 23 (1969), to full double precision on three ranges of a = |x|:

    a <= 0.46875     erf(x)  = x P(x²) / Q(x²)
    a <= 4           erfc(a) = e^{−a²} P(a) / Q(a)
    beyond           erfc(a) = e^{−a²} (1/√π − r P(r)/Q(r)) / a,  r = 1/a²
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Highest power first.
SMALL_P = (
    1.85777706184603153e-1,
    3.16112374387056560e0,
    1.13864154151050156e2,
    3.77485237685302021e2,
    3.20937758913846947e3,
)
SMALL_Q = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
MIDDLE_P = (
    2.15311535474403846e-8,
    5.64188496988670089e-1,
    8.88314979438837594e0,
    6.61191906371416295e1,
    2.98635138197400131e2,
    8.81952221241769090e2,
    1.71204761263407058e3,
    2.05107837782607147e3,
    1.23033935479799725e3,
)
MIDDLE_Q = (
    1.0,
    1.57449261107098347e1,
    1.17693950891312499e2,
    5.37181101862009858e2,
    1.62138957456669019e3,
    3.29079923573345963e3,
    4.36261909014324716e3,
    3.43936767414372164e3,
    1.23033935480374942e3,
)
LARGE_P = (
    1.63153871373020978e-2,
    3.05326634961232344e-1,
    3.60344899949804439e-1,
    1.25781726111229246e-1,
    1.60837851487422766e-2,
    6.58749161529837803e-4,
)
LARGE_Q = (
    1.0,
    2.56852019228982242e0,
    1.87295284992346725e0,
    5.27905102951428412e-1,
    6.05183413124413191e-2,
    2.33520497626869185e-3,
)


def erf(x: Tensor) -> Tensor:
    """erf, entry by entry, to about 1e-15 relative."""
    if x.dtype != torch.float64:
        return NotImplemented
    a = x.abs()
    tail = 1.0 - _complement(a.clamp(max=6.0))  # erf(6) is 1 in float64
    return torch.where(a <= 0.46875, _small(x), torch.sign(x) * tail)


def erfc(x: Tensor) -> Tensor:
    """1 − erf, without cancellation for x > 0."""
    if x.dtype != torch.float64:
        return NotImplemented
    a = x.abs()
    tail = _complement(a)
    return torch.where(a <= 0.46875, 1.0 - _small(x), torch.where(x > 0, tail, 2.0 - tail))


def _small(x: Tensor) -> Tensor:
    # Clamped, so that the branch that is not taken stays finite.
    x = x.clamp(-0.5, 0.5)
    return x * _ratio(SMALL_P, SMALL_Q, x * x)


def _complement(a: Tensor) -> Tensor:
    """erfc(a) for a > 0.4."""
    near = _ratio(MIDDLE_P, MIDDLE_Q, a.clamp(max=4.0))
    far_a = a.clamp(min=4.0)
    r = 1.0 / (far_a * far_a)
    far = (1.0 / math.sqrt(math.pi) - r * _ratio(LARGE_P, LARGE_Q, r)) / far_a
    return torch.exp(-a * a) * torch.where(a <= 4.0, near, far)


def _ratio(P: Sequence[float], Q: Sequence[float], t: Tensor) -> Tensor:
    return _polynomial(P, t) / _polynomial(Q, t)


def _polynomial(coefficients: Sequence[float], t: Tensor) -> Tensor:
    first, second, *rest = coefficients
    value = t + second if first == 1.0 else t * first + second
    for c in rest:
        value = value * t + c
    return value
