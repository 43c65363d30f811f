"""Initial values for input-convex networks, after Hoedt and Klambauer, "Principled Weight Initialisation for
Input-Convex Neural Networks" (NeurIPS 2023).

Why the usual rules fail: they rely on weights of mean zero. Non-negative weights have a positive mean, so each layer
adds up the means of the one before, and all its units become strongly correlated.

Derivation. Let s be the pre-activations of one layer: standard normal, any two with correlation ρ = 1/2. With a = g(s),
N inputs, and independent weights of mean μ_w and variance σ_w², the next pre-activations s' = Σ_j w_j a_j + b have

    E[s']           = N μ_w E[a] + b
    Cov(s'_1, s'_2) = μ_w² Var(Σ_j a_j) = μ_w² (N E[a²] + N(N−1) E[a a'] − N² E[a]²)
    Var(s')         = N σ_w² E[a²] + Cov(s'_1, s'_2)

over inputs and weights. Asking for mean 0, covariance ρ and variance 1 again gives

    μ_w² = ρ / (N E[a²] + N(N−1) E[a a'] − N² E[a]²),   σ_w² = (1 − ρ) / (N E[a²]),   b = −N μ_w E[a].

For ReLU E[a²] = 1/2 makes σ_w² = 1/N and μ_w² = 6π / (N (6(π−1) + (N−1)(3√3 + 2π − 6))), the closed form of the
paper. As there, weights are log-normal with this mean and variance, hence positive.

Two additions, since the paper leaves skip connections out:

- A skip connection W y of zero-mean weights gets the same two properties, variance 1 and correlation ρ between units,
  from rows that share a part: W_ij = (√ρ c_j + √(1−ρ) n_ij) / √(fan E[y²]), with c, n standard normal. The first layer
  is made this way too, so the assumption holds from the start.
- A layer with both is √(1−v)·(z path) + √v·(skip), so mean 0, variance 1 and correlation ρ remain.

How large v must be: the fixed point above is one of averages, and single inputs leave it. Write m for the mean of s
over the units, given one input. It moves by a convex map whose slope at large m is γ = √(1−v) N μ_w, since g' -> 1
there. Without skips γ is 1.84 for ReLU at N = 64, and inputs with m above about 1 grow by it in every layer (measured
at v = 1/4, twelve layers: standard deviations up to 100). On the other hand γ is what carries the gradient back. So v
bounds the growth through all L = k − 1 maps W^(z) together by e, that is γ = exp(1/L), and is never less than an even
split:

    v = max(1/2, 1 − (exp(1/L) / (N μ_w))²)

Measured on a ReLU FICNN of width 64, as geometric means of four seeds: the standard deviation of f at 2, 6 and 12
hidden layers is 0.9, 1.1 and 0.9; with |Kaiming normal| weights it is 15, 9e4 and 5e10, with negative ones clamped at
zero 5, 1e3 and 1e7.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

CORRELATION = 0.5  # ρ, the paper's choice


class Moments(NamedTuple):
    """Moments of a = g(s), a' = g(s') for standard normal s, s' with correlation ρ."""

    mean: float  # E[a]
    square: float  # E[a²]
    product: float  # E[a a']


class NonNegativeLaw(NamedTuple):
    """Mean and variance of non-negative weights, and the bias that centres their sum."""

    mean: float  # μ_w
    variance: float  # σ_w²
    bias: float  # −N μ_w E[a]


def gaussian_moments(g: Callable[[Tensor], Tensor], rho: float = CORRELATION) -> Moments:
    """E[g(s)], E[g(s)²] and E[g(s) g(s')] to about 1e-12, for g smooth except at 0.

    With s = √ρ c + √(1−ρ) e and s' = √ρ c + √(1−ρ) e' for independent standard normal c, e, e',

        E[a a'] = E_c[m(c)²],   m(c) = E_e[g(√ρ c + √(1−ρ) e)].

    m is smooth even where g has a kink, so Gauss-Hermite quadrature suits the outer integral; the inner ones use
    Gauss-Legendre panels that meet at the kink, where Gauss-Hermite nodes would be worth three digits only.
    """
    node, weight = np.polynomial.legendre.leggauss(24)
    panels = np.arange(-16.0, 16.0)  # [p, p + 1]: sixteen standard deviations either side, and 0 is a panel's edge
    s = (panels[:, None] + (node + 1) / 2).ravel()
    ds = np.tile(weight / 2, panels.size)
    with torch.no_grad():
        a = g(torch.from_numpy(s)).numpy()

    def expectation(values: np.ndarray, mean: np.ndarray, std: float) -> np.ndarray:
        density = np.exp(-(((s - mean[:, None]) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
        return density @ (ds * values)

    c, dc = np.polynomial.hermite_e.hermegauss(64)
    m = expectation(a, math.sqrt(rho) * c, math.sqrt(1 - rho))
    centre = np.zeros(1)
    return Moments(
        mean=float(expectation(a, centre, 1.0)[0]),
        square=float(expectation(a**2, centre, 1.0)[0]),
        product=float(dc @ m**2 / math.sqrt(2 * math.pi)),
    )


def nonnegative_law(fan_in: int, moments: Moments, rho: float = CORRELATION) -> NonNegativeLaw:
    """μ_w, σ_w² and b of the module docstring for N = fan_in inputs."""
    n, (a, aa, ab) = fan_in, moments
    mean = math.sqrt(rho / (n * aa + n * (n - 1) * ab - n**2 * a**2))
    return NonNegativeLaw(mean=mean, variance=(1 - rho) / (n * aa), bias=-n * mean * a)


def skip_share(fan_in: int, law: NonNegativeLaw, z_maps: int) -> float:
    """v of the module docstring, for N = fan_in and L = z_maps."""
    return max(0.5, 1 - (math.exp(1 / z_maps) / (fan_in * law.mean)) ** 2)


def draw_nonnegative(
    shape: tuple[int, int], law: NonNegativeLaw, generator: torch.Generator | None
) -> Float[Tensor, "out fan_in"]:
    """Log-normal weights exp(τ ξ + κ), ξ standard normal: τ² = log(1 + σ_w²/μ_w²), κ = log μ_w − τ²/2."""
    tau2 = math.log1p(law.variance / law.mean**2)
    return torch.exp(math.sqrt(tau2) * _normal(shape, generator) + math.log(law.mean) - tau2 / 2)


def draw_skip(
    shape: tuple[int, int], input_square: float, generator: torch.Generator | None, rho: float = CORRELATION
) -> Float[Tensor, "out fan_in"]:
    """Weights of mean zero; units of variance 1 and pairwise correlation ρ on inputs with E[y²] = input_square."""
    fan_in = shape[1]
    shared = _normal((1, fan_in), generator)
    own = _normal(shape, generator)
    return (math.sqrt(rho) * shared + math.sqrt(1 - rho) * own) / math.sqrt(fan_in * input_square)


def draw_free(
    shape: tuple[int, int], variance: float, input_square: float, generator: torch.Generator | None
) -> Float[Tensor, "out fan_in"]:
    """Independent weights of mean zero; units of this variance on inputs with E[u²] = input_square."""
    return _normal(shape, generator) * math.sqrt(variance / (shape[1] * input_square))


def _normal(shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    # Always drawn in float64 on the generator's own device: one seed then names one network, whatever its dtype and
    # device.
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
