"""Quadratic programs with few entries, by the names that `QPSolver.solve` takes them by."""

import numpy as np


def mpc(stages, states=4, inputs=2, seed=0, rows=False, start=2.0):
    """Predictive control: z = (u_0, x_1, u_1, x_2, ...), x_{k+1} = F x_k + E u_k, boxes on both, and rows of G."""
    rng = np.random.default_rng(seed)
    F = np.eye(states) + 0.1 * rng.standard_normal((states, states))
    F /= max(1.0, np.abs(np.linalg.eigvals(F)).max())
    E = 0.3 * rng.standard_normal((states, inputs))
    width = inputs + states
    n, q = stages * width, stages * states
    A, b = np.zeros((q, n)), np.zeros(q)
    for k in range(stages):
        row, column = k * states, k * width
        A[row : row + states, column : column + inputs] = E
        A[row : row + states, column + inputs : column + width] = -np.eye(states)
        if k:
            A[row : row + states, column - states : column] = F
    b[:states] = -F @ (start * rng.standard_normal(states))
    of_input = np.tile(np.arange(width) < inputs, stages)
    program = {
        "Q": np.diag(np.where(of_input, 0.1, 1.0)),
        "p": 0.1 * rng.standard_normal(n),
        "A": A,
        "b": b,
        "lower": np.where(of_input, -0.5, -4.0),
        "upper": np.where(of_input, 0.5, 4.0),
    }
    if rows:
        G = np.kron(np.eye(stages), rng.standard_normal((1, width)))
        program |= {"G": G, "h": np.ones(stages), "h_lower": np.full(stages, -3.0)}
    return program


def scattered(n, m, q, density, seed=0, rank=None):
    """Entries here and there, built backwards from an answer; Q of low rank if that is given."""
    rng = np.random.default_rng(seed)

    def some(rows):
        return (rng.random((rows, n)) < density) * rng.standard_normal((rows, n))

    R, G, A = some(rank or n), some(m), some(q)
    G[np.arange(m), rng.permutation(n)[:m]] += 1.5
    A[np.arange(q), rng.permutation(n)[:q]] += 1.5
    Q = R.T @ R + (0.1 * np.eye(n) if rank is None else 0.0)
    z, lam = rng.standard_normal(n), (rng.random(m) < 0.3) * rng.uniform(0.5, 1.5, m)
    p = -(Q @ z + G.T @ lam + A.T @ rng.standard_normal(q))
    program = {"Q": Q, "p": p}
    if m:
        program |= {"G": G, "h": G @ z + (lam == 0.0) * rng.uniform(0.5, 1.5, m)}
    return program | ({"A": A, "b": A @ z} if q else {})


def sizes(program):
    rows = (len(program[name]) if name in program else 0 for name in "GA")
    return len(program["p"]), *rows
