"""What the operations mean that algorithms are stated in, `icnnrt.mathematics.namespace`, the same on every backend.

numpy, torch, torch as torch.jit traces it, and ONNX as the exporter writes it down and ONNX Runtime runs it.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from icnnrt.mathematics import cut_model
from icnnrt.mathematics.domains import SIMPLEX, SPACE, UNIT_BOX
from icnnrt.mathematics.kkt_adjoint import kkt_adjoint
from icnnrt.mathematics.namespace import NUMPY, Namespace
from icnnrt_exporters.operators.bodies import OP_DOMAIN, functions, functions_qp
from icnnrt_exporters.operators.spliced import Spliced
from icnnrt_exporters.operators.traced import DOUBLE, Traced
from icnnrt_exporters.surgery import Ops, needed
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET
from icnnrt_models.layers.namespace import TORCH

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
Statement = Callable[..., Any]  # (xp, *arrays) -> one array or some
NAN, INF = np.nan, np.inf
HARD = np.array([[[NAN, 1.0, -0.0, INF]], [[-INF, 2.0, 2.0, -3.0]], [[0.0, 1e-300, -1e300, 1.0]]])


def by_numpy(statement: Statement, *arrays: np.ndarray) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        return _listed(statement(NUMPY, *arrays))


def by_torch(statement: Statement, *arrays: np.ndarray) -> list[np.ndarray]:
    return [t.numpy() for t in _listed(statement(TORCH, *map(torch.from_numpy, arrays)))]


def by_trace(statement: Statement, *arrays: np.ndarray) -> list[np.ndarray]:
    """Traced with other numbers and twice the samples, as what is traced once has to hold for all."""
    examples = [torch.rand((2 * len(a), *a.shape[1:]), dtype=torch.float64) for a in arrays]

    def of(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_listed(statement(TORCH, *tensors)))

    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(of, examples, check_trace=False)
    assert "Device" not in str(traced.graph), "a trace holds a device"
    return [t.numpy() for t in traced(*map(torch.from_numpy, arrays))]


def by_onnx(statement: Statement, *arrays: np.ndarray) -> list[np.ndarray]:
    xp = Traced("t", rank=arrays[0].ndim)
    given = [
        ir.Value(name=f"in_{i}", type=ir.TensorType(DOUBLE), shape=ir.Shape([None] * a.ndim))
        for i, a in enumerate(arrays)
    ]
    outputs = []
    for i, v in enumerate(_listed(statement(xp, *map(xp.of, given)))):
        outputs.append(xp.node("Identity", v).value)
        outputs[-1].name, outputs[-1].type = f"out_{i}", ir.TensorType(v.dtype)
    for i, constant in enumerate(xp.op.constants):
        constant.name = f"constant_{i}"
        assert constant.const_value is not None
        constant.const_value.name = constant.name
    graph = ir.Graph(
        given,
        outputs,
        nodes=needed(xp.op.nodes, outputs),
        initializers=xp.op.constants,
        opset_imports={"": OPSET, OP_DOMAIN: OP_VERSION},
        name="statement",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))
    model.functions.extend([*functions()[:2], *functions_qp()[:2]])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {v.name: a for v, a in zip(given, arrays, strict=True)})  # type: ignore[no-any-return]


def _listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, Sequence | tuple) else [found]


BACKENDS = {"numpy": by_numpy, "torch": by_torch, "trace": by_trace, "onnx": by_onnx}
each_backend = pytest.mark.parametrize("run", BACKENDS.values(), ids=BACKENDS)


def finite(a: np.ndarray) -> np.ndarray:
    """The rows without NaN, where max may answer as it likes."""
    return a[~np.isnan(a).any((1, 2))]


def _powers(xp: Namespace, m: Any, times: int) -> list[Any]:
    """What grows in a loop, what its trips leave behind, and the slots that it reads."""

    def step(i: Any, a: Any, grown: Any) -> tuple[Any, Any]:
        return (a * m, xp.concat_rows([grown, xp.row(xp.slot(a, 0))])), (a, xp.slot(a, 1), xp.entry(xp.slot(a, 1), 0))

    (last, grown), rows = xp.repeat(times, step, (m, xp.zeros(m, 0, 4)))
    return [last, grown, *rows]


class _Grown(NamedTuple):
    """The state of `_until`."""

    a: Any
    grown: Any
    absent: Any = None


def _until(xp: Namespace, m: Any, times: int, most: float) -> list[Any]:
    """Doubled and collected in what grows, until no entry is below `most`; a branch by the sum of what there is."""

    def step(i: Any, *state: Any) -> tuple[Any, tuple[()]]:
        s = _Grown(*state)
        assert s.absent is None
        return _Grown(2.0 * s.a, xp.concat_rows([s.grown, xp.upto(s.a, 1)])), ()

    start = _Grown(m, xp.zeros(m, 0, 4))
    found, _ = xp.repeat(times, step, start, unfinished=lambda *state: xp.any(_Grown(*state).a < most))
    end = _Grown(*found)
    assert end.absent is None
    left, none = xp.cond(xp.any(end.a > 1e3), lambda: [end.a, None], lambda: [-end.a, None])
    assert none is None
    return [left, end.grown]


# name: (statement, arrays, what comes)
A = HARD
M = np.arange(24.0).reshape(3, 2, 4)
SIGN = np.array([1.0, -1.0, -1.0])[:, None, None]
ROOMY = np.array([[[-800.0, -40.0, 0.0, 800.0]]])
CASES: dict[str, tuple[Statement, tuple[np.ndarray, ...], Any]] = {
    "exp": (lambda xp, a: xp.exp(a), (A,), np.where(A > 700, INF, np.exp(np.minimum(A, 700)))),
    "log": (lambda xp, a: xp.log(abs(a)), (A,), np.log(np.abs(np.where(A == 0, 1, A))) + np.where(A == 0, -INF, 0)),
    "log of less than 0": (lambda xp, a: xp.log(a), (-np.ones((1, 1, 2)),), np.full((1, 1, 2), NAN)),
    "log1p": (lambda xp, a: xp.log1p(a), (np.array([[[0.0, 1e-3, 1e10]]]),), np.log1p([[[0.0, 1e-3, 1e10]]])),
    "sqrt": (lambda xp, a: xp.sqrt(a), (np.array([[[4.0, -1.0, INF, NAN]]]),), np.array([[[2.0, NAN, INF, NAN]]])),
    "sigmoid": (
        lambda xp, s: xp.sigmoid(s),
        (ROOMY,),
        np.array([[[0.0, np.exp(-40) / (1 + np.exp(-40)), 0.5, 1.0]]]),
    ),
    "x_log_x": (lambda xp, a: xp.x_log_x(a), (np.array([[[0.0, 1.0, 2.0]]]),), np.array([[[0.0, 0.0, 2 * np.log(2)]]])),
    "maximum": (lambda xp, a: xp.maximum(a, 1.0), (A,), np.maximum(A, 1.0)),
    "maximum of two": (lambda xp, a, b: xp.maximum(a, b), (A, A[::-1].copy()), np.maximum(A, A[::-1])),
    "minimum": (lambda xp, a: xp.minimum(a, 1.0), (A,), np.minimum(A, 1.0)),
    "clip": (lambda xp, a: xp.clip(a, -1.0, 1.5), (A,), np.clip(A, -1.0, 1.5)),
    "clip by arrays": (lambda xp, a, b: xp.clip(a, -b, b), (A, np.full((3, 1, 1), 2.0)), np.clip(A, -2.0, 2.0)),
    "row and column": (lambda xp, m: xp.column(xp.row(m)), (M,), M[:, None, :, :, None]),
    "entry": (lambda xp, m: xp.entry(m, 2), (M,), M[:, :, 2]),
    "slot": (lambda xp, m: xp.slot(m, 1), (M,), M[:, 1]),
    "upto": (lambda xp, m: xp.upto(m, 1), (M,), M[:, :1]),
    "upto and beyond what another has": (
        lambda xp, m, a: [xp.upto(m, xp.slots(a)), xp.beyond(m, xp.slots(a))],
        (M, np.ones((3, 1, 4))),
        None,
    ),
    "beyond all": (lambda xp, m: xp.beyond(m, 2), (M,), M[:, 2:]),
    "places": (lambda xp, m: 1.0 * xp.indicator(xp.places(m) < 2.0) + 0.0 * m, (M,), 0 * M + [1, 1, 0, 0]),
    "equal": (lambda xp, a: xp.indicator(xp.equal(a, 2.0)), (A,), (A == 2.0) * 1.0),
    "equal to another": (lambda xp, a, b: xp.indicator(xp.equal(a, b)), (A, abs(A)), (abs(A) == A) * 1.0),
    "backwards": (lambda xp, m: xp.backwards(m), (M,), M[:, ::-1]),
    "slots_sum": (lambda xp, m: xp.slots_sum(m), (M,), M.sum(1)),
    "padded": (lambda xp, m: xp.padded(m, 7), (M,), np.pad(M, ((0, 0), (0, 0), (0, 3)))),
    "padded row": (lambda xp, m: xp.padded(xp.slot(m, 0), 7), (M,), np.pad(M[:, 0], ((0, 0), (0, 3)))),
    "zeros": (lambda xp, a: [xp.zeros(a, 0, 2), xp.zeros(xp.entry(xp.slot(a, 0), 0), 4)], (A,), None),
    "spread": (lambda xp, m: xp.spread(0.5, m) * m, (M,), 0.5 * M),
    "repeat": (lambda xp, m: _powers(xp, m, 3), (M,), None),
    "repeat never": (lambda xp, m: _powers(xp, m, 0), (M,), None),
    "where": (lambda xp, a: xp.where(a > 0.0, a, 0.0 * a + 7.0), (finite(A),), None),
    "sum": (lambda xp, a: xp.sum(a), (A,), A.sum(-1, keepdims=True)),
    "sum of nothing": (lambda xp, a: xp.sum(a), (np.ones((2, 1, 0)),), np.zeros((2, 1, 1))),
    "max": (lambda xp, a: xp.max(a), (finite(A),), finite(A).max(-1, keepdims=True)),
    "mean": (lambda xp, a: xp.mean(a), (A,), A.mean(-1, keepdims=True)),
    "count": (lambda xp, a: xp.ones_like(xp.sum(a)) * xp.count(a), (A,), np.full((3, 1, 1), 4.0)),
    "mT": (lambda xp, a: xp.mT(a), (A,), A.swapaxes(1, 2)),
    "ones_like": (lambda xp, a: xp.ones_like(a), (A,), np.ones_like(A)),
    "eye": (lambda xp, a: xp.eye(a) * a, (A[2:],), np.eye(4) * A[2:]),
    "rows": (lambda xp, a: xp.rows((4.0, 2.0), a) * xp.ones_like(xp.sum(a)), (A,), np.full((3, 2, 1), [[4.0], [2.0]])),
    "extended": (lambda xp, a, b: xp.extended(a, b), (A, np.ones((3, 1, 6))), np.pad(A, ((0, 0), (0, 0), (0, 2)))),
    "extended from nothing": (lambda xp, a, b: xp.extended(a, b), (A[:, :, :0], A), np.zeros_like(A)),
    "concat": (lambda xp, a, b: xp.concat([a, b]), (A, A), np.concatenate([A, A], 2)),
    "min": (lambda xp, a: xp.min(a), (finite(A),), finite(A).min(-1, keepdims=True)),
    "total": (lambda xp, a: xp.total(a), (M,), M.sum((1, 2), keepdims=True)),
    "largest": (lambda xp, a: xp.largest(a), (M,), np.abs(M).max((1, 2), keepdims=True)),
    "isfinite": (lambda xp, a: xp.indicator(xp.isfinite(a)), (A,), np.isfinite(A) * 1.0),
    "all": (lambda xp, a: xp.indicator(xp.all(a >= 0.0)), (A,), (A >= 0).all(-1, keepdims=True) * 1.0),
    "not, or, at most": (lambda xp, a: xp.indicator(~(a <= 1.0) | (a < -2.0)), (A,), (~(A <= 1) | (A < -2)) * 1.0),
    "power_of_2": (
        lambda xp, a: xp.power_of_2(a),
        (np.array([[[3.0, 0.4, 1e5]]]),),
        np.array([[[4.0, 0.5, 131072.0]]]),
    ),
    "eyes": (lambda xp, a: xp.eyes(a), (A,), np.broadcast_to(np.eye(4), (3, 4, 4))),
    "concat_rows": (lambda xp, a, b: xp.concat_rows([a, b]), (A, M), np.concatenate([A, M], 1)),
    "halves": (lambda xp, a: xp.halves(a)[1] - 1.0, (A,), A[:, :, 2:] - 1.0),
    "parts": (
        lambda xp, a, b: xp.parts(a, [xp.sum(b), None, xp.sum(b)])[1] + 0.0,
        (np.arange(12.0).reshape(3, 1, 4), np.ones((3, 1, 2))),
        np.arange(12.0).reshape(3, 1, 4)[:, :, 1:3],
    ),
    "pick": (lambda xp, a: xp.pick(xp.total(a) > 30.0, a), (M,), M[1:]),
    "pick of none": (lambda xp, a: xp.pick(xp.sum(0.0 * a) > 7.5, a), (M[:, :1],), M[:0, :1]),
    "put": (lambda xp, a: xp.put(xp.sum(a) > 7.5, xp.pick(xp.sum(a) > 7.5, -a), a), (M[:, :1],), M[:, :1] * SIGN),
    "positive_definite": (
        lambda xp, a: xp.indicator(xp.positive_definite(a, xp.eye(a))),
        (np.array([[[2.0, 1.0], [1.0, 2.0]], [[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]),),
        np.array([[[1.0]], [[0.0]], [[0.0]]]),
    ),
    "any": (lambda xp, a: xp.any(a > 1.0), (A,), True),
    "any of NaN": (lambda xp, a: xp.any(a > 1.0), (np.full((1, 1, 2), NAN),), False),
    "any of none": (lambda xp, a: xp.any(a > 1.0), (np.ones((0, 1, 2)),), False),
    "argmin1 takes the first of equals": (
        lambda xp, a, b: xp.pick1(b, xp.argmin1(a)),
        (np.array([[[2.0], [1.0], [1.0]]]), np.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])),
        np.array([[[3.0, 4.0]]]),
    ),
    "divided by": (lambda xp, a: 2.0 / (1.0 - a), (finite(A),), None),
    "and": (lambda xp, a: xp.where((a > 0.0) & (a < 1.5), a, -a), (finite(A),), None),
}


@each_backend
@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_what_it_is_said_to_be(name: str, run: Callable[..., list[np.ndarray]]) -> None:
    statement, arrays, expected = CASES[name]
    wanted = by_numpy(statement, *arrays) if expected is None else [np.asarray(expected)]
    for found, true in zip(map(np.asarray, run(statement, *arrays)), wanted, strict=True):
        assert found.shape == true.shape
        np.testing.assert_allclose(found.astype(float), true.astype(float), rtol=1e-15, atol=1e-15)


@each_backend
@pytest.mark.parametrize("k", [1, 2, 5])
def test_linear_systems(run: Callable[..., list[np.ndarray]], k: int) -> None:
    rng = np.random.default_rng(k)
    root, r = rng.standard_normal((3, k, k)), rng.standard_normal((3, 1, k))
    M = root @ root.swapaxes(1, 2) * 10.0 ** rng.uniform(-3, 3, (3, 1, 1)) + 1e-3 * np.eye(k)
    M[1] = NAN

    def solved(xp: Namespace, M: Any, r: Any) -> Any:
        eye = xp.eye(r)
        return [xp.inverse_spd(M, eye)(r), xp.factor_spd(M, eye)(r), *xp.solve_spd(M, eye, [r, 2.0 * r])]

    expected = np.linalg.solve(M[[0, 2]], r[[0, 2]].swapaxes(1, 2)).swapaxes(1, 2)
    direction, factored, exact, twice = run(solved, M, r)
    for found, times, rtol in ((direction, 1.0, 1e-6), (factored, 1.0, 1e-8), (exact, 1.0, 1e-9), (twice, 2.0, 1e-9)):
        assert np.isnan(found[1]).all()
        np.testing.assert_allclose(found[[0, 2]], times * expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@each_backend
def test_a_singular_system_has_a_finite_answer(run: Callable[..., list[np.ndarray]]) -> None:
    M, r = np.ones((2, 3, 3)), np.ones((2, 1, 3))
    for found in run(lambda xp, M, r: [xp.inverse_spd(M, xp.eye(r))(r), *xp.solve_spd(M, xp.eye(r), [r, r])], M, r):
        assert np.isfinite(found).all()


@pytest.mark.parametrize("run", [by_numpy, by_torch, by_onnx], ids=["numpy", "torch", "onnx"])
def test_a_loop_stops_when_nothing_is_unfinished_or_after_the_most(run: Callable[..., list[np.ndarray]]) -> None:
    def halved(most: int) -> Statement:
        def statement(xp: Namespace, a: Any) -> Any:
            trips = xp.constant(most) if isinstance(xp, Traced) else most
            return xp.loop(lambda a, n: xp.any(a > 1.0), lambda a, n: (0.5 * a, n + 1.0), (a, 0.0 * a), trips)

        return statement

    a = np.array([[[8.0]], [[0.5]]])
    left, count = run(halved(10), a)
    assert left[0] == 1.0
    assert (count == 3.0).all()
    assert (run(halved(2), a)[1] == 2.0).all()
    assert (run(halved(2), a[:0])[1]).shape == (0, 1, 1)


@pytest.mark.parametrize("run", [by_numpy, by_torch, by_onnx], ids=["numpy", "torch", "onnx"])
def test_a_repetition_ends_early_and_once_at_least_and_its_state_grows(run: Callable[..., list[np.ndarray]]) -> None:
    for times, most, trips in ((9, 40.0, 5), (9, 1e4, 9), (3, 40.0, 3), (9, 0.0, 1)):
        left, grown = run(lambda xp, m, times=times, most=most: _until(xp, m, times, most), M + 2.0)
        end = 2.0**trips * (M + 2.0)
        np.testing.assert_array_equal(left, end if end.max() > 1e3 else -end)
        np.testing.assert_array_equal(grown, np.stack([2.0**i * (M[:, 0] + 2.0) for i in range(trips)], 1))


@each_backend
@pytest.mark.parametrize("at", [UNIT_BOX, SIMPLEX, SPACE], ids=lambda at: at.name)
def test_domains_are_the_same_everywhere(run: Callable[..., list[np.ndarray]], at: Any) -> None:
    rng = np.random.default_rng(1)
    s, a = 10 * rng.standard_normal((4, 1, 5)), rng.standard_normal((4, 1, 5))
    G = rng.standard_normal((4, 3, 5))
    s[3] = NAN

    def all_of(xp: Namespace, s: Any, a: Any, G: Any) -> Any:
        y = at.point(xp, s)
        of_s = (at.conjugate, at.centred)
        of_both = (at.curvature, at.root, at.root_transposed)
        return [
            y,
            *(f(xp, s) for f in of_s),
            *(f(xp, s, a) for f in of_both),
            at.curvature_at(xp, y, a),
            at.regulariser(xp, y),
            at.reach(xp, G),
            at.plain(xp, G),
            at.next_logits(xp, s, a),
        ]

    for found, expected in zip(run(all_of, s, a, G), by_numpy(all_of, s, a, G), strict=True):
        np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-12, atol=1e-13)


def test_values_in_a_graph_have_the_names_of_the_statement() -> None:
    for at in (UNIT_BOX, SIMPLEX, SPACE):
        solve, adjoint = functions(at.name)[-2:]
        loop = next(node for node in solve.node if node.op_type == "Loop")
        inside = {name for node in loop.attribute[0].g.node for name in node.output}
        assert {"solved_1", "eta", "zeta", "d_lam", "trial", "trial_gap", "better"} <= inside
        assert {"q", "qSq", "X_0", "X_1"} <= {name for node in adjoint.node for name in node.output}


def test_what_onnx_runtime_would_compute_wrongly_is_not_written_down() -> None:
    xp = Traced("t")
    a, b = (xp.of(ir.Value(name=name, type=ir.TensorType(DOUBLE))) for name in "ab")
    with pytest.raises(AssertionError, match="transpose"):
        a @ xp.mT(b)
    with pytest.raises(AssertionError, match="number"):
        2.0 * (a @ b)
    with pytest.raises(AssertionError, match="number"):
        (2.0 * a) @ b


def test_outputs_that_are_equal_have_a_name_each() -> None:
    """As the residual and the three gaps of Bregman proximal gradient in three iterations: zeros all."""
    xp = Traced("t", rank=2)
    y = xp.of(ir.Value(name="y", type=ir.TensorType(DOUBLE), shape=ir.Shape(["batch", 2])))
    outputs = [xp.output(xp.zeros(y, 3), name, ["batch", 3]) for name in ("residual", "gaps", "more")]
    graph = xp.graph([y.value], outputs, [], "equal")
    graph.opset_imports[""] = OPSET
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert [v.name for v in session.get_outputs()] == ["residual", "gaps", "more"]
    assert all((a == np.zeros((4, 3))).all() for a in session.run(None, {"y": np.ones((4, 2))}))


def test_a_solve_is_the_same_traced_by_torch() -> None:
    """For other sizes than it was traced with, warm and cold; and steps beyond the last change nothing."""
    rng = np.random.default_rng(0)

    def cuts(B: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(rng.standard_normal((B, k, n))), torch.from_numpy(rng.standard_normal((B, 1, k)))

    def solve(G: torch.Tensor, e: torch.Tensor, before: torch.Tensor) -> Any:
        made = cut_model.prepared(TORCH, UNIT_BOX, G, e)
        iterate = cut_model.first(TORCH, UNIT_BOX, made, before)
        for _ in range(20):
            iterate = cut_model.step(TORCH, UNIT_BOX, made, iterate)
        return tuple(cut_model.certified(TORCH, UNIT_BOX, G, e, iterate.best_lam))

    G, e = cuts(2, 3, 4)
    traced = torch.jit.trace(solve, (G, e, e[:, :, :2]), check_trace=False)
    for k, used in ((1, 0), (5, 3), (3, 3)):
        G, e = cuts(4, k, 2)
        lam = torch.full((4, 1, used), 1.0 / max(used, 1), dtype=torch.float64)
        with torch.no_grad():
            expected = cut_model.solve(TORCH, UNIT_BOX, G, e, lam, 60)
        y, _, bound, _, gap = traced(G, e, lam)
        torch.testing.assert_close(y, expected.y, atol=1e-7, rtol=0)
        torch.testing.assert_close(bound, expected.lower_bound, atol=1e-12, rtol=0)
        assert gap.abs().max() < 1e-12
        c_y, c_lam = kkt_adjoint(TORCH, UNIT_BOX, G, e, expected.lam, torch.ones_like(y))
        assert c_y.isfinite().all()
        assert c_lam.isfinite().all()


@pytest.mark.parametrize("run", [by_numpy, by_torch, by_onnx], ids=["numpy", "torch", "onnx"])
@pytest.mark.parametrize("bound", [0.5, 9.0])
def test_one_of_two_branches_is_taken(run: Callable[..., list[np.ndarray]], bound: float) -> None:
    def statement(xp: Namespace, a: Any) -> Any:
        b = a + 1.0
        return xp.cond(xp.any(a > bound), lambda: [2.0 * b, a], lambda: [a, b])

    a = np.array([[[1.0, 2.0]]])
    for found, expected in zip(run(statement, a), [2 * (a + 1), a] if bound < 2 else [a, a + 1], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_head_is_a_callable_of_a_statement() -> None:
    """Spliced into a loop and behind it, with a graph inside; what does not depend on its argument stands before."""
    shape = ir.Shape([None, 3])
    x, y, m = (ir.Value(name=name, type=ir.TensorType(DOUBLE), shape=shape) for name in ("x", "y", "m"))
    op = Ops("head")
    exp = op("Exp", x)
    largest = op("ReduceMax", exp, keepdims=0)
    branches = {}
    for name, op_type in (("then_branch", "Mul"), ("else_branch", "Add")):
        inner = Ops(name)
        branches[name] = ir.Graph([], [inner(op_type, y, exp)], nodes=inner.nodes, name=name)
    f = op("Neg", op("If", op("Less", largest, largest), **branches))  # by its second branch: −(y + e^x)
    f.type, f.shape = ir.TensorType(DOUBLE), shape

    xp = Traced("t")
    head = Spliced(xp, op.nodes, {y: m}, [f])
    assert [node.op_type for node in xp.op.nodes] == ["Exp", "ReduceMax", "Less"]

    def step(i: Any, a: Any) -> tuple[Any, Any]:
        return head(a), (a,)

    (last,), (rows,) = xp.repeat(2, step, (xp.of(m),))
    outputs = [head(last)[0].value, rows.value]
    for v, rank in zip(outputs, (2, 3), strict=True):
        v.type, v.shape = ir.TensorType(DOUBLE), ir.Shape([None] * rank)
    graph = xp.graph([x, m], outputs, [], "statement")
    graph.opset_imports[""] = OPSET
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    X, start = np.random.default_rng(0).standard_normal((2, 4, 3))
    found = session.run(None, {"x": X, "m": start})
    np.testing.assert_allclose(found[0], -(start + np.exp(X)), rtol=1e-13, atol=1e-13)  # thrice: a − e^x + e^x
    np.testing.assert_allclose(found[1], np.stack([start, -(start + np.exp(X))], 1), rtol=1e-15)
