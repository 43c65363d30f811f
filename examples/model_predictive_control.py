"""A model-predictive controller with an input-convex terminal cost, tuned through its quadratic program.

    python examples/model_predictive_control.py               # train, export, run closed-loop, tune on the device
    python examples/model_predictive_control.py --json        # the same figures for machines

An unstable system x⁺ = A x + B u is to be driven to the origin with |u| <= 1. Looking 30 steps ahead does it well and
is slow; looking 3 steps ahead is quick, and blind to what comes after. In between: 3 steps, and an input-convex
network V that says what is left to pay at the end,

    min over u, t of  Σ_k x_k'Q x_k + R u_k²  +  x_N'P x_N + w't    s.t.  |u| <= 1,  t >= 0,  t >= W x_N + b,  w >= 0

whose epigraph makes the whole a quadratic program. W, b and w are found by imitating the first input of the slow
controller, with gradients through the program, at first in torch. Then the package runs with onnxruntime alone, and
is tuned there for a plant that has changed: its input has lost three tenths of its effect, which the controller does
not know and learns from what a slow controller of the true plant does.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import icnnrt
from icnnrt_exporters import QPLayer, TrainSpec, export

Array = NDArray[np.float64]

A = np.array([[1.0, 0.2, 0.0], [0.15, 1.0, 0.2], [0.0, 0.05, 0.9]])  # 50 Hz, one unstable mode
B = np.array([[0.0], [0.05], [0.2]])
COST, EFFORT = np.diag([1.0, 0.1, 0.01]), 0.05
SHORT, LONG = 3, 30
HIDDEN = 24
X_MOST = np.array([0.3, 0.3, 0.3])  # initial states are drawn from this box
EPISODES, EPISODE = 64, 100  # how many, and their steps
TRAIN, STEPS, BATCH_SIZE, LEARNING_RATE = 1024, 300, 32, 2e-2
TUNING_STEPS, TUNING_RATE = 300, 1e-2
SEED = 0


def predicted(A: Array, B: Array, steps: int) -> tuple[Array, Array]:
    """x_k = F_k x_0 + S_k u for k = 1..steps: F [steps, n, n], S [steps, n, steps]."""
    n = len(A)
    F, S = np.zeros((steps, n, n)), np.zeros((steps, n, steps))
    for k in range(steps):
        F[k] = A @ (F[k - 1] if k else np.eye(n))
        S[k] = A @ S[k - 1] if k else 0.0
        S[k, :, k] = B[:, 0]
    return F, S


class Controller(nn.Module):
    """x_0 [B, 3] -> the first input [B, 1], by one quadratic program in (u, t)."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        F, S = predicted(A, B, SHORT)
        H = 2.0 * (sum(s.T @ COST @ s for s in S) + EFFORT * np.eye(SHORT))
        Q = np.zeros((SHORT + HIDDEN, SHORT + HIDDEN))
        Q[:SHORT, :SHORT] = H
        c = 2.0 * sum(s.T @ COST @ f for s, f in zip(S, F, strict=True))  # p_u = c x_0
        least, most = np.full((2, SHORT + HIDDEN), np.inf)
        least[:], most[:SHORT] = 0.0, 1.0
        least[:SHORT] = -1.0
        for name, value in {"Q": Q, "c": c, "F_N": F[-1], "S_N": S[-1], "least": least, "most": most}.items():
            self.register_buffer(name, torch.from_numpy(value))
        self.W = nn.Parameter(torch.randn(HIDDEN, 3, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(-torch.rand(HIDDEN, generator=generator, dtype=torch.float64) * 0.3)
        self.w = nn.Parameter(0.1 * torch.ones(HIDDEN, dtype=torch.float64))
        self.layer = QPLayer()

    def forward(self, x: Tensor) -> Tensor:
        # W S_N u − t <= −(W F_N x_0 + b)
        G = torch.cat([self.W @ self.S_N, -torch.eye(HIDDEN, dtype=x.dtype)], 1)
        h = -(x @ (self.W @ self.F_N).T + self.b)
        p = torch.cat([x @ self.c.T, self.w.clamp(min=0.0).expand(x.shape[0], HIDDEN)], 1)
        return self.layer(self.Q, p, G, h, lower=self.least, upper=self.most)[:, :1]


def slow(x: Array, A: Array, B: Array) -> Array:
    """The first inputs [N, 1] of the controller that looks far ahead."""
    F, S = predicted(A, B, LONG)
    H = 2.0 * (sum(s.T @ COST @ s for s in S) + EFFORT * np.eye(LONG))
    c = 2.0 * sum(s.T @ COST @ f for s, f in zip(S, F, strict=True))
    solution = icnnrt.qp(H, x @ c.T, lower=np.full(LONG, -1.0), upper=np.full(LONG, 1.0))
    assert not solution.status.any()
    return solution.z[:, :1].copy()


def states(count: int, rng: np.random.Generator) -> Array:
    return rng.uniform(-X_MOST, X_MOST, (count, 3))


def closed_loop(controller: Any, x: Array, A: Array, B: Array) -> Array:
    """What each episode costs."""
    cost = np.zeros(len(x))
    for _ in range(EPISODE):
        u = np.clip(controller(x), -1.0, 1.0)
        cost += ((x @ COST) * x).sum(1) + EFFORT * u[:, 0] ** 2
        x = x @ A.T + u @ B.T
    return cost


def train(x: Array, u: Array, tell: Any) -> Controller:
    """Imitate the slow controller; gradients pass through the quadratic program to its G, h and p."""
    generator = torch.Generator().manual_seed(SEED)
    net = Controller(generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    states, inputs = torch.from_numpy(x), torch.from_numpy(u)
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(x), (BATCH_SIZE,), generator=generator)
        loss = ((net(states[rows]) - inputs[rows]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            tell(f"step {step}/{STEPS}  mean squared error of the input {loss.item():.2e}")
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--out", type=Path, help="a folder to keep the packages in")
    arguments = parser.parse_args()
    tell = (lambda text: None) if arguments.json else print
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    x, x_test = states(TRAIN, rng), states(EPISODES, rng)
    weak = 0.7 * B

    blind = Controller(torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        blind.w.zero_()
    u = slow(x, A, B)
    net = train(x, u, tell)

    def by_torch(net: Controller) -> Any:
        @torch.no_grad()
        def control(x: Array) -> Array:
            return net(torch.from_numpy(x)).numpy()

        return control

    with TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "controller.icnn"
        export(net, None, torch.from_numpy(x[:4]), torch.from_numpy(u[:4]), path, kind="qp", train=TrainSpec())
        # From here on nothing needs torch.
        session = icnnrt.load(path)

        def quick(x: Array) -> Array:
            return session.solve_qp(x).z

        once = x_test[:1]
        quick(once)
        began = time.perf_counter()
        for _ in range(200):
            quick(once)
        seconds = (time.perf_counter() - began) / 200
        costs = {
            "3 steps, blind": closed_loop(by_torch(blind), x_test, A, B),
            "3 steps and V": closed_loop(quick, x_test, A, B),
            "30 steps": closed_loop(lambda x: slow(x, A, B), x_test, A, B),
            "weak plant: 3 steps and V": closed_loop(quick, x_test, A, weak),
        }
        tuner = icnnrt.FineTuner(session, learning_rate=TUNING_RATE)
        wanted = slow(x, A, weak)
        for step in range(TUNING_STEPS):
            rows = rng.permutation(len(x))[:BATCH_SIZE]
            report = tuner.step(x[rows], wanted[rows])
            if (step + 1) % 50 == 0:
                tell(f"tuning step {step + 1}/{TUNING_STEPS}  mean squared error of the input {report.loss:.2e}")
        costs["weak plant: tuned on the device"] = closed_loop(quick, x_test, A, weak)
        costs["weak plant: 30 steps"] = closed_loop(lambda x: slow(x, A, weak), x_test, A, weak)
    means = {name: float(cost.mean()) for name, cost in costs.items()}
    if arguments.json:
        print(json.dumps({"mean_cost": means, "microseconds_a_control": 1e6 * seconds}))
        return
    for name, mean in means.items():
        print(f"{name:32}  mean cost of an episode {mean:.3f}")
    print(f"one control takes {1e6 * seconds:.0f} µs with onnxruntime")


if __name__ == "__main__":
    main()
