"""The native kernels of QPSolve and QPAdjoint against the statement in numpy, and what they refuse."""

import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from quadratic_programs import (
    KINDS,
    SIZES,
    UNSOLVABLE,
    agree,
    bundle_models,
    mixed,
    most_unsolved,
    receding_horizon,
    solvable,
    unsolvable,
)
from test_qp_reference import check_rays

import icnnrt
from icnnrt import native_library
from icnnrt.format.package import OP_DOMAIN
from icnnrt.mathematics.qp_reference import (
    QP,
    QPCotangents,
    QPReference,
    kkt_residual,
    qp_adjoint,
    qp_gradients,
    qp_solve,
)
from icnnrt.mathematics.qp_status import QPStatus

if native_library.build().library is None:
    pytest.skip(f"there is no native library: {native_library.build().reason}", allow_module_level=True)

SOLVE_INPUTS = {"Q": 3, "p": 2, "G": 3, "h_lower": 2, "h": 2, "A": 3, "b": 2, "lower": 2, "upper": 2, "start": 2}
SOLVE_OUTPUTS = {"z": 2, "lam": 2, "nu": 2, "mu": 2, "slack": 2, "box_slack": 2, "residual": 2, "status": 1, "ray": 2}
ADJOINT_INPUTS = {"Q": 3, "G": 3, "A": 3, "lam": 2, "mu": 2, "slack": 2, "box_slack": 2, "status": 1, "z_bar": 2}
ADJOINT_INPUTS |= {"lam_bar": 2, "nu_bar": 2, "mu_bar": 2}
ADJOINT_OUTPUTS = {"d_z": 2, "d_lam": 2, "d_nu": 2, "d_mu": 2}

KKT = {np.float64: 1e-9, np.float32: 1e-6}  # relative, as the solver promises; float32 answers hold it in float64
# z where the problem determines it, as in test_qp_reference.py; float32 rounds the answer.
UNIQUE = {np.float64: 1e-6, np.float32: 2e-5}
# Both adjoints solve one system to 1e-8 and less; float32 rounds what they start from.
ADJOINT = {np.float64: 1e-7, np.float32: 1e-3}

each_dtype = pytest.mark.parametrize("dtype", [np.float64, np.float32])


@functools.cache
def session(op: str, dtype: type, threads: int = 1, steps: int = 50) -> onnxruntime.InferenceSession:
    """One node without a body: nothing but the kernel can run it."""
    inputs, outputs = (SOLVE_INPUTS, SOLVE_OUTPUTS) if op == "QPSolve" else (ADJOINT_INPUTS, ADJOINT_OUTPUTS)
    T = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    types = {"status": TensorProto.INT32, "residual": TensorProto.DOUBLE}

    def value(name: str, rank: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, types.get(name, T), [None] * rank)

    attributes = {"steps": steps} if op == "QPSolve" else {}
    node = helper.make_node(op, list(inputs), list(outputs), domain=OP_DOMAIN, **attributes)
    graph = helper.make_graph([node], op, [value(*a) for a in inputs.items()], [value(*a) for a in outputs.items()])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(OP_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(icnnrt.ops_library())
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds_of(qp: QP, start: Any = None, dtype: type = np.float64) -> dict[str, Any]:
    arrays = dict(qp._asdict())
    for name in ("h_lower", "lower", "upper"):
        if np.isneginf(arrays[name]).all() or np.isposinf(arrays[name]).all():
            arrays[name] = np.zeros((1, 0))
    arrays["start"] = np.zeros((1, 0)) if start is None else np.concatenate(start, 1)
    return {name: array.astype(dtype) for name, array in arrays.items()}


def solve(qp: QP, start: Any = None, dtype: type = np.float64, threads: int = 1, steps: int = 50) -> QPReference:
    return QPReference(*session("QPSolve", dtype, threads, steps).run(None, feeds_of(qp, start, dtype)))


def adjoint(Q: Any, G: Any, A: Any, solution: QPReference, *bars: Any, dtype: type = np.float64) -> QPCotangents:
    bars = tuple(np.zeros((1, 0)) if bar is None else bar for bar in bars)
    of_solution = (solution.lam, solution.mu, solution.slack, solution.box_slack)
    values = [a.astype(dtype) for a in (Q, G, A, *of_solution)]
    values += [solution.status, *(bar.astype(dtype) for bar in bars)]
    return QPCotangents(*session("QPAdjoint", dtype).run(None, dict(zip(ADJOINT_INPUTS, values, strict=True))))


def double(answer: Any) -> Any:
    return type(answer)(*(a if a.dtype == np.int32 else a.astype(np.float64) for a in answer))


@each_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
def test_the_statuses_and_the_answers_are_the_references(kind, size, box, dtype):
    known = solvable(0, 6, *size, kind, two_sided=box, box=box)
    qp = QP(*(a.astype(dtype).astype(np.float64) for a in known.qp))
    solution, reference = double(solve(qp, dtype=dtype)), qp_solve(qp, precision=dtype)
    good = (solution.status == QPStatus.SOLVED) & (reference.status == QPStatus.SOLVED)
    if dtype == np.float64:
        assert agree(solution.status, reference.status).all(), (solution.status, reference.status)
    # Rounding to float32 may make others of these: Q with slightly negative eigenvalues, equalities that contradict.
    others = kind == "linear" or (dtype == np.float32 and kind in ("low rank", "dependent equalities"))
    assert others or (~good).sum() <= most_unsolved(kind)
    assert solution.residual[good].max(initial=0.0) <= KKT[dtype]
    if dtype == np.float64:
        solved = QP(*(a[good] for a in qp))
        assert kkt_residual(solved, *(a[good] for a in solution[:4])).max(initial=0.0) <= KKT[dtype]
        assert (solution.slack[good] > 0).all()
        assert (solution.box_slack[good] > 0).all()
    if kind == "random" and size[0] > 1:
        for found, wanted in zip(solution[:4], reference[:4], strict=True):
            assert np.abs(found - wanted)[good].max(initial=0.0) <= UNIQUE[dtype]


@pytest.mark.parametrize("seed", [2, 22, 47, 62, 93, 101, 107, 110, 116])
def test_steps_that_cycle_are_taken_anew_with_care(seed):
    qp = receding_horizon(seed, 40, steps=8 + seed % 16)
    solution = solve(qp)
    assert (solution.status == QPStatus.SOLVED).all()
    objective = [0.5 * np.einsum("bi,bij,bj->b", z, qp.Q, z) + (qp.p * z).sum(1) for z in (solution.z, qp_solve(qp).z)]
    np.testing.assert_allclose(*objective, rtol=1e-8)


def test_steps_that_would_cycle():
    qp = bundle_models(1, 5000, cuts=1)
    solution = solve(qp)
    assert (solution.status == QPStatus.SOLVED).all()
    objective = [0.5 * np.einsum("bi,bij,bj->b", z, qp.Q, z) + (qp.p * z).sum(1) for z in (solution.z, qp_solve(qp).z)]
    np.testing.assert_allclose(*objective, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("why", UNSOLVABLE)
@pytest.mark.parametrize("size", [(10, 10, 3), (8, 4, 2), (50, 50, 10)], ids=str)
def test_what_is_not_solvable_says_why(why, size):
    qp, wanted = unsolvable(1, 4, *size, why)
    solution = solve(qp)
    assert (solution.status == wanted).all(), solution.status
    for array in solution[:7]:
        assert np.isnan(array).all()
    check_rays(qp, solution)


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_do_not_matter(threads):
    qp, wanted = mixed(7)
    together = solve(qp, threads=threads)
    assert (together.status == wanted).all(), (together.status, wanted)
    check_rays(qp, together)
    for i in range(len(wanted)):
        alone = solve(QP(*(a[i : i + 1] for a in qp)))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], b[i])
    bars = [np.ones_like(a) for a in together[:4]]
    unsolved = wanted != QPStatus.SOLVED
    for a in adjoint(qp.Q, qp.G, qp.A, together, *bars):
        assert np.isnan(a[unsolved]).all()
        assert np.isfinite(a[~unsolved]).all()


@each_dtype
@pytest.mark.parametrize("kind", ["random", "scaled rows", "ill-conditioned"])
@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
@pytest.mark.parametrize("size", [(8, 6, 2), (1, 1, 0), (13, 0, 3), (7, 9, 0)], ids=str)
def test_the_adjoint_is_the_references(kind, box, size, dtype):
    if dtype == np.float32 and kind != "random":
        pytest.skip("float32 changes the system itself there")
    rng = np.random.default_rng(5)
    qp = QP(*(a.astype(dtype).astype(np.float64) for a in solvable(2, 5, *size, kind, two_sided=box, box=box).qp))
    solution = double(solve(qp, dtype=dtype))
    bars = [rng.standard_normal(a.shape).astype(dtype) for a in solution[:4]]
    mine = adjoint(qp.Q, qp.G, qp.A, solution, *bars, dtype=dtype)
    theirs = qp_adjoint(qp.Q, qp.G, qp.A, solution, *bars)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=ADJOINT[dtype] * (1 + np.abs(b).max(initial=0.0)))
    absent = adjoint(qp.Q, qp.G, qp.A, solution, bars[0], None, None, None, dtype=dtype)
    for a, b in zip(absent, qp_adjoint(qp.Q, qp.G, qp.A, solution, bars[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=ADJOINT[dtype] * (1 + np.abs(b).max(initial=0.0)))


@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
def test_gradients_match_central_differences(box):
    rng = np.random.default_rng(5)
    qp = solvable(2, 5, 8, 6, 2, two_sided=True, box=box).qp
    solution = solve(qp)
    bars = [rng.standard_normal(a.shape) for a in solution[:4]]

    def loss(qp):
        return sum((bar * a).sum(1) for bar, a in zip(bars, solve(qp)[:4], strict=True))

    gradients = qp_gradients(solution, adjoint(qp.Q, qp.G, qp.A, solution, *bars))
    for name in qp._fields:
        value, gradient = getattr(qp, name), getattr(gradients, name)
        v = rng.standard_normal(value.shape) * np.where(np.isfinite(value), 1.0, 0.0)
        if name == "Q":
            v = v @ v.swapaxes(1, 2) * 0.1
        forward, back = (loss(qp._replace(**{name: value + sign * 1e-5 * v})) for sign in (1, -1))
        numeric = (forward - back) / 2e-5
        exact = (gradient * v).reshape(len(v), -1).sum(1)
        scale = 1 + np.abs(gradient * v).reshape(len(v), -1).sum(1)
        assert (np.abs(numeric - exact) <= 1e-6 * scale).all(), (name, numeric, exact)


def test_what_all_samples_share_is_given_once():
    qp = solvable(4, 6, 9, 7, 2, two_sided=True, box=True).qp
    shared = qp._replace(**{name: getattr(qp, name)[:1] for name in ("Q", "G", "A", "lower")})
    repeated = shared._replace(**{name: np.repeat(getattr(shared, name), 6, 0) for name in ("Q", "G", "A", "lower")})
    solution = solve(shared)
    for a, b in zip(solution, solve(repeated), strict=True):
        np.testing.assert_array_equal(a, b)
    bars = [np.ones_like(a) for a in solution[:4]]
    once = adjoint(shared.Q, shared.G, shared.A, solution, *bars)
    for a, b in zip(once, adjoint(repeated.Q, repeated.G, repeated.A, solution, *bars), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("box", [False, True], ids=["rows", "box"])
def test_a_warm_start_leads_to_the_same_answer(box):
    qp = solvable(3, 6, 12, 9, 3, two_sided=True, box=box).qp
    cold = solve(qp)
    near = qp._replace(p=qp.p + 1e-3)
    start = [a.copy() for a in cold[:4]]
    start[0][2] = np.nan  # a sample that starts cold
    start[1][3] = -start[1][3]  # and one that is misled
    warm, again = solve(near, start), solve(near)
    assert (warm.status == QPStatus.SOLVED).all()
    for a, b in zip(warm[:4], again[:4], strict=True):
        np.testing.assert_allclose(a, b, atol=UNIQUE[np.float64])
    np.testing.assert_array_equal(warm.z[2], again.z[2])
    for size in (1e8, 1e30, 1e300, np.inf):  # a start that is no good costs steps, not the answer
        with np.errstate(invalid="ignore"):
            misled = solve(near, [size * a for a in cold[:4]])
        assert set(misled.status) <= {QPStatus.SOLVED, QPStatus.INACCURATE, QPStatus.FAILED}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_few_steps_are_told(steps):
    qp = solvable(3, 6, 12, 9, 3, two_sided=True).qp
    solution = solve(qp, steps=steps)
    residual = kkt_residual(qp, *solution[:4]).max(1)
    for status, worst in zip(solution.status, residual, strict=True):
        assert status in (QPStatus.SOLVED, QPStatus.INACCURATE, QPStatus.FAILED)
        assert status == QPStatus.FAILED or worst <= (1e-9 if status == QPStatus.SOLVED else 1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30, 1e200, 1e308, 1e-308])
@each_dtype
def test_odd_numbers_end(value, dtype):
    """No loop, no crash, and never an answer that does not hold."""
    qp = solvable(6, 1, 5, 4, 2, two_sided=True, box=True).qp
    for name in qp._fields:
        array = getattr(qp, name).copy()
        array.reshape(-1)[1] = value  # of Q that is half an entry and its mirror
        spoilt = qp._replace(**{name: array})
        with np.errstate(all="ignore"):
            solution = solve(spoilt, dtype=dtype)
            if not np.isfinite(array.astype(dtype)).all() and name in ("Q", "p", "G", "A", "b"):
                assert solution.status == QPStatus.NOT_FINITE_INPUT
            elif dtype == np.float64 and solution.status == QPStatus.SOLVED:
                symmetric = spoilt._replace(Q=(spoilt.Q + spoilt.Q.swapaxes(1, 2)) / 2)
                assert kkt_residual(symmetric, *solution[:4]).max() <= KKT[dtype]


SHAPES = {"Q": (3, 4, 4), "p": (3, 4), "G": (1, 5, 4), "h_lower": (1, 0), "h": (3, 5), "A": (1, 2, 4), "b": (3, 2)}
SHAPES |= {"lower": (1, 4), "upper": (1, 0), "start": (1, 0)}
MALFORMED = [
    ("Q", (3, 4, 5), "expected square matrices [B, n, n] or [1, n, n] with n >= 1, but got [3, 4, 5]"),
    ("Q", (4, 4), "expected square matrices"),
    ("Q", (3, 0, 0), "expected square matrices"),
    ("G", (1, 5, 3), "expected [B, m, n] or [1, m, n] with n = 4 as Q has, but got [1, 5, 3]; pass a column"),
    ("A", (2, 4), "expected [B, q, n] or [1, q, n] with n = 4 as Q has"),
    ("h", (3, 4), "expected [B, m] with n = 4, m = 5, q = 2 as Q, G and A have, but got [3, 4]"),
    ("h_lower", (3, 4), "expected [B, m] or [1, 0] with n = 4, m = 5, q = 2"),
    ("p", (2, 4), "expected a leading axis of B = 3 as other inputs have, or of 1, but got [2, 4]"),
    ("b", (3, 1), "expected [B, q]"),
    ("lower", (3, 5), "expected [B, n] or [1, 0]"),
    ("start", (3, 14), "expected [B, n + m + q + n] or [1, 0]"),
    ("upper", (4,), "expected"),
]


@each_dtype
@pytest.mark.parametrize(("name", "shape", "sentence"), MALFORMED)
def test_a_malformed_input_is_told(name, shape, sentence, dtype):
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    feeds = {key: np.zeros(shape if key == name else size, dtype) for key, size in SHAPES.items()}
    loose = session_of_any_rank(dtype)
    with pytest.raises(Exception, match=r"ai\.icnnrt::QPSolve") as caught:
        loose.run(None, feeds, options)
    assert f"ai.icnnrt::QPSolve: {name}: {sentence}" in str(caught.value)


@functools.cache
def session_of_any_rank(dtype: type) -> onnxruntime.InferenceSession:
    T = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    types = {"status": TensorProto.INT32, "residual": TensorProto.DOUBLE}
    inputs = [helper.make_tensor_value_info(name, T, None) for name in SOLVE_INPUTS]
    outputs = [helper.make_tensor_value_info(name, types.get(name, T), None) for name in SOLVE_OUTPUTS]
    node = helper.make_node("QPSolve", list(SOLVE_INPUTS), list(SOLVE_OUTPUTS), domain=OP_DOMAIN, steps=50)
    graph = helper.make_graph([node], "QPSolve", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(OP_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(icnnrt.ops_library())
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_an_empty_batch():
    qp = QP(*(a[:0] for a in solvable(0, 2, 4, 3, 1).qp))
    solution = solve(qp)
    assert solution.z.shape == (0, 4)
    assert solution.ray.shape == (0, 12)
    assert adjoint(qp.Q, qp.G, qp.A, solution, solution.z, None, None, None).d_lam.shape == (0, 3)
