"""The portable bodies of ai.icnnrt::QPSolve and ::QPAdjoint, run by ONNX Runtime, against the float64 statement.

Where multipliers are not unique (duplicate rows, equalities that depend on each other) or z is not (no curvature), they
are compared through the residuals and the objective that they give.
"""

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx_functions import all_nodes, check_portable
from quadratic_programs import (
    KINDS,
    SIZES,
    UNSOLVABLE,
    agree,
    bundle_models,
    determined,
    mixed,
    most_unsolved,
    receding_horizon,
    solvable,
    unsolvable,
)

import icnnrt
from icnnrt.mathematics.qp_reference import QP, QPCotangents, QPReference, kkt_residual, qp_adjoint, qp_solve
from icnnrt.mathematics.qp_status import QPStatus
from icnnrt_exporters.operators.bodies import functions_qp
from icnnrt_exporters.operators.operator_graphs import operator_graphs, qp_model

TYPES = (np.float64, np.float32)
KEPT = ("lam", "mu", "slack", "box_slack", "status")  # what QPAdjoint takes of what QPSolve gave
KKT = {np.float64: 1e-9, np.float32: 1e-6}  # relative, what SOLVED promises
# Both sides stop at a residual of 1e-12, and so differ by its root where an active multiplier or slack is small.
UNIQUE = {np.float64: 1e-6, np.float32: 1e-5}
ADJOINT = {np.float64: 1e-7, np.float32: 1e-5}
# Nodes in the bodies of the Loops, constants aside: one step, a factorisation counted as one; one pivot.
STEP_NODES, PIVOT_NODES = 303, 13

each_dtype = pytest.mark.parametrize("dtype", TYPES)
functions = functools.cache(functions_qp)


def model(op: str, dtype: type, **attributes: int) -> onnx.ModelProto:
    return qp_model(op, np.dtype(dtype).name, **attributes)


@functools.cache
def session(op: str, dtype: type, **attributes: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    serialised = model(op, dtype, **attributes).SerializeToString()
    return onnxruntime.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])


def rounded(qp: QP, dtype: type) -> QP:
    return QP(*(a.astype(dtype).astype(np.float64) for a in qp))


def solve(qp, start=None, dtype=np.float64, steps=50):
    start = np.zeros((1, 0)) if start is None else start
    feeds = {name: a.astype(dtype) for name, a in {**qp._asdict(), "start": start}.items()}
    return QPReference(*session("QPSolve", dtype, steps=steps).run(None, feeds))


def adjoint(qp, solution, z_bar, lam_bar=None, nu_bar=None, mu_bar=None, dtype=np.float64):
    feeds = {name: getattr(qp, name) for name in "QGA"} | {name: getattr(solution, name) for name in KEPT}
    bars = {"z_bar": z_bar, "lam_bar": lam_bar, "nu_bar": nu_bar, "mu_bar": mu_bar}
    feeds |= {name: np.zeros((1, 0)) if bar is None else bar for name, bar in bars.items()}
    feeds = {name: a if name == "status" else a.astype(dtype) for name, a in feeds.items()}
    return QPCotangents(*session("QPAdjoint", dtype).run(None, feeds))


def check(qp, dtype=np.float64, start=None, unique=True):
    """Statuses, residuals, objective; and z and the multipliers where they are unique."""
    qp = rounded(qp, dtype)
    expected = qp_solve(qp, precision=dtype)
    got = solve(qp, start, dtype)
    assert agree(got.status, expected.status).all(), (got.status, expected.status)
    for name, a, b in zip(QPReference._fields, got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == {"residual": np.float64, "status": np.int32}.get(name, dtype)
    good = (got.status == QPStatus.SOLVED) & (expected.status == QPStatus.SOLVED)
    assert got.residual[good].max(initial=0.0) <= KKT[dtype]
    assert (got.slack[good] > 0).all()
    assert (got.box_slack[good] > 0).all()
    if dtype == np.float64:
        residual = kkt_residual(QP(*(a[good] for a in qp)), *(a[good] for a in got[:4]))
        assert (got.residual[good] >= 0.999 * residual - 1e-14).all()  # the larger one of two units
    objective = [0.5 * np.einsum("bi,bij,bj->b", a.z, qp.Q, a.z) + (qp.p * a.z).sum(1) for a in (got, expected)]
    off = np.abs(objective[0] - objective[1]) / (1 + np.abs(objective[1]))
    assert off[good].max(initial=0.0) <= UNIQUE[dtype]
    if unique:
        for a, b in zip(got[:4], expected[:4], strict=True):
            assert np.abs(a - b)[good].max(initial=0.0) <= UNIQUE[dtype] * (1 + np.abs(b[good]).max(initial=0.0))
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
def test_what_is_solvable_is_solved(kind, size, box):
    qp = solvable(0, 6, *size, kind, two_sided=box, box=box).qp
    found = check(qp, unique=kind in ("random", "ill-conditioned", "scaled rows", "scaled columns") and size[0] > 1)
    assert kind == "linear" or (found.status != QPStatus.SOLVED).sum() <= most_unsolved(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(10, 10, 3), (4, 0, 0), (1, 1, 0)], ids=str)
def test_float32(kind, size):
    check(solvable(1, 3, *size, kind, two_sided=True, box=True).qp, np.float32, unique=kind == "random" and size[0] > 1)


@pytest.mark.parametrize("by", [1e-8, 1e8])
def test_units_do_not_matter(by):
    qp = solvable(3, 4, 10, 10, 3, two_sided=True, box=True).qp
    z = solve(qp).z
    for names, of_z in ((("p", "h_lower", "h", "b", "lower", "upper"), by), (("Q", "p"), 1.0)):
        scaled = solve(qp._replace(**{name: by * getattr(qp, name) for name in names}))
        assert (scaled.status == QPStatus.SOLVED).all()
        np.testing.assert_allclose(scaled.z / of_z, z, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "scaled columns"])
def test_bounds_of_1e30_are_none(kind):
    qp = solvable(0, 4, 10, 10, 3, kind).qp
    none = {name: np.clip(getattr(qp, name), -1e30, 1e30) for name in ("h_lower", "lower", "upper")}
    for a, b in zip(solve(qp._replace(**none)), solve(qp), strict=True):
        np.testing.assert_array_equal(a, b)


@each_dtype
def test_far_away_is_not_infeasible_and_steep_not_unbounded(dtype):
    rng = np.random.default_rng(0)
    G, z = rng.standard_normal((4, 8, 10)), 1e7 * rng.standard_normal((4, 10))
    free = solvable(0, 4, 10, 8, 0).qp._replace(G=G, h=np.full((4, 8), np.inf))
    r = np.einsum("bij,bj->bi", G, z)
    assert (solve(free._replace(h_lower=r - 1, h=r + 1), dtype=dtype).status == QPStatus.SOLVED).all()
    for by in (1e6, 1e9):
        qp = free._replace(Q=np.diag(np.linspace(0.1, 1, 10))[None], p=by * free.p)
        assert (solve(qp, dtype=dtype).status == QPStatus.SOLVED).all()


def test_what_float32_cannot_hold_is_no_answer():
    qp = solvable(0, 1, 4, 0, 0).qp._replace(Q=1e-30 * np.eye(4)[None], p=np.full((1, 4), 1e15))
    assert solve(qp).status == QPStatus.SOLVED
    found = solve(qp, dtype=np.float32)
    assert found.status == QPStatus.FAILED
    assert np.isnan(np.concatenate([*found[:6], found.residual], 1)).all()


def test_controllers_of_unstable_systems():
    check(receding_horizon(0, 10))


def test_steps_that_would_cycle():
    check(bundle_models(1, 40, cuts=1))


@pytest.mark.parametrize("why", UNSOLVABLE)
@pytest.mark.parametrize("size", [(10, 10, 3), (8, 4, 2)], ids=str)
def test_what_is_not_solvable_says_why(why, size):
    qp, wanted = unsolvable(1, 4, *size, why)
    got, expected = solve(qp), qp_solve(qp)
    assert (got.status == wanted).all(), got.status
    np.testing.assert_allclose(got.ray, expected.ray, atol=1e-6)
    assert np.isnan(np.concatenate([*got[:6], got.residual], 1)).all()


@each_dtype
def test_a_mixed_batch(dtype):
    qp, wanted = mixed(7)
    together = check(qp, dtype)
    if dtype == np.float64:
        assert (together.status == wanted).all()
    for i in (0, 1, 2, 9, 14, 21):
        alone = solve(QP(*(a[i : i + 1] for a in qp)), dtype=dtype)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[i], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", QP._fields)
def test_a_bad_number_spoils_its_own_sample_alone(name, bad):
    qp = solvable(4, 3, 5, 4, 2, two_sided=True, box=True).qp
    clean = solve(qp)
    value = getattr(qp, name).copy()
    value[1].flat[0] = bad
    spoilt = qp._replace(**{name: value})
    got = solve(spoilt)
    assert got.status[1] == qp_solve(spoilt).status[1]
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_allclose(a[[0, 2]], b[[0, 2]], rtol=1e-9, atol=1e-12)


@each_dtype
@pytest.mark.parametrize("shared", [("Q", "G", "A"), ("p", "h", "b"), ("h_lower", "lower", "upper"), QP._fields[:-1]])
def test_shared_data(shared, dtype):
    qp = solvable(5, 4, 6, 5, 2, two_sided=True, box=True).qp
    first = qp._replace(**{name: getattr(qp, name)[:1] for name in shared})
    # Far enough apart that mixing the bounds of one sample with the rows of another leaves z.
    wide = {"h": 20.0, "h_lower": -20.0, "lower": -20.0, "upper": 20.0}
    first = first._replace(**{name: getattr(first, name) + by for name, by in wide.items()})
    all_of_it = QP(*(np.broadcast_to(a, (4, *a.shape[1:])) for a in first))
    expected, got = solve(all_of_it, dtype=dtype), solve(first, dtype=dtype)
    assert (got.status == QPStatus.SOLVED).all()
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    if {"Q", "G", "A"} & set(shared):
        bars = [np.ones_like(a) for a in expected[:4]]
        for a, b in zip(
            adjoint(first, got, *bars, dtype=dtype), adjoint(all_of_it, got, *bars, dtype=dtype), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@each_dtype
def test_columns_that_are_not_there(dtype):
    qp = solvable(6, 4, 6, 5, 2).qp
    nothing = np.zeros((1, 0))
    got = solve(qp._replace(h_lower=nothing, lower=nothing, upper=nothing), dtype=dtype)
    for a, b in zip(got, solve(qp, dtype=dtype), strict=True):
        np.testing.assert_array_equal(a, b)


@each_dtype
def test_an_empty_batch(dtype):
    qp = QP(*(a[:0] for a in solvable(0, 1, 4, 3, 2).qp))
    got = solve(qp, dtype=dtype)
    assert got.z.shape == (0, 4)
    d = adjoint(qp, got, *got[:4], dtype=dtype)
    assert [a.shape for a in d] == [(0, 4), (0, 3), (0, 2), (0, 4)]


def test_a_warm_start_leads_to_the_same_answer():
    qp = solvable(3, 6, 12, 9, 3, two_sided=True, box=True).qp
    start = np.concatenate(solve(qp)[:4], 1)
    near = qp._replace(p=qp.p + 1e-3)
    check(near, start=start)
    start[::2, 5] = np.nan  # those start cold
    half_warm, cold = check(near, start=start), solve(near)
    np.testing.assert_array_equal(half_warm.z[::2], cold.z[::2])
    start = np.nan_to_num(start, nan=1.0)
    for given in (None, start):
        few = qp_solve(near, None if given is None else tuple(np.split(given, np.cumsum([12, 9, 3]), axis=1)), steps=6)
        got = solve(near, given, steps=6)
        np.testing.assert_array_equal(got.status, few.status)
        np.testing.assert_allclose(got.residual, few.residual, rtol=0.1, atol=1e-10)


@each_dtype
@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
@pytest.mark.parametrize("size", [(8, 6, 2), (12, 30, 0), (4, 0, 0), (5, 0, 2), (1, 1, 0)], ids=str)
@pytest.mark.parametrize("kind", ["random", "low rank", "scaled rows", "ill-conditioned", "duplicate rows"])
def test_the_adjoint_is_the_references(kind, size, box, dtype):
    rng = np.random.default_rng(5)
    known = solvable(2, 5, *size, kind, two_sided=box, box=box)
    at = determined(known)
    if not at.any():
        pytest.skip("z is not determined, and has no gradient")
    qp = rounded(known.qp, dtype)
    solution = solve(qp, dtype=dtype)
    exact = QPReference(*(a if a.dtype == np.int32 else a.astype(np.float64) for a in solution))
    bars = [rng.standard_normal(a.shape).astype(dtype).astype(np.float64) for a in solution[:4]]
    if kind == "duplicate rows":  # how dλ is shared out among duplicates is rounding
        bars[1] = 0 * bars[1]
    for given in (bars, bars[:1]):
        expected = qp_adjoint(qp.Q, qp.G, qp.A, exact, *given)
        got = adjoint(qp, solution, *given, dtype=dtype)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a.dtype == dtype
            if kind == "duplicate rows" and i == 1:
                a, b = ((qp.G.swapaxes(1, 2) @ d[..., None])[..., 0] for d in (a.astype(np.float64), b))
            size_of = 1 + np.abs(b).max(1, initial=0.0)[:, None]
            assert (np.abs(a - b) / size_of)[at].max(initial=0.0) <= ADJOINT[dtype] * (100 if kind != "random" else 1)


def test_the_adjoint_of_what_is_not_solved_is_nan():
    qp, wanted = mixed(3)
    solution = solve(qp)
    d = adjoint(qp, solution, *(np.ones_like(a) for a in solution[:4]))
    good = wanted == QPStatus.SOLVED
    for a in d:
        assert np.isnan(a[~good]).all()
        assert np.isfinite(a[good]).all()


@each_dtype
@pytest.mark.parametrize(("op", "attributes"), [("QPSolve", {"steps": 5}), ("QPAdjoint", {})])
def test_the_models_pass_onnx_checker(op, attributes, dtype):
    onnx.checker.check_model(model(op, dtype, **attributes), full_check=True)


def test_the_graphs_of_the_package_are_made_of_these_bodies():
    """If not: python -m icnnrt_exporters.operators.operator_graphs."""
    folder = Path(icnnrt.__file__).parent / "graphs"
    made = operator_graphs()
    assert {file.name for file in folder.iterdir()} == set(made)
    for name, data in made.items():
        assert (folder / name).read_bytes() == data, name


def test_functions_are_portable():
    assert [f.name for f in functions()][-2:] == ["QPSolve", "QPAdjoint"]
    check_portable(functions(), banned=("Softplus", "Mean", "NonZero", "OneHot"))  # no float64 kernel for CPUs
    for function in functions():
        for node in all_nodes(function.node):
            if node.op_type == "Constant":
                (attribute,) = node.attribute
                assert attribute.name in ("value", "value_int", "value_ints")
                if attribute.name == "value":  # a Python float would have become float32
                    assert attribute.t.data_type in (TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL)


def test_loops_stay_small():
    """About half a microsecond a node, for every step of every solve: growth should be noticed."""
    by_name = {f.name: f for f in functions()}
    for name, most in (
        ("QPInteriorPoint", STEP_NODES),
        ("InverseCholesky", PIVOT_NODES),
        ("PositiveDefinite", PIVOT_NODES),
    ):
        (loop,) = (node for node in all_nodes(by_name[name].node) if node.op_type == "Loop")
        (body,) = (a.g for a in loop.attribute if a.name == "body")
        assert sum(node.op_type != "Constant" for node in body.node) <= most
