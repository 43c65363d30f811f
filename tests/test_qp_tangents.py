"""Tangents of quadratic programs: against finite differences, and as the transpose of gradients."""

import numpy as np
import pytest
from quadratic_programs import ANSWER, mixed, solvable

import icnnrt
from icnnrt.mathematics.qp_status import QPStatus

NAMES = ("Q", "p", "G", "h_lower", "h", "A", "b", "lower", "upper")


def posed(qp, **more):
    given = {**qp._asdict(), **more}
    return icnnrt.qp(*(given[name] for name in "QpGhAb"), **{n: given[n] for n in ("h_lower", "lower", "upper")})


def directions(rng, qp):
    """Of every datum, and 0 where it is infinite."""
    found = {}
    for name, datum in qp._asdict().items():
        d = rng.standard_normal(datum.shape)
        found[name] = np.where(np.isfinite(datum), d, 0.0)
    return found


def named(dots):
    return {f"{name}_dot": value for name, value in dots.items()}


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("size", [(6, 4, 0), (8, 6, 2), (5, 0, 2), (3, 0, 0)])
def test_finite_differences(size, two_sided):
    known = solvable(1, 5, *size, two_sided=two_sided, box=two_sided)
    rng = np.random.default_rng(2)
    dots, t = directions(rng, known.qp), 1e-6
    moved = [posed(known.qp, **{n: known.qp._asdict()[n] + s * t * dots[n] for n in NAMES}) for s in (1.0, -1.0)]
    assert moved[0].ok.all()
    tangents = posed(known.qp).jvp(**named(dots))
    for name in ("z", "lam", "nu", "bound_multipliers"):
        difference = (getattr(moved[0], name) - getattr(moved[1], name)) / (2 * t)
        np.testing.assert_allclose(getattr(tangents, name), difference, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("native", [None, False])
@pytest.mark.parametrize("kind", ["random", "low rank", "scaled rows", "degenerate"])
def test_the_transpose_of_gradients(kind, native):
    known = solvable(3, 4, 8, 6, 2, kind, two_sided=True, box=True)
    given = known.qp._asdict()
    sides = {n: given[n] for n in ("h_lower", "lower", "upper")}
    solution = icnnrt.qp(*(given[name] for name in "QpGhAb"), **sides, native=native)
    rng = np.random.default_rng(4)
    dots = directions(rng, known.qp)
    bars = {name: rng.standard_normal(getattr(solution, name).shape) for name in ANSWER.values()}
    tangents, gradients = solution.jvp(**named(dots)), solution.vjp(*bars.values())
    forward = sum((getattr(tangents, name) * bar).reshape(4, -1).sum(1) for name, bar in bars.items())
    terms = [(getattr(gradients, name) * dot).reshape(4, -1) for name, dot in dots.items()]
    backward = sum(term.sum(1) for term in terms)
    size = sum(abs(term).sum(1) for term in terms)
    assert (abs(forward - backward) <= 1e-9 * size).all(), (forward, backward)


def test_every_datum_alone_and_in_every_shape():
    known = solvable(5, 3, 6, 4, 2, two_sided=True, box=True)
    solution = posed(known.qp)
    dots = directions(np.random.default_rng(6), known.qp)
    whole = solution.jvp(**named(dots))
    alone = [solution.jvp(**named({name: dot})) for name, dot in dots.items()]
    np.testing.assert_allclose(sum(tangent.z for tangent in alone), whole.z, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(solution.jvp(b_dot=1.0).z, solution.jvp(b_dot=np.ones(2)).z)
    np.testing.assert_array_equal(solution.jvp(p_dot=dots["p"][:1]).z, solution.jvp(p_dot=dots["p"][0]).z)
    one = icnnrt.qp(known.qp.Q[0], known.qp.p[0])
    tangent = one.jvp(p_dot=np.ones(6))
    assert tangent.z.shape == (6,)
    np.testing.assert_allclose(tangent.z, -np.linalg.solve(known.qp.Q[0], np.ones(6)), rtol=1e-9)


def test_float32_data():
    known = solvable(7, 3, 6, 4, 2)
    single = icnnrt.qp(*(known.qp._asdict()[name].astype(np.float32) for name in "QpGhAb"))
    wide = icnnrt.qp(*(known.qp._asdict()[name].astype(np.float32).astype(float) for name in "QpGhAb"))
    dot = np.random.default_rng(8).standard_normal(known.qp.p.shape)
    found = single.jvp(p_dot=dot)
    assert found.z.dtype == np.float32
    np.testing.assert_allclose(found.z, wide.jvp(p_dot=dot).z, rtol=1e-4, atol=1e-4)


def test_samples_without_an_answer_have_none():
    qp, wanted = mixed(9)
    solution = posed(qp)
    tangents = solution.jvp(p_dot=np.ones_like(solution.z))
    good = wanted == QPStatus.SOLVED
    for tangent in tangents:
        assert np.isnan(tangent[~good]).all()
        assert np.isfinite(tangent[good]).all()
    with pytest.raises(icnnrt.errors.CertificateError, match="no gradient can be trusted"):
        solution.jvp(p_dot=np.ones_like(solution.z), on_unsafe="raise")


@pytest.mark.parametrize(
    ("dots", "said"),
    [
        ({"h_dot": np.ones(2)}, "h_dot: expected none, as the problem has no h, but got shape"),
        ({"p_dot": np.ones(4)}, r"p_dot: expected shape \[3\] or \[1, 3\], but got \[4\]"),
        ({"p_dot": "up"}, "p_dot: expected real numbers"),
        ({"p_dot": 1.0}, r"p_dot: expected shape \[3\] or \[1, 3\], but got \[\]"),
        ({"on_unsafe": "skip"}, "on_unsafe: expected 'nan', 'raise' or 'use', but got 'skip'"),
    ],
)
def test_wrong_tangents(dots, said):
    with pytest.raises(icnnrt.InputError, match=said):
        icnnrt.qp(np.eye(3), np.ones(3)).jvp(**dots)
