"""Models of k cuts, every way to solve them in every domain: told by certificate and by differences.

The certificate recomputes what answers say of themselves from the numbers handed out. An adjoint is told by the
equations that the differential of the optimality conditions has to solve, and by central differences of the way's own
answers. No way is the judge of another. λ is not unique where cuts are duplicates, and nothing here asks for it.
"""

import numpy as np
import pytest
import references
from amounts import ALL, amount
from cut_models import BACKENDS, HARD, TYPES, WAYS, hard_cuts, network, random_cuts
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icnnrt.mathematics import certificate, reference
from icnnrt.mathematics.domains import SIMPLEX, SPACE, UNIT_BOX
from icnnrt.mathematics.namespace import NUMPY

each = pytest.mark.parametrize(("way", "dtype"), WAYS, ids=[f"{way}-{dtype.__name__}" for way, dtype in WAYS])
each_way = pytest.mark.parametrize("way", BACKENDS)
each_domain = pytest.mark.parametrize("domain", [UNIT_BOX, SIMPLEX, SPACE], ids=lambda d: d.name)

GAP = 1e-8  # of a model, relative to max(1, |dual|)
# What the multipliers handed out leave as gap: float32 loses 6e-8 of λ.
GAP_HANDED = {np.float64: 1e-8, np.float32: 3e-5}
# y as handed out against y of the multipliers handed out, on the scale of y.
IMPLIED = {np.float64: 1e-10, np.float32: 2e-5}
# By how much the equations of the adjoint may fail, on the scale of their largest term.
ADJOINT = {np.float64: 1e-9, np.float32: 2e-5}
SIZES = [
    (1, 1, 1),
    (1, 2, 7),
    (10, 1, 64),
    (10, 5, 7),
    (10, 30, 7),
    (159, 2, 1),
    (159, 10, 7),
    (2048, 5, 1),
    (1, 30, 7),
]
if ALL:  # the biggest ones cost seconds each and show nothing that 7 samples do not
    SIZES += [(n, k, B) for n in (1, 10, 159, 2048) for k in (1, 5, 10, 30) for B in (7, 128) if B * k * n <= 2**18]


def rounded(dtype, *arrays):
    return tuple(a.astype(dtype).astype(np.float64) for a in arrays)


def check(domain, G, e, found, dtype=np.float64, gap=GAP):
    """The figures handed out, and what anyone can compute from y and λ handed out."""
    (B, k, n), eps = G.shape, np.finfo(dtype).eps
    y, lam, lower_bound, residual = found
    assert (y.dtype, lam.dtype, lower_bound.dtype, residual.dtype) == (dtype, dtype, np.float64, np.float64)
    assert [a.shape for a in found] == [(B, n), (B, k), (B,), (B, 3)]
    if B == 0:
        return
    G, e, y, lam = rounded(dtype, G, e, y, lam)
    size, y_size = np.maximum(1.0, np.abs(lower_bound)), 1.0 + np.abs(y).max(1)
    assert (residual[:, 2] / size).max() <= gap
    assert residual[:, 1].max() <= 1e-14
    assert (residual[:, 0] / y_size).max() <= eps
    assert lam.min() >= 0.0
    assert np.abs(lam.sum(1) - 1.0).max() <= 4 * eps * k
    slope = 1.0 + np.abs(G).max((1, 2))
    own = certificate.kkt_residuals(G, e, lam, y, domain)
    assert (own[:, 0] / y_size).max() <= IMPLIED[dtype] + 4 * eps * slope.max() * (n if domain is SPACE else 1)
    # Rounded y and λ leave what they are off by times the slopes.
    away = 0.0 if dtype == np.float64 else eps * np.abs(G).sum(2).max(1) * y_size
    assert (own[:, 2] <= GAP_HANDED[dtype] * np.maximum(size, slope) + 2 * away).all()
    # No y has less than the bound, and y has hardly more.
    primal = (e + np.einsum("bkn,bn->bk", G, y - domain.centre(n))).max(1) + domain.regulariser(NUMPY, y)[:, 0]
    above = (primal - lower_bound) / size
    assert above.max() <= 2 * gap + (0.0 if dtype == np.float64 else (GAP_HANDED[dtype] * slope + 2 * away).max())
    assert above.min() >= -1e-12 - (0.0 if dtype == np.float64 else (GAP_HANDED[dtype] * slope + 2 * away).max())


@each
@each_domain
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0])
def test_random_cuts(way, dtype, domain, scale):
    for n, k, B in SIZES:
        G, e = random_cuts(k, B, k, n, scale)
        check(domain, G, e, BACKENDS[way].solve(G, e, domain=domain, dtype=dtype), dtype)


@each
@each_domain
@pytest.mark.parametrize("kind", HARD)
def test_hard_cuts(way, dtype, domain, kind):
    for scale in (1e-3, 1e-2, 1.0, 100.0, *([1e3] if dtype is np.float64 else [])):
        G, e = hard_cuts(kind, scale)
        check(domain, G, e, BACKENDS[way].solve(G, e, domain=domain, dtype=dtype), dtype)


@each
@pytest.mark.parametrize("duplicates", [False, True])
def test_slopes_of_1e4_are_solved_or_told_that_they_are_not(way, dtype, duplicates):
    G, e = random_cuts(11, 24, 8, 20, 1e4)
    if duplicates:
        G[:, 4:], e[:, 4:] = G[:, :4], e[:, :4]
    y, lam, lower_bound, residual = BACKENDS[way].solve(G, e, dtype=dtype)
    solved = residual[:, 2] <= GAP * np.maximum(1.0, np.abs(lower_bound))
    assert solved.mean() >= 0.5
    if dtype is np.float64:
        own = certificate.kkt_residuals(G, e, lam, y)
        assert (np.abs(own[:, 2] - residual[:, 2]) <= 1e-8 * (1.0 + np.abs(G).sum(2).max(1))).all()


@each
@each_domain
@pytest.mark.parametrize("kind", ["relu", "softplus"])
def test_the_cuts_of_a_network_with_warm_starts(way, dtype, domain, kind):
    """Near convergence cuts are all but parallel."""
    for n, K in ((1, 6), (10, 12), (40, 10)) if ALL else ((1, 6), (10, 8)):
        y_init = domain.point(NUMPY, np.random.default_rng(n).standard_normal((5, n)))
        path = reference.bundle_entropy_argmin(network(kind, n, seed=K)[0], y_init, K, domain=domain)
        for k in range(1, K + 1):
            G, e = path.slopes[:, :k], path.offsets[:, :k]
            before = path.lam_history[:, k - 2, : k - 1] if k > 1 else None
            check(domain, G, e, BACKENDS[way].solve(G, e, before, domain, dtype), dtype)


@each
@each_domain
def test_a_warm_start_leads_to_the_same_answer(way, dtype, domain):
    backend, (G, e) = BACKENDS[way], rounded(dtype, *random_cuts(0, 7, 6, 10, 3.0))
    cold = backend.solve(G, e, domain=domain, dtype=dtype)
    for k_prev in (1, 3, 6):
        lam = cold.lam[:, :k_prev].astype(np.float64) + 1e-6  # of cuts that do not matter the kernel's are 0
        warm = backend.solve(G, e, lam / lam.sum(1, keepdims=True), domain, dtype)
        check(domain, G, e, warm, dtype)
        np.testing.assert_allclose(warm.y, cold.y, atol=IMPLIED[dtype] * (1 + np.abs(cold.y).max()))


@each
@each_domain
def test_an_empty_batch(way, dtype, domain):
    G, e, y = np.empty((0, 3, 5)), np.empty((0, 3)), np.empty((0, 5))
    for k_prev in (0, 2):
        check(domain, G, e, BACKENDS[way].solve(G, e, np.empty((0, k_prev)), domain, dtype), dtype)
    c_y, c_lam = BACKENDS[way].adjoint(G, e, e, y, domain, dtype)
    assert (c_y.shape, c_lam.shape) == ((0, 5), (0, 3))


@each
@each_domain
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_sample_poisons_itself_alone(way, dtype, domain, bad):
    G, e = random_cuts(4, 7, 5, 10, 3.0)
    clean = BACKENDS[way].solve(G, e, domain=domain, dtype=dtype)
    others = np.arange(7) != 2
    for place in ("slope", "offset"):
        slopes, offsets = G.copy(), e.copy()
        if place == "slope":
            slopes[2, 1, 3] = bad
        else:
            offsets[2, 1] = bad
        y, _, lower_bound, residual = got = BACKENDS[way].solve(slopes, offsets, domain=domain, dtype=dtype)
        assert np.isnan(y[2]).all()
        assert np.isnan(lower_bound[2])
        assert not np.isfinite(residual[2, [0, 2]]).any()
        for a, b in zip(got, clean, strict=True):
            np.testing.assert_array_equal(a[others], b[others])


@each_way
@each_domain
def test_a_sample_does_not_depend_on_its_neighbours(way, domain):
    """To rounding: matrix products of other batch sizes may block differently."""
    G, e = random_cuts(5, 9, 6, 20, 10.0)
    together = BACKENDS[way].solve(G, e, domain=domain)
    for i in range(len(G)):
        alone = BACKENDS[way].solve(G[i : i + 1], e[i : i + 1], domain=domain)
        np.testing.assert_allclose(alone.y[0], together.y[i], atol=1e-12 * (1 + np.abs(together.y[i]).max()))
        np.testing.assert_allclose(alone.lower_bound[0], together.lower_bound[i], rtol=1e-13)


@each_way
@each_domain
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_few_steps_say_what_they_left(way, domain, steps):
    G, e = random_cuts(3, 7, 5, 10, 20.0)
    y, lam, lower_bound, residual = BACKENDS[way].solve(G, e, domain=domain, steps=steps)
    own = certificate.kkt_residuals(G, e, lam, y, domain)
    size = 1.0 + np.abs(y).max()
    assert own[:, 0].max() <= 1e-13 * size
    np.testing.assert_allclose(residual[:, 2], own[:, 2], rtol=1e-9, atol=1e-11 * size)
    values = e + np.einsum("bkn,bn->bk", G, y - domain.centre(10))
    primal = values.max(1) + domain.regulariser(NUMPY, y)[:, 0]
    np.testing.assert_allclose(primal - lower_bound, own[:, 2], rtol=1e-9, atol=1e-11 * size**2)
    if steps == 0:
        assert residual[:, 2].max() > 1e-6


# --- The adjoint -----------------------------------------------------------------------------------


def check_adjoint(domain, G, e, lam, y_bar, found, dtype=np.float64):
    """The differential of the optimality conditions, at (c_y, c_λ) and a change of the height:

    c_y = −D(ȳ + G'c_λ)      1'c_λ = 0      λ_i (g_i'c_y − t) = w_i c_λi,  w = max v − v
    """
    G, e, lam, y_bar, c_y, c_lam = rounded(dtype, G, e, lam, y_bar, *found)
    s = -np.einsum("bkn,bk->bn", G, lam)
    y = domain.point(NUMPY, s)
    v = e + np.einsum("bkn,bn->bk", G, y - domain.centre(G.shape[2]))
    w = v.max(1, keepdims=True) - v
    slope, seed = np.abs(G).max((1, 2))[:, None], np.abs(y_bar).max(1, keepdims=True)
    c_size = 1.0 + np.abs(c_lam).max(1, keepdims=True)
    inner = domain.curvature(NUMPY, s, y_bar + np.einsum("bkn,bk->bn", G, c_lam))
    assert (np.abs(c_y + inner) <= ADJOINT[dtype] * (1.0 + seed + slope * c_size)).all()
    assert (np.abs(c_lam.sum(1, keepdims=True)) <= ADJOINT[dtype] * c_size).all()
    moved = np.einsum("bkn,bn->bk", G, c_y)
    left = lam * moved - w * c_lam
    scale = 1.0 + slope * np.abs(c_y).sum(1, keepdims=True) + np.abs(w * c_lam).max(1, keepdims=True)
    assert (np.abs(left - lam * left.sum(1, keepdims=True)) <= 10 * ADJOINT[dtype] * scale).all()


@each
@each_domain
@pytest.mark.parametrize("scale", [1e-2, 1.0, 10.0, 100.0])
def test_the_adjoint_solves_its_equations(way, dtype, domain, scale):
    for n, k, B in (*SIZES, (159, 10, 128)):
        G, e = rounded(dtype, *random_cuts(k, B, k, n, scale))
        (lam,) = rounded(dtype, BACKENDS[way].solve(G, e, domain=domain, dtype=dtype).lam)
        (y_bar,) = rounded(dtype, np.random.default_rng(n).standard_normal((B, n)))
        found = BACKENDS[way].adjoint(G, e, lam, y_bar, domain, dtype)
        assert all(a.dtype == dtype for a in found)
        check_adjoint(domain, G, e, lam, y_bar, found, dtype)


@each_way
@each_domain
def test_the_adjoint_shares_out_duplicates(way, domain):
    """How c_λ divides between duplicates is rounding; its equations and the sum over copies are not."""
    G, e = random_cuts(6, 20, 4, 6, 5.0)
    y_bar = np.random.default_rng(0).standard_normal((20, 6))
    backend = BACKENDS[way]
    single = backend.solve(G, e, domain=domain).lam
    c_y, c_lam = backend.adjoint(G, e, single, y_bar, domain)
    G, e, lam = np.concatenate([G, G], axis=1), np.concatenate([e, e], axis=1), np.concatenate([single, single], 1) / 2
    found = backend.adjoint(G, e, lam, y_bar, domain)
    check_adjoint(domain, G, e, lam, y_bar, found)
    np.testing.assert_allclose(found[0], c_y, atol=1e-9)
    np.testing.assert_allclose(found[1][:, :4] + found[1][:, 4:], c_lam, atol=1e-9)


@each_way
@each_domain
@pytest.mark.parametrize(("n", "k", "scale"), [(1, 1, 1.0), (10, 1, 1.0), (10, 5, 3.0), (3, 5, 2.0), (40, 10, 5.0)])
def test_the_adjoint_is_the_derivative_of_the_solve(way, domain, n, k, scale):
    """∂(ȳ'y)/∂e = c_λ and ∂(ȳ'y)/∂G = λ c_y' + c_λ (y − c)', by central differences along random directions."""
    B, step, backend = 7, 1e-5, BACKENDS[way]  # y is known to about 1e-12: all that a gap at rounding level tells
    G, e = random_cuts(n + k, B, k, n, scale)
    rng = np.random.default_rng(n)
    y_bar, G_dot, e_dot = rng.standard_normal((B, n)), rng.standard_normal(G.shape), rng.standard_normal(e.shape)
    at = backend.solve(G, e, domain=domain)
    c_y, c_lam = backend.adjoint(G, e, at.lam, y_bar, domain)
    G_bar = at.lam[:, :, None] * c_y[:, None, :] + c_lam[:, :, None] * (at.y - domain.centre(n))[:, None, :]
    derivative = (G_bar * G_dot).sum((1, 2)) + (c_lam * e_dot).sum(1)
    ahead, behind = (backend.solve(G + h * G_dot, e + h * e_dot, domain=domain).y for h in (step, -step))
    difference = (y_bar * (ahead - behind)).sum(1) / (2 * step)
    np.testing.assert_allclose(derivative, difference, rtol=1e-6, atol=1e-7)


# --- Whatever numbers come -------------------------------------------------------------------------


@each_way
@settings(max_examples=amount(200), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(0, 4),
    k=st.integers(1, 12),
    n=st.integers(1, 12),
    exponent=st.floats(-4, 4),
    offset_exponent=st.floats(-4, 4),
    repeats=st.integers(1, 3),
    dtype=st.sampled_from(list(TYPES)),
)
@example(seed=0, B=2, k=5, n=1, exponent=4.0, offset_exponent=4.0, repeats=3, dtype=np.float32)
def test_finite_cuts_give_finite_answers(way, seed, B, k, n, exponent, offset_exponent, repeats, dtype):
    dtype = dtype if (way, dtype) in WAYS else np.float64
    G, e = random_cuts(seed, B, k, n)
    G = np.repeat(G * 10.0**exponent, repeats, axis=1)
    e = np.repeat(e * 10.0**offset_exponent, repeats, axis=1)
    got = BACKENDS[way].solve(G, e, dtype=dtype)
    assert all(np.isfinite(a).all() for a in got)
    y, lam, _, residual = got
    # No silent failure: the complementarity reported is that of the answer handed out.
    size = np.abs(e).max(initial=0.0) + np.abs(G).max(initial=0.0) * n
    apart = np.abs(residual[:, 2] - references.evaluate(*rounded(dtype, G, e, lam)).complementarity)
    assert (apart <= (1e-10 if dtype == np.float64 else 1e-3) * (1 + size)).all()
    assert ((y >= 0) & (y <= 1)).all()
    assert (lam >= 0).all()
    assert (np.abs(lam.sum(1) - 1) <= 1e-5).all()
    c = BACKENDS[way].adjoint(G, e, lam, np.ones_like(y), dtype=dtype)
    assert all(np.isfinite(a).all() for a in c)
