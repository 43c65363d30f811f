"""`icnnrt.qp` and its gradients: by finite differences, by the float64 statement, and by the certificate."""

import copy
import pickle
import re

import numpy as np
import onnxruntime
import pytest
from quadratic_programs import ANSWER, mixed, solvable, unsolvable

import icnnrt
from icnnrt import CertificateError, InputError, MissingDependencyError, ProviderError, Status, native_library
from icnnrt.mathematics.qp_reference import QP, kkt_residual, qp_adjoint, qp_gradients, qp_solve
from icnnrt.mathematics.qp_status import STATUSES, QPStatus, statuses


def kernels() -> bool:
    there = native_library.build().library is not None
    return there and "QuadraticProgram" in native_library.kernels(onnxruntime).operators


each_dtype = pytest.mark.parametrize("dtype", [np.float64, np.float32])
KKT = {np.float64: 1e-9, np.float32: 1e-5}
REFERENCE = {np.float64: 1e-6, np.float32: 1e-3}
FINITE_DIFFERENCES = 1e-6  # central, h = 1e-5, of a solver that is exact to 1e-11


@pytest.fixture(params=[False, True] if kernels() else [False], ids=lambda native: "native" if native else "portable")
def native(request):
    return request.param


EYE, ONES = np.eye(2), np.ones(2)


def data(qp, dtype=np.float64, **changed):
    """Arguments of icnnrt.qp by name."""
    return {name: np.asarray(a, dtype) for name, a in {**qp._asdict(), **changed}.items()}


def problem(seed=2, B=5, n=8, m=6, q=2, kind="random"):
    return solvable(seed, B, n, m, q, kind, two_sided=True, box=True).qp


def bars_of(solution, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal(np.shape(a)) for a in (solution.z, solution.lam, solution.nu, solution.bound_multipliers)
    ]


@each_dtype
def test_solution_and_gradients_are_the_references(native, dtype):
    qp = QP(*(a.astype(dtype).astype(np.float64) for a in problem()))
    expected = qp_solve(qp, precision=dtype)
    solution = icnnrt.qp(**data(qp, dtype), native=native)
    assert solution.native is native
    assert len(solution) == 5
    assert solution.ok.all()
    answer = [getattr(solution, name) for name in ANSWER.values()]
    for found, name in zip(answer, ANSWER, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, getattr(expected, name), atol=REFERENCE[dtype] / 10)
    assert kkt_residual(qp, *(a.astype(np.float64) for a in answer)).max() <= KKT[dtype]
    bars = bars_of(solution)
    gradients = solution.vjp(*bars)
    wanted = qp_gradients(expected, qp_adjoint(qp.Q, qp.G, qp.A, expected, *bars))
    for name in qp._fields:
        got, reference = getattr(gradients, name), getattr(wanted, name)
        assert got.dtype == dtype
        assert got.shape == getattr(qp, name).shape
        assert np.abs(got - reference).max() <= REFERENCE[dtype] * (1 + np.abs(reference).max())
    only_z = solution.vjp(bars[0]).p
    np.testing.assert_allclose(only_z, solution.vjp(bars[0], *(0 * bar for bar in bars[1:])).p, rtol=1e-6, atol=1e-6)
    assert not solution.vjp().p.any()


@pytest.mark.parametrize("shared", [(), ("Q", "G", "A"), ("p", "h", "upper"), QP._fields])
def test_gradients_match_central_differences(native, shared):
    qp = problem(B=3, n=5, m=4, q=1)
    # Bounds that are far from one another leave the samples solvable with the rows of the first.
    wide = {"h": qp.h + 3, "h_lower": qp.h_lower - 3, "lower": qp.lower - 3, "upper": qp.upper + 3}
    arguments = data(qp, **(wide if shared else {}))
    arguments |= {name: arguments[name][0] for name in shared}
    arguments["p"] = arguments["p"] * 3  # so that bounds are active
    solution = icnnrt.qp(**arguments, native=native)
    bars = bars_of(solution)
    gradients = solution.vjp(*bars)
    assert (solution.status == Status.CONVERGED).all() if len(shared) < 9 else solution.ok
    rng = np.random.default_rng(1)
    for name in QP._fields:
        v = rng.standard_normal(arguments[name].shape)
        v = v + v.swapaxes(-1, -2) if name == "Q" else v

        def loss(by, name=name, v=v):
            moved = icnnrt.qp(**{**arguments, name: arguments[name] + by * v}, native=native)
            answer = (getattr(moved, name) for name in ANSWER.values())
            return sum((a * bar).sum() for a, bar in zip(answer, bars, strict=True))

        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
        exact = (getattr(gradients, name) * v).sum()
        scale = 1 + np.abs(getattr(gradients, name) * v).sum()
        assert abs(numeric - exact) <= 10 * FINITE_DIFFERENCES * scale, name


def test_what_is_shared_gets_the_sum(native):
    qp = problem(B=1)
    rng = np.random.default_rng(0)
    each = data(QP(*(np.repeat(a, 4, 0) for a in qp)), p=qp.p + rng.standard_normal((4, 8)))
    own = icnnrt.qp(**each, native=native)
    bars = bars_of(own)
    wanted = own.vjp(*bars)
    for share in (lambda a: a[0], lambda a: a[:1]):
        together = icnnrt.qp(**{name: a if name == "p" else share(a) for name, a in each.items()}, native=native)
        np.testing.assert_allclose(together.z, own.z, atol=1e-12)
        got = together.vjp(*bars)
        for name in QP._fields:
            rows = getattr(wanted, name)
            expected = rows if name == "p" else share(rows.sum(0, keepdims=True))
            assert getattr(got, name).shape == expected.shape
            np.testing.assert_allclose(getattr(got, name), expected, rtol=1e-6, atol=1e-7)


@each_dtype
def test_without_batch_axes_there_is_none_in_the_answer(native, dtype):
    arguments = data(problem(), dtype)
    batch = icnnrt.qp(**arguments, native=native)
    one = icnnrt.qp(**{name: a[0] for name, a in arguments.items()}, native=native)
    for name in (*ANSWER.values(), "slack", "box_slack", "residual", "ray"):
        assert getattr(one, name).shape == getattr(batch, name).shape[1:]
        np.testing.assert_allclose(getattr(one, name), getattr(batch, name)[0], rtol=1e-3, atol=1e-9)
    assert one.status is Status.CONVERGED
    assert one.ok is True
    assert len(one) == 1
    bars = bars_of(batch)
    got, wanted = one.vjp(*(bar[0] for bar in bars)), batch.vjp(*bars)
    for name in QP._fields:
        assert getattr(got, name).shape == arguments[name].shape[1:]
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name)[0], rtol=1e-4, atol=1e-5)


def test_parts_that_are_not_there(native):
    Q, p = np.diag([1.0, 2.0]), np.array([-1.0, -2.0])
    free = icnnrt.qp(Q, p, native=native)
    np.testing.assert_allclose(free.z, [1, 1])
    assert (free.lam.shape, free.nu.shape) == ((0,), (0,))
    gradients = free.vjp(np.array([1.0, 0.0]))
    np.testing.assert_allclose(gradients.p, [-1, 0], atol=1e-12)
    assert [getattr(gradients, name) for name in QP._fields[2:]] == [None] * 7

    boxed = icnnrt.qp(Q, p, lower=-5, upper=0.5, native=native)
    np.testing.assert_allclose(boxed.z, [0.5, 0.5], atol=1e-8)
    gradients = boxed.vjp(np.array([1.0, 3.0]))
    assert gradients.upper.shape == ()
    np.testing.assert_allclose(gradients.upper, 4, rtol=1e-6)
    assert gradients.lower == 0

    ranged = icnnrt.qp(Q, p, np.array([[1.0, 0.0]]), h_lower=np.array([1.5]), native=native)
    np.testing.assert_allclose(ranged.z, [1.5, 1], atol=1e-8)
    np.testing.assert_allclose(ranged.lam, [-0.5], atol=1e-8)
    np.testing.assert_allclose(ranged.vjp(np.array([1.0, 0.0])).h_lower, [1], rtol=1e-6)

    tied = icnnrt.qp(Q, p, A=np.ones((1, 2)), b=np.array([3.0]), native=native)
    assert tied.z.sum() == pytest.approx(3)
    none = icnnrt.qp(np.zeros((0, 2, 2)), p, native=native)
    assert none.z.shape == (0, 2)
    np.testing.assert_array_equal(none.vjp(none.z).p, [0, 0])


@each_dtype
def test_samples_that_are_not_solved(native, dtype):
    qp, wanted = mixed(7)
    arguments = data(qp, dtype)
    solution = icnnrt.qp(**arguments, native=native)
    good = solution.ok
    assert good[wanted == QPStatus.SOLVED].all()
    if dtype == np.float64:
        assert (solution.status == statuses(wanted)).all()
    z_bar = np.where(good[:, None], np.ones_like(solution.z), np.nan)
    gradients = solution.vjp(z_bar)
    for name in QP._fields:
        rows = getattr(gradients, name).reshape(len(good), -1)
        assert np.isnan(rows[~good]).all()
        assert np.isfinite(rows[good]).all()
    assert not gradients.skipped.any()

    with pytest.raises(CertificateError, match=r"sample 2: .*; and \d+ more\. Pass on_unsafe='skip'"):
        solution.vjp(z_bar, on_unsafe="raise")
    skipped = solution.vjp(z_bar, on_unsafe="skip")
    np.testing.assert_array_equal(skipped.skipped, ~good)
    with pytest.raises(InputError, match="on_unsafe: expected 'nan', 'raise', 'use' or 'skip', but got 'no'"):
        solution.vjp(z_bar, on_unsafe="no")

    # Sharing Q, which all but one of the samples with a broken Q have as good as any other
    one = {**arguments, "Q": np.eye(12, dtype=dtype)}
    solution = icnnrt.qp(**one, native=native)
    bars = np.where(solution.ok[:, None], np.ones_like(solution.z), np.nan)
    rows = icnnrt.qp(**{**one, "Q": np.repeat(one["Q"][None], len(good), 0)}, native=native).vjp(bars).Q
    assert np.isnan(solution.vjp(bars).Q).all()
    kept = solution.vjp(bars, on_unsafe="skip").Q
    np.testing.assert_allclose(kept, rows[solution.ok].sum(0), rtol=1e-4, atol=1e-5)


def test_one_problem_that_is_not_solved(native):
    infeasible = icnnrt.qp(EYE, ONES, np.array([[1.0, 0.0], [-1.0, 0.0]]), -ONES, lower=-5.0, native=native)
    assert infeasible.status is Status.INFEASIBLE
    assert np.isnan(infeasible.z).all()
    nan, zero = infeasible.vjp(ONES), infeasible.vjp(ONES, on_unsafe="skip")
    for name, shape in (("Q", (2, 2)), ("p", (2,)), ("G", (2, 2)), ("h", (2,)), ("lower", ())):
        assert getattr(nan, name).shape == getattr(zero, name).shape == shape
        assert np.isnan(getattr(nan, name)).all()
        assert not np.any(getattr(zero, name))
    with pytest.raises(CertificateError, match="at 1 of 1 samples: INFEASIBLE, sample 0: no z meets"):
        infeasible.vjp(ONES, on_unsafe="raise")


def test_a_start_is_taken_where_it_is_one(native):
    arguments = data(problem())
    first = icnnrt.qp(**arguments, native=native)
    arguments["p"] = arguments["p"] + 1e-3
    cold, warm = icnnrt.qp(**arguments, native=native), icnnrt.qp(**arguments, start=first, native=native)
    np.testing.assert_allclose(warm.z, cold.z, atol=1e-6)
    broken = arguments["p"].copy()
    broken[1] = np.nan
    part = icnnrt.qp(**{**arguments, "p": broken}, native=native)
    again = icnnrt.qp(**arguments, start=part, native=native)
    np.testing.assert_allclose(again.z, cold.z, atol=1e-6)
    with pytest.raises(InputError, match=r"start: expected a QPSolution, but got ndarray; pass what"):
        icnnrt.qp(**arguments, start=first.z)
    with pytest.raises(InputError, match=r"start: expected a solution of 5 samples with n, m, q = 8, 6, 2 .* 8, 0, 0"):
        icnnrt.qp(**arguments, start=icnnrt.qp(arguments["Q"], arguments["p"], native=native))


def test_advice_has_what_the_data_say(native):
    qp, _ = mixed(7)
    solution = icnnrt.qp(**data(qp), native=native)
    for i in range(len(solution)):
        assert solution.advice(i).startswith(f"sample {i}: ")
    at = {Status(int(code)): i for i, code in enumerate(solution.status)}
    assert "Q has the eigenvalue -1.0e-02" in solution.advice(at[Status.NOT_CONVEX])
    assert "in p: clean it" in solution.advice(at[Status.NOT_FINITE_INPUT])
    assert "as `ray` proves" in solution.advice(at[Status.INFEASIBLE])
    assert solution.advice(-1) == solution.advice(len(solution) - 1)
    with pytest.raises(IndexError):
        solution.advice(len(solution))
    crossed = icnnrt.qp(np.eye(2), np.ones(2), lower=1.0, upper=np.array([2.0, 0.0]), native=native)
    assert crossed.status is Status.INFEASIBLE
    assert "lower[1] = 1.0 exceeds upper[1] = 0.0: exchange" in crossed.advice()
    assert crossed.ok is False
    broken = {"Q": np.full((2, 2), -np.inf), "p": np.inf * ONES, "h": -np.inf * ONES, "h_lower": np.nan * ONES}
    whole = {"Q": EYE, "p": ONES, "G": EYE, "h": np.inf * ONES, "h_lower": -ONES}
    for name, value in broken.items():
        solution = icnnrt.qp(**{**whole, name: value}, native=native)
        assert solution.status is Status.NOT_FINITE_INPUT
        assert f"no absent bound, in {name}: clean it" in solution.advice()
    solution = icnnrt.qp(**data(qp), native=native)
    head, *rest = solution.summary().splitlines()
    assert head.startswith("13 CONVERGED, ")
    assert len(rest) == len(set(solution.status.tolist())) - 1
    assert repr(solution).startswith("<QPSolution of 24 x 12: 13 CONVERGED, ")
    assert repr(solution.vjp(0 * solution.z, on_unsafe="skip")).endswith("and 24 samples, 11 skipped>")


def test_rays_prove(native):
    qp, wanted = unsolvable(1, 2, 10, 10, 3, "combined rows")
    solution = icnnrt.qp(**data(qp), native=native)
    assert (solution.status == STATUSES[wanted]).all()
    _, lam, nu, mu = np.split(solution.ray, np.cumsum([10, 10, 3]), axis=1)
    combined = np.einsum("bmn,bm->bn", qp.G, lam) + np.einsum("bqn,bq->bn", qp.A, nu) + mu
    assert np.abs(combined).max() <= 1e-6
    np.testing.assert_allclose((lam * qp.h).sum(1) + (nu * qp.b).sum(1), -1, rtol=1e-6)


def test_arrays_are_read_only_and_solutions_travel(native):
    arguments = data(problem())
    solution = icnnrt.qp(**arguments, native=native)
    with pytest.raises(ValueError, match="read-only"):
        solution.z[0] = 0
    z_bar = np.ones_like(solution.z)
    for other in (copy.copy(solution), pickle.loads(pickle.dumps(solution))):  # noqa: S301
        np.testing.assert_array_equal(other.vjp(z_bar).G, solution.vjp(z_bar).G)


def test_layouts_do_not_matter(native):
    arguments = data(problem())
    expected = icnnrt.qp(**arguments, native=native)
    turned = {name: np.asfortranarray(a) for name, a in arguments.items()}
    turned["G"] = np.ascontiguousarray(arguments["G"][:, ::-1])[:, ::-1]
    np.testing.assert_array_equal(icnnrt.qp(**turned, native=native).z, expected.z)
    as_lists = icnnrt.qp(**{name: a.tolist() for name, a in arguments.items()}, native=native)
    np.testing.assert_array_equal(as_lists.z, expected.z)
    wide = expected.vjp(np.ones_like(expected.z, np.float32), lam_bar=np.ones_like(expected.lam).tolist())
    np.testing.assert_array_equal(wide.p, expected.vjp(np.ones_like(expected.z), np.ones_like(expected.lam)).p)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"Q": np.ones((2, 3))}, r"Q: expected a square matrix \[n, n\] or a batch .* but got shape \[2, 3\]; the obj"),
        ({"Q": np.ones(2)}, r"Q: expected a square matrix"),
        ({"Q": np.ones((0, 0))}, r"Q: expected a square matrix"),
        ({"Q": np.eye(2, dtype=complex)}, r"Q: expected float32 or float64, but got complex128; convert"),
        ({"Q": np.eye(2, dtype=bool)}, r"Q: expected float32 or float64, but got bool; convert"),
        ({"Q": 3**38 * np.eye(2, dtype=int)}, r"Q: expected numbers that float64 holds exactly, but got int64"),
        ({"Q": "no"}, r"Q: expected float32 or float64, but got <U2"),
        ({"Q": [[1.0], [1.0, 2.0]]}, r"Q: expected an array, but got list, which does not convert to one"),
        ({"p": np.ones(2, np.float32)}, r"p: expected float64, as Q is, but got float32; convert"),
        ({"p": np.ma.masked_array(ONES, [True, False])}, r"p: expected numbers without a mask"),
        ({"p": np.ones(3)}, r"p: expected shape \[2\] or, for a batch, \[B, 2\], but got \[3\]; p has an entry for"),
        ({"p": None}, r"p: expected float64, as Q is, but got object"),
        (
            {"h": ONES},
            r"G: expected a row for each bound .*, as h was given, but got none; pass G with it, or leave h out",
        ),
        (
            {"G": EYE},
            r"h: expected an entry for each row of G, as G was given, but got none; pass h or h_lower with it",
        ),
        ({"G": np.ones((4, 3)), "h": np.ones(4)}, r"G: expected shape \[m, 2\] or, for a batch, \[B, m, 2\], but got"),
        ({"G": ONES, "h": np.ones(1)}, r"G: expected shape \[m, 2\]"),
        ({"G": np.ones((4, 2)), "h": np.ones(3)}, r"h: expected shape \[4\] .* but got \[3\]; h has an entry for each"),
        ({"G": np.ones((4, 2)), "h_lower": np.ones(3)}, r"h_lower: expected shape \[4\]"),
        (
            {"A": EYE},
            r"b: expected an entry for each row of A, as A was given, but got none; pass b with it, or leave A",
        ),
        ({"b": ONES}, r"A: expected a row for each equality .*, as b was given"),
        ({"A": np.ones((1, 2)), "b": ONES}, r"b: expected shape \[1\] .* b has an entry for each row of A"),
        ({"lower": np.ones((2, 2, 2))}, r"lower: expected shape \[2\]"),
        (
            {"Q": np.ones((3, 2, 2)), "p": np.ones((2, 2))},
            r"p: expected 3 samples, as Q has, or 1 for all, but got 2; data share one batch",
        ),
        ({"threads": 0}, r"threads: expected an integer from 1 to \d+ or None, but got 0"),
        ({"native": "yes"}, r'native: expected True or False, but got "yes"'),
        ({"providers": []}, r"providers: expected a list such as"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        icnnrt.qp(**{"Q": EYE, "p": ONES, **arguments})


def test_bad_bars_are_named(native):
    solution = icnnrt.qp(EYE, ONES, native=native)
    with pytest.raises(InputError, match=r"z_bar: expected shape \[2\], that of z, but got \[1, 2\]; it is the deriv"):
        solution.vjp(np.ones((1, 2)))
    with pytest.raises(InputError, match=r"lam_bar: expected shape \[0\], that of lam, but got \[1\]"):
        solution.vjp(ONES, np.ones(1))
    with pytest.raises(
        InputError, match=r"z_bar: expected an array of numbers, but got str, which does not convert to one"
    ):
        solution.vjp("no")


@pytest.mark.parametrize("threads", [True, 1.0, 0, [1]])
def test_threads_are_a_count_whatever_is_cached(threads):
    icnnrt.qp(EYE, ONES, threads=1)
    with pytest.raises(InputError, match="threads: expected an integer from 1"):
        icnnrt.qp(EYE, ONES, threads=threads)


def test_what_is_missing_is_said():
    with pytest.raises(ProviderError, match="providers: NoSuchProvider is not in this onnxruntime"):
        icnnrt.qp(EYE, ONES, providers=["NoSuchProvider"])
    some = icnnrt.qp(EYE, ONES, providers=[("CPUExecutionProvider", {})], threads=2, native=False)
    np.testing.assert_allclose(some.vjp(ONES).p, -ONES)
    if not kernels():
        with pytest.raises(MissingDependencyError, match="native: "):
            icnnrt.qp(EYE, ONES, native=True)


def test_integers_and_sparse_matrices_are_data():
    sparse = pytest.importorskip("scipy.sparse")
    Q, p, G, h = np.array([[4, 1], [1, 3]]), np.array([1, -2]), np.array([[1, 1], [0, 1]]), np.array([0, 1])
    given = Q, p, G, h
    wanted = icnnrt.qp(*(a.astype(float) for a in given))
    assert wanted.ok
    for kind in (sparse.csc_matrix, sparse.csr_array, sparse.coo_array):
        found = icnnrt.qp(kind(Q), p, kind(G), h)
        np.testing.assert_array_equal(found.z, wanted.z)
        solver = icnnrt.QPSolver(2, 2)
        np.testing.assert_array_equal(solver.solve(kind(Q), p, kind(G.astype(float)), h)[0], wanted.z)
        np.testing.assert_array_equal(found.vjp(np.ones(2)).Q, wanted.vjp(np.ones(2)).Q)
    assert icnnrt.qp(Q.astype(np.float32), p, G, h).z.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e20, 3e25])
def test_bounds_of_1e20_are_none(dtype, size):
    Q, p, G = np.eye(2, dtype=dtype), np.array([3.0, -2.0], dtype), np.ones((1, 2), dtype)
    far = np.full(2, size, dtype)
    given = {"h_lower": -far[:1], "h": far[:1], "lower": -far, "upper": far}
    wanted = icnnrt.qp(Q, p)
    found = icnnrt.qp(Q, p, G, **given)
    np.testing.assert_array_equal(found.z, wanted.z)
    np.testing.assert_array_equal(found.bound_multipliers, 0.0)
    solver = icnnrt.QPSolver(2, 1, dtype=np.dtype(dtype).name, box=True, two_sided=True)
    solver.solve(Q, p, G, **given)
    np.testing.assert_array_equal(solver.z[0], wanted.z)
    crossed = icnnrt.qp(Q, p, lower=far)
    assert crossed.status == Status.NOT_FINITE_INPUT


def test_what_is_added_to_the_diagonal_is_enough():
    """By two digits, as advice has it."""
    for least in np.random.default_rng(4).uniform(0.1, 1.0, 200):
        Q = np.diag([1.0, -least])
        more = re.search(r"add (\S+) to the diagonal", icnnrt.qp(Q, np.zeros(2)).advice())
        assert more
        assert icnnrt.qp(Q + float(more[1]) * np.eye(2), np.zeros(2)).ok


def test_a_crossing_of_one_digit_in_the_last_place_is_seen_in_the_advice():
    crossed = icnnrt.qp(np.eye(1), np.zeros(1), lower=0.1 + 0.2, upper=0.3)
    assert "lower[0] = 0.30000000000000004 exceeds upper[0] = 0.3: exchange" in crossed.advice()
