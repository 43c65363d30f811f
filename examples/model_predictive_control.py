"""A model-predictive controller with an input-convex terminal cost, tuned through its quadratic program.

    python examples/model_predictive_control.py               # train, export, run closed-loop, tune on the device
    python examples/model_predictive_control.py --json        # the same figures for machines
    python examples/model_predictive_control.py --seeds 5 6   # of other draws

An unstable system x⁺ = A x + B u is to be driven to the origin with |u| <= 1. Looking 30 steps ahead does it well and
is slow; looking 3 steps ahead is quick, and blind to what comes after. In between: 3 steps, and an input-convex
network V that says what is left to pay at the end,

    min over u, t of  Σ_k x_k'Q x_k + R u_k²  +  x_N'P x_N + w't    s.t.  |u| <= 1,  t >= 0,  t >= W x_N + b,  w >= 0

whose epigraph makes the whole a quadratic program. W, b and w are found by imitating the first input of the slow
controller, with gradients through the program, at first in torch. Then the package runs with onnxruntime alone, and
is tuned there for a plant that has changed: its input has lost half of its effect, which the controller does not know
and learns from what a slow controller of the true plant would have done in the states that the device has met. Some of
its episodes are kept aside, and say which weights stay.

One seed draws the states, the network and the order of its batches. What one seed gives is chance: each figure is a
mean over five, with the least and the most of them.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import icnnrt
from icnnrt.federated import set_weights
from icnnrt_exporters import QPLayer, TrainSpec, export

Array = NDArray[np.float64]

A = np.array([[1.0, 0.2, 0.0], [0.15, 1.0, 0.2], [0.0, 0.05, 0.9]])  # 50 Hz, one unstable mode
B = np.array([[0.0], [0.05], [0.2]])
COST, EFFORT = np.diag([1.0, 0.1, 0.01]), 0.05
SHORT, LONG = 3, 30
HIDDEN = 24
WEAK = 0.5 * B  # the plant that the device meets
# Initial states are drawn from this box: from all of it the weak plant, too, can be held with |u| <= 1. Beyond, a few
# episodes that no controller can hold would cost more than all the others.
X_MOST = np.array([0.2, 0.2, 0.2])
EPISODES, EPISODE = 64, 60  # how many, and their steps
TRAIN, STEPS, BATCH_SIZE, LEARNING_RATE = 1024, 300, 32, 2e-2
SEEN, ASIDE, WATCHED = 30, 10, 25  # episodes to learn from, others to judge by, and their steps
EPOCHS, PATIENCE, TUNING_RATE = 12, 4, 1e-2
SEEDS = range(5)


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


def run(controller: Any, x: Array, A: Array, B: Array, steps: int = EPISODE) -> tuple[Array, Array]:
    """Closed loop from x [N, 3]: what each episode costs [N], and the states met [steps N, 3]."""
    cost, met = np.zeros(len(x)), []
    for _ in range(steps):
        u = np.clip(controller(x), -1.0, 1.0)
        met.append(x)
        cost += ((x @ COST) * x).sum(1) + EFFORT * u[:, 0] ** 2
        x = x @ A.T + u @ B.T
    return cost, np.concatenate(met)


def train(x: Array, u: Array, generator: torch.Generator, tell: Any) -> Controller:
    """Imitate the slow controller; gradients pass through the quadratic program to its G, h and p."""
    net = Controller(generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    states, inputs = torch.from_numpy(x), torch.from_numpy(u)
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(x), (BATCH_SIZE,), generator=generator)
        loss = ((net(states[rows]) - inputs[rows]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            tell(f"step {step}/{STEPS}  mean squared error of the input {loss.item():.2e}")
    return net


def tune(session: icnnrt.Session, rng: np.random.Generator, tell: Any) -> None:
    """Imitate a slow controller of the weak plant where the device itself has been on that plant."""

    def watched(episodes: int) -> tuple[Array, Array]:
        _, x = run(lambda x: session.solve_qp(x).z, states(episodes, rng), A, WEAK, WATCHED)
        return x, slow(x, A, WEAK)

    (x, wanted), aside = watched(SEEN), watched(ASIDE)
    tuner = icnnrt.FineTuner(session, learning_rate=TUNING_RATE)
    fitted = tuner.fit(x, wanted, epochs=EPOCHS, batch_size=BATCH_SIZE, validation=aside, patience=PATIENCE)
    best = min([fitted.validation_before, *(epoch.validation for epoch in fitted.epochs)])
    tell(f"tuned: mean squared error in the episodes kept aside {fitted.validation_before:.2e}, now {best:.2e}")


def costs_of(
    session: icnnrt.Session, net: Mapping[str, Array], rng: np.random.Generator, tell: Any
) -> dict[str, float]:
    """What an episode costs in the mean over EPISODES, with the weights of one network. Nothing here needs torch."""
    x = states(EPISODES, rng)

    def mean(controller: Any, B: Array) -> float:
        return float(run(controller, x, A, B)[0].mean())

    def quick(x: Array) -> Array:
        return session.solve_qp(x).z

    costs = {
        "30 steps": mean(lambda x: slow(x, A, B), B),
        "weak plant: 30 steps": mean(lambda x: slow(x, A, WEAK), WEAK),
    }
    set_weights(session, {"w": np.zeros(HIDDEN)})  # V = 0
    costs["3 steps, blind"] = mean(quick, B)
    set_weights(session, net)
    costs["3 steps and V"] = mean(quick, B)
    costs["weak plant: 3 steps and V"] = mean(quick, WEAK)
    tune(session, rng, tell)
    costs["weak plant: tuned on the device"] = mean(quick, WEAK)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--out", type=Path, help="a folder to keep the package in, with the network of the first seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="the draws to take means over")
    arguments = parser.parse_args()
    tell = (lambda text: None) if arguments.json else print
    torch.set_num_threads(1)

    draws, nets = [], []
    for seed in arguments.seeds:
        tell(f"seed {seed}")
        draws.append(np.random.default_rng(seed))
        x = states(TRAIN, draws[-1])
        nets.append(train(x, slow(x, A, B), torch.Generator().manual_seed(seed), tell))
    with TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "controller.icnn"
        x_0 = torch.from_numpy(states(4, np.random.default_rng(0)))
        export(nets[0], None, x_0, torch.zeros(4, 1, dtype=torch.float64), path, kind="qp", train=TrainSpec())
        # From here on nothing needs torch. The graphs are the same for every network: one package, several weights.
        weights = [{name: weight.detach().numpy() for name, weight in net.named_parameters()} for net in nets]
        session = icnnrt.load(path)
        found = [costs_of(session, *one, tell) for one in zip(weights, draws, strict=True)]

        once = np.full((1, 3), 0.1)
        began = time.perf_counter()
        for _ in range(200):
            session.solve_qp(once)
        seconds = (time.perf_counter() - began) / 200

    # Episodes of one seed start where those of another do not: each is told by what 30 steps make of them.
    times = {
        name: [costs[name] / costs["weak plant: 30 steps" if "weak" in name else "30 steps"] for costs in found]
        for name in ("3 steps, blind", "3 steps and V", "weak plant: 3 steps and V", "weak plant: tuned on the device")
    }
    if arguments.json:
        print(json.dumps({"times_the_slow_one": times, "costs": found, "microseconds_a_control": 1e6 * seconds}))
        return
    print(f"cost of an episode, as a multiple of what looking {LONG} steps ahead costs; mean over {len(found)} seeds")
    for name, ratios in times.items():
        print(f"{name:32}  {np.mean(ratios):7.3f}  from {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"one control takes {1e6 * seconds:.0f} µs with onnxruntime")


if __name__ == "__main__":
    main()
