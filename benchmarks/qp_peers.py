"""Peers of the QP layer: each a call that solves a batch and takes the gradients of a loss by all data.

All solve  min ½ z'Qz + p'z  s.t.  Gz <= h, Az = b  in float64 and give back (z, gradients of Q, p, G, h, A, b), or as
many of these as they have. They are asked for 1e-9 in their own measure, but for what says so beside it. What a peer
has to set up for new data is part of the call, what depends on sizes alone is not.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
EPS: Final = 1e-9


class Data(NamedTuple):
    """A batch of problems, and the cotangent of z."""

    Q: Array
    p: Array
    G: Array
    h: Array
    A: Array
    b: Array
    z_bar: Array


Answer = tuple[Any, ...]
Peer = Callable[[Data, int], Callable[[], Answer]]


def _torch(data: Data) -> list[Any]:
    import torch

    return [torch.from_numpy(a).requires_grad_() for a in data[:6]]


def _with_gradients(layer: Callable[..., Any], data: Data) -> Callable[[], Answer]:
    """The layer on fresh leaves, and autograd through it."""
    import torch

    z_bar = torch.from_numpy(data.z_bar)
    used = [i for i, a in enumerate(data[:6]) if a.size]

    def call() -> Answer:
        leaves = _torch(data)
        z = layer(*leaves)
        gradients = torch.autograd.grad(z, [leaves[i] for i in used], z_bar)
        return z.detach().numpy(), dict(zip((data._fields[i] for i in used), gradients, strict=True))

    return call


def qpth(data: Data, threads: int) -> Callable[[], Answer]:
    """qpth's QPFunction, batched in torch. Its gradients of batched data are as ours."""
    import torch
    from qpth.qp import QPFunction

    layer = QPFunction(verbose=-1, eps=EPS, maxIter=40, notImprovedLim=5, check_Q_spd=False)
    none = torch.empty(0, dtype=torch.float64)

    def solve(Q: Any, p: Any, G: Any, h: Any, A: Any, b: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # of warnings
            return layer(Q, p, G, h, A if data.b.size else none, b if data.b.size else none)

    return _with_gradients(solve, data)


def qplayer(data: Data, threads: int) -> Callable[[], Answer]:
    """proxsuite's QPLayer: ProxQP for every sample behind a torch function."""
    import torch
    from proxsuite.torch.qplayer import QPFunction

    layer = QPFunction(eps=EPS, omp_parallel=threads != 1)
    low = torch.full(data.h.shape, -1e20, dtype=torch.float64)

    def solve(Q: Any, p: Any, G: Any, h: Any, A: Any, b: Any) -> Any:
        z, _, _ = layer(Q, p, A, b, G, low, h)
        return z

    return _with_gradients(solve, data)


def proxqp(data: Data, threads: int) -> Callable[[], Answer]:
    """Dense ProxQP through its Python binding, one object a sample."""
    import proxsuite

    dense = proxsuite.proxqp.dense
    B, n = data.p.shape
    m, q = data.h.shape[1], data.b.shape[1]
    low = np.full(m, -1e20)
    loss = [np.concatenate([z_bar, np.zeros(m + q)]) for z_bar in data.z_bar]

    def made(i: int, qps: Any) -> Any:
        qp = dense.QP(n, q, m) if qps is None else qps.init_qp_in_place(n, q, m)
        qp.settings.eps_abs = EPS
        qp.settings.eps_rel = 0.0
        qp.init(
            data.Q[i], data.p[i], data.A[i] if q else None, data.b[i] if q else None, data.G[i], low, data.h[i]
        )  # fmt: skip
        return qp

    def gradients(qp: Any) -> Answer:
        back = qp.model.backward_data
        return qp.results.x, back.dL_dH, back.dL_dg, back.dL_dC, back.dL_du, back.dL_dA, back.dL_db

    def serial() -> Answer:
        answers = []
        for i in range(B):
            qp = made(i, None)
            qp.solve()
            dense.compute_backward(qp, loss[i], EPS, 1e-6, 1e-6)
            answers.append(gradients(qp))
        return np.array([a[0] for a in answers]), answers

    def parallel() -> Answer:
        # Room for all beforehand: a batch that grows moves what it holds, and leaves the references to it dangling.
        qps = dense.BatchQP(B)
        for i in range(B):
            made(i, qps)
        dense.solve_in_parallel(num_threads=threads or None, qps=qps)
        losses = dense.VectorLossDerivatives()
        for each in loss:
            losses.append(each)
        dense.solve_backward_in_parallel(
            num_threads=threads or None, qps=qps, loss_derivatives=losses, eps=EPS, rho_backward=1e-6, mu_backward=1e-6
        )
        answers = [gradients(qps.get(i)) for i in range(B)]
        return np.array([a[0] for a in answers]), answers

    return serial if threads == 1 or B == 1 else parallel


def moreau(data: Data, threads: int) -> Callable[[], Answer]:
    """moreau's CompiledSolver on its CPU backend: structure known beforehand, values new in every call."""
    import moreau as package

    B, n = data.p.shape
    m, q = data.h.shape[1], data.b.shape[1]
    rows = m + q
    of_Q = (data.Q != 0).any(axis=0)
    of_rows = np.concatenate([(data.A != 0).any(axis=0), (data.G != 0).any(axis=0)])
    starts = [np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).tolist() for mask in (of_Q, of_rows)]
    columns = [np.nonzero(mask)[1].tolist() for mask in (of_Q, of_rows)]
    cones = package.Cones(num_zero_cones=q, num_nonneg_cones=m)
    ipm = package.IPMSettings(tol_gap_abs=EPS, tol_gap_rel=EPS, tol_feas=EPS)
    settings = package.Settings(device="cpu", batch_size=B, enable_grad=True, ipm_settings=ipm)
    solver = package.CompiledSolver(
        n, rows, starts[0], columns[0], starts[1], columns[1], cones=cones, settings=settings
    )  # fmt: skip

    def call() -> Answer:
        solver.setup(data.Q[:, of_Q], np.concatenate([data.A, data.G], 1)[:, of_rows])
        solution = solver.solve(data.p, np.concatenate([data.b, data.h], 1))
        return solution.x, solver.backward(data.z_bar)

    return call


def cvxpylayers(data: Data, threads: int) -> Callable[[], Answer]:
    """cvxpylayers in torch, with its default solver; Q comes as its factor, which the gradient is taken of."""
    import cvxpy as cp
    import torch
    from cvxpylayers.torch import CvxpyLayer

    n = data.p.shape[1]
    m, q = data.h.shape[1], data.b.shape[1]
    root, p, G, h = cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter((m, n)), cp.Parameter(m)
    A, b = cp.Parameter((max(q, 1), n)), cp.Parameter(max(q, 1))
    z = cp.Variable(n)
    constraints = [G @ z <= h] + ([A @ z == b] if q else [])
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ z) + p @ z), constraints)
    layer = CvxpyLayer(problem, parameters=[root, p, G, h] + ([A, b] if q else []), variables=[z])
    roots = torch.from_numpy(np.ascontiguousarray(np.linalg.cholesky(data.Q).swapaxes(1, 2)))

    def solve(Q: Any, *rest: Any) -> Any:
        (answer,) = layer(Q, *(a for a in rest if a.numel()))
        return answer

    return _with_gradients(solve, data._replace(Q=roots.numpy()))


def osqp(data: Data, threads: int) -> Callable[[], Answer]:
    """OSQP with its own adjoint, one object a sample; 1e-9 is beyond ADMM's reach in time, so 1e-6."""
    import osqp as package
    from scipy import sparse

    B = len(data.p)
    low = np.full(data.h.shape[1], -np.inf)
    zeros = np.zeros(data.h.shape[1] + data.b.shape[1])

    def call() -> Answer:
        z, gradients = [], []
        for i in range(B):
            solver = package.OSQP()
            C = sparse.csc_matrix(np.concatenate([data.A[i], data.G[i]]))
            solver.setup(
                sparse.csc_matrix(np.triu(data.Q[i])), data.p[i], C,
                np.concatenate([data.b[i], low]), np.concatenate([data.b[i], data.h[i]]),
                verbose=False, eps_abs=1e-6, eps_rel=1e-6, max_iter=20000,
            )  # fmt: skip
            result = solver.solve()
            solver.adjoint_derivative_compute(dx=data.z_bar[i], dy=zeros)
            gradients.append((solver.adjoint_derivative_get_mat(), solver.adjoint_derivative_get_vec()))
            z.append(result.x)
        return np.array(z), gradients

    return call


PEERS: Final[dict[str, Peer]] = {
    "qpth": qpth,
    "QPLayer": qplayer,
    "ProxQP": proxqp,
    "moreau": moreau,
    "cvxpylayers": cvxpylayers,
    "OSQP": osqp,
}
