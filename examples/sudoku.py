"""A quadratic program that learns the rules of 4×4 Sudoku from examples (Amos, Kolter, OptNet, ICML 2017).

    python examples/sudoku.py                # learn in torch, export, solve with onnxruntime alone: half a minute
    python examples/sudoku.py --json         # the same figures for machines
    python examples/sudoku.py --out FOLDER   # keep the package

A puzzle is 64 numbers: for each of 16 cells, which of 4 digits is given (all 0 for an open cell). The answer is

    argmin over z >= 0 of  0.05 ‖z‖² − x'z   s.t.  A z = A z_0

and A [40, 64] and z_0 are learnt: nobody tells the layer that rows, columns and blocks hold each digit once, yet these
are the equalities that it finds. The largest of the four numbers of a cell is its digit. 288 grids exist; those of the
test puzzles are not among those of the training puzzles. A step of training now and then loses what others have found,
so puzzles of the training grids are kept aside, and the rules that solve them best are those that stay.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import icnnrt
from icnnrt_exporters import QPLayer, export

SEED = 0
CELLS, DIGITS = 16, 4
EQUALITIES = 40  # the rank of the true rules
TRAIN_GRIDS, TRAIN_PUZZLES, ASIDE, TEST_PUZZLES = 230, 2000, 200, 500
STEPS, BATCH_SIZE, LEARNING_RATE = 700, 32, 1e-2
EVERY = 50  # steps from one look at the puzzles kept aside to the next
GIVEN = 6, 10  # cells


class Sudoku(nn.Module):
    """x [B, 64] -> z [B, 64]."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        n = CELLS * DIGITS
        self.register_buffer("Q", 0.1 * torch.eye(n, dtype=torch.float64))
        self.register_buffer("least", torch.zeros(n, dtype=torch.float64))
        self.A = nn.Parameter(torch.rand(EQUALITIES, n, generator=generator, dtype=torch.float64))
        self.z_0 = nn.Parameter(torch.full((n,), 1.0 / DIGITS, dtype=torch.float64))  # feasible by construction
        self.layer = QPLayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.Q, -x, A=self.A, b=self.A @ self.z_0, lower=self.least)


def grids() -> NDArray[np.int64]:
    """All 288, [288, 16]."""

    def filled(grid: list[int]) -> Iterator[list[int]]:
        if len(grid) == CELLS:
            yield grid
            return
        row, column = divmod(len(grid), 4)
        for digit in range(DIGITS):
            seen = (
                other == digit and (r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2))
                for other, (r, c) in zip(grid, (divmod(i, 4) for i in range(len(grid))), strict=True)
            )
            if not any(seen):
                yield from filled([*grid, digit])

    return np.array(list(filled([])))


def puzzles(
    grids: NDArray[np.int64], every: NDArray[np.int64], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Puzzles x [count, 64] with one solution among `every` grid, and that solution, one-hot."""
    x, y = [], []
    while len(x) < count:
        grid = grids[rng.integers(len(grids))]
        given = np.zeros(CELLS, bool)
        given[rng.permutation(CELLS)[: rng.integers(GIVEN[0], GIVEN[1] + 1)]] = True
        if (every[:, given] == grid[given]).all(1).sum() == 1:
            answer = np.eye(DIGITS)[grid]
            x.append((answer * given[:, None]).ravel())
            y.append(answer.ravel())
    return np.array(x), np.array(y)


def right(z: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The share of puzzles of which every cell is right."""
    found, wanted = (a.reshape(-1, CELLS, DIGITS).argmax(2) for a in (z, y))
    return float((found == wanted).all(1).mean())


def train(x: NDArray[np.float64], y: NDArray[np.float64], tell: Any) -> Sudoku:
    """The last ASIDE puzzles are those kept aside."""
    generator = torch.Generator().manual_seed(SEED)
    net = Sudoku(generator)
    optimizer = torch.optim.Adam([net.A, net.z_0], lr=LEARNING_RATE)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    least, best = float("inf"), net.state_dict()
    began = time.perf_counter()
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(x) - ASIDE, (BATCH_SIZE,), generator=generator)
        loss = ((net(inputs[rows]) - targets[rows]) ** 2).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY:
            continue
        with torch.no_grad():
            error = ((net(inputs[-ASIDE:]) - targets[-ASIDE:]) ** 2).sum(1).mean().item()
        seconds = time.perf_counter() - began
        tell(f"step {step}/{STEPS}  squared error {loss.item():.3f}, of those kept aside {error:.3f}  {seconds:.0f} s")
        if error < least:
            least, best = error, {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(best)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--out", type=Path, help="a folder to keep sudoku.icnn in")
    arguments = parser.parse_args()
    tell = (lambda text: None) if arguments.json else print
    torch.set_num_threads(1)

    rng = np.random.default_rng(SEED)
    every = grids()
    shuffled = every[rng.permutation(len(every))]
    x, y = puzzles(shuffled[:TRAIN_GRIDS], every, TRAIN_PUZZLES + ASIDE, rng)
    x_test, y_test = puzzles(shuffled[TRAIN_GRIDS:], every, TEST_PUZZLES, rng)
    net = train(x, y, tell)

    with TemporaryDirectory() as folder:
        path = (arguments.out or Path(folder)) / "sudoku.icnn"
        path.parent.mkdir(parents=True, exist_ok=True)
        export(net, None, torch.from_numpy(x[:4]), torch.from_numpy(y[:4]), path, kind="qp")
        session = icnnrt.load(path)
        began = time.perf_counter()
        solution = session.solve_qp(x_test)
        seconds = time.perf_counter() - began
    figures = {
        "test_puzzles": TEST_PUZZLES,
        "solved_right": right(solution.z, y_test),
        "largest_residual": float(solution.residual.max()),
        "unsolved": int((solution.status != 0).sum()),
        "microseconds_a_puzzle": 1e6 * seconds / TEST_PUZZLES,
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(
            f"{figures['solved_right']:.1%} of {TEST_PUZZLES} unseen puzzles solved by onnxruntime, "
            f"{figures['microseconds_a_puzzle']:.0f} µs each; "
            f"largest KKT residual {figures['largest_residual']:.1e}, {figures['unsolved']} without an answer"
        )


if __name__ == "__main__":
    main()
