"""The multi-label network of Amos, Xu, Kolter (ICML 2017, section 6.1) on bibtex, trained through its argmin.

    python models/bibtex/recipe.py [--data PATH] [--epochs N] [--seed 0] [--out DIR] [--json]

Given 1836 binary words x of a publication, find its 159 binary tags. Two networks of one budget, one loss and one way
of stopping:

    PICNN          y* = argmin over y in [0,1]^159 of f(x, y; θ) − H(y), trained through the argmin
    feed-forward   1836-600-159 with ReLU, batch norm and sigmoid outputs: no energy, no argmin

A fifth of the training set says how many epochs to train and where to cut y into tags; then the network is trained
afresh on the whole training set for that many epochs. The test set is looked at once, at the end. What is reported of
the PICNN is computed by onnxruntime from the exported package.
"""

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from icnnrt_models import PICNN, BundleEntropyArgmin
from icnnrt_models.networks.picnn import PICNNLayer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "bibtex.npz"
OUT = ROOT / "build" / "bibtex"
ARRAYS = ("trainX", "trainY", "testX", "testY")

HIDDEN = 600
EVALUATION_BATCH = 128
LIKELIHOOD_FLOOR = 1e-6  # y is a float32: beyond this, 1 − y has no digits left and 1/(y (1 − y)) no meaning
THRESHOLDS = np.round(np.arange(0.02, 0.98, 0.01), 2)
PAPER = {"PICNN": 0.415, "feed-forward": 0.396}

Labels = NDArray[np.bool_]
Floats = NDArray[np.float32]


# --- Data ----------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Words x [N, words] in {0, 1} and tags y [N, tags] in {0, 1}, both float32."""

    x: Floats
    y: Floats

    def take(self, rows: slice | NDArray[np.int64]) -> "Rows":
        return Rows(self.x[rows], self.y[rows])


class Split(NamedTuple):
    train: Rows
    test: Rows


class DataError(Exception):
    """The data file is absent or is not what the recipe wants; the message is one sentence for the user."""


def load(path: Path) -> Split:
    """Mulan's own split of bibtex from an .npz file of 0/1 arrays trainX, trainY, testX, testY.

    Raises `DataError` for a file that is absent or of other contents.
    """
    wanted = (
        "a NumPy .npz file with the 0/1 arrays trainX [4880, 1836], trainY [4880, 159], testX [2515, 1836] and "
        "testY [2515, 159], made from bibtex-train.arff and bibtex-test.arff of the Mulan library "
        "(github.com/tsoumakas/mulan, data/multi-label/bibtex)"
    )
    if not path.is_file():
        raise DataError(f"There is no data file {path.name} where --data points: the recipe wants {wanted}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in ARRAYS]
    except Exception as error:
        raise DataError(
            f"{path.name} cannot be read ({type(error).__name__}: {error}): the recipe wants {wanted}."
        ) from (error)
    shapes = [a.shape for a in arrays]
    fits = all(len(s) == 2 for s in shapes) and (
        shapes[0][0] == shapes[1][0] and shapes[2][0] == shapes[3][0] and shapes[0][1] == shapes[2][1]
    )
    if not fits or shapes[1][1] != shapes[3][1] or not all(np.isin(a, (0, 1)).all() for a in arrays):
        raise DataError(f"{path.name} holds arrays of shapes {shapes}: the recipe wants {wanted}.")
    a, b, c, d = (a.astype(np.float32) for a in arrays)
    return Split(Rows(a, b), Rows(c, d))


def hold_out(data: Rows, seed: int) -> tuple[Rows, Rows]:
    """Four fifths to train on and one fifth to validate on, drawn with the seed."""
    order = np.random.default_rng(seed).permutation(len(data.x))
    fifth = len(order) // 5
    return data.take(order[fifth:]), data.take(order[:fifth])


# --- Metrics -------------------------------------------------------------------------------------


def f1(true: Labels, predicted: Labels, axis: int | None = None) -> NDArray[np.float64]:
    """2 TP / (2 TP + FP + FN), counted over `axis` or over everything; 1 where nothing is true or predicted."""
    both = np.logical_and(true, predicted).sum(axis)
    either = true.sum(axis) + predicted.sum(axis)
    return np.where(either == 0, 1.0, 2.0 * both / np.maximum(either, 1))


class Scores(NamedTuple):
    """F1 in its three averages."""

    example: float
    """Mean over the examples of each one's F1: what the paper calls macro-F1."""
    label: float
    """Mean over the labels of each one's F1: what macro-F1 means elsewhere."""
    micro: float
    """F1 of all decisions together."""


def scores(true: NDArray[Any], y: NDArray[Any], threshold: float = 0.5) -> Scores:
    """F1 of the label sets {j : y_j >= threshold} against the 0/1 matrix `true`, both [N, labels]."""
    truth, predicted = true >= 0.5, y >= threshold
    return Scores(
        float(f1(truth, predicted, 1).mean()), float(f1(truth, predicted, 0).mean()), float(f1(truth, predicted))
    )


def best_threshold(true: NDArray[Any], y: NDArray[Any]) -> float:
    """The threshold of the best example-averaged F1, of a grid with steps of 0.01; the middle one of several."""
    found = np.array([scores(true, y, float(t)).example for t in THRESHOLDS])
    best = THRESHOLDS[found == found.max()]
    return float(best[len(best) // 2])


# --- Networks and their training -----------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What both networks are trained with; found on the held-out fifth, see the model card. The paper's own code has
    Adam, 1e-3, batches of 128, ten cuts and the plain cross-entropy."""

    epochs: int = 40  # at most
    patience: int = 8  # epochs without a better validation F1 before training stops
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.0  # of the matrices; decoupled, as in AdamW
    loss: Literal["cross-entropy", "squared"] = "cross-entropy"
    # Of a tag that is there, in the cross-entropy. With 1, y is a probability p, and of tags this rare few reach ½,
    # while F1 wants those from about 0.1 on. With w, y is ½ where p = 1/(1 + w).
    positive_weight: float = 12.0
    hidden: int = HIDDEN
    activation: str = "softplus"
    iterations: int = 10  # with 5, three answers in five keep a gap above the tolerance
    steps: int = 20  # of every inner solve; more only polish its last digits
    start_share: float | None = 0.1  # see `argmin_network`; None starts as a PICNN usually does


def argmin_network(words: int, tags: int, settings: Settings, seed: int) -> BundleEntropyArgmin:
    """The untrained PICNN of the paper and its argmin: widths 600 and `tags`, batch norm on the context path.

    It starts as a feed-forward net. The last context layer u_2 has an entry for each tag: with W_y = −1, W_yu = I and
    b_y = 0 in the last layer of z

        f(x, y) = −u_2(x)'y + W_z (z_2 ∘ gate) + ...,

    so that y* is near σ(u_2(x)) while the part convex in y is small: `start_share` of what a PICNN usually starts with.
    """
    energy = PICNN(
        words,
        tags,
        hidden=(settings.hidden, tags),
        activation=settings.activation,
        batch_norm=True,
        linear_context_output=True,
        generator=torch.Generator().manual_seed(seed),
    )
    if settings.start_share is not None:
        last = energy.layers[-1]
        assert isinstance(last, PICNNLayer)
        assert last.W_z is not None
        with torch.no_grad():
            last.W_y.fill_(-1.0)
            last.W_yu.copy_(torch.eye(tags))
            last.b_y.zero_()
            last.W_z.set_weight_(settings.start_share * last.W_z.nonnegative_weight())
    return BundleEntropyArgmin(energy, iterations=settings.iterations, steps=settings.steps)


def feed_forward(words: int, tags: int, settings: Settings, seed: int) -> nn.Module:
    """The untrained feed-forward net of the paper, 1836-600-159, with outputs in (0, 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(words, settings.hidden),
            nn.ReLU(),
            nn.BatchNorm1d(settings.hidden),
            nn.Linear(settings.hidden, tags),
            nn.Sigmoid(),
        )


@dataclass(frozen=True)
class Epoch:
    """What training reports after each pass over the data; the scores are None without validation rows."""

    number: int  # from 1
    loss: float  # mean over the epoch
    validation: Scores | None = None  # at threshold 0.5
    threshold: float | None = None  # the best one on the validation rows
    tuned: Scores | None = None  # there


def predict(network: nn.Module, x: Floats) -> Floats:
    """y of a network for all rows of x, in eval mode."""
    training = network.training
    network.eval()
    with torch.no_grad():
        parts = [
            network(torch.from_numpy(part)) for part in np.split(x, range(EVALUATION_BATCH, len(x), EVALUATION_BATCH))
        ]
    network.train(training)
    return cast(Floats, torch.cat(parts).numpy())


def fit(
    network: nn.Module,
    data: Rows,
    settings: Settings,
    seed: int,
    validation: Rows | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train `network`, a module x -> y in (0, 1), by Adam; deterministic for a seed on one machine and one thread.

    With validation rows, training stops `patience` epochs after the best F1 on them, and the network is left as it was
    at its best; without, it runs all epochs. On return the network is in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    project = getattr(getattr(network, "energy", None), "project_", lambda: None)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    history: list[Epoch] = []
    best, best_f1, best_state = 0, -1.0, None
    for number in range(1, settings.epochs + 1):
        network.train()
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(settings.batch_size):
            if len(rows) == 1:
                continue  # batch norm has no variance of one row
            loss = _loss(network(x[rows]), y[rows], settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            project()
            total += float(loss.detach()) * len(rows)
        epoch = Epoch(number, total / len(x))
        if validation is not None:
            found = predict(network, validation.x)
            plain, threshold = scores(validation.y, found), best_threshold(validation.y, found)
            epoch = Epoch(number, epoch.loss, plain, threshold, scores(validation.y, found, threshold))
            if plain.example > best_f1:
                best, best_f1, best_state = number, plain.example, copy.deepcopy(network.state_dict())
        history.append(epoch)
        on_epoch(epoch)
        if validation is not None and number - best >= settings.patience:
            break
    if best_state is not None:
        network.load_state_dict(best_state)
    network.eval()
    return history


def _loss(y: Tensor, true: Tensor, settings: Settings) -> Tensor:
    if settings.loss == "squared":
        return nn.functional.mse_loss(y, true)
    y = y.clamp(LIKELIHOOD_FLOOR, 1 - LIKELIHOOD_FLOOR)
    return nn.functional.binary_cross_entropy(y, true, weight=1 + (settings.positive_weight - 1) * true)


# --- The recipe ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkReport:
    """One network: how training was stopped, and its test scores."""

    epochs: int
    """The epoch with the best validation F1 at threshold 0.5; the network reported was trained that long."""
    threshold: float
    """The best threshold on the validation rows at that epoch."""
    validation: Scores
    validation_tuned: Scores
    test: Scores
    """At threshold 0.5, trained on the whole training set."""
    test_tuned: Scores
    """The same network at the tuned threshold."""
    test_four_fifths: Scores
    """At threshold 0.5, trained on the four fifths alone."""
    seconds: float
    """Of training, both times."""


@dataclass(frozen=True)
class PackageReport:
    """The exported PICNN, run by onnxruntime on the whole test set."""

    path: str
    megabytes: float
    torch_difference_max: float
    """max |y − y of torch|; near a kink of the energy one bit decides which piece a cut is made of."""
    torch_difference_mean: float
    decisions_changed: int
    """How many of the N × labels decisions at threshold 0.5 differ from torch's."""
    gap_median: float
    gap_max: float
    residual_max: float
    status: dict[str, int]
    batch_milliseconds_per_sample: float
    """In batches of 128."""
    single_milliseconds: float
    """Median time of one sample alone."""


@dataclass(frozen=True)
class Report:
    """All that the recipe measured. The scores of the PICNN on the test set are those of the exported package."""

    seed: int
    settings: Settings
    picnn: NetworkReport
    feed_forward: NetworkReport
    package: PackageReport
    paper: dict[str, float] = field(default_factory=lambda: dict(PAPER))
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for network in ("picnn", "feed_forward"):
            for name, value in found[network].items():
                if isinstance(value, tuple):
                    found[network][name] = dict(zip(Scores._fields, value, strict=True))
        return found


class Trained(NamedTuple):
    """A network trained on the whole training set, with what the held-out fifth said before."""

    network: nn.Module
    best: Epoch
    y_four_fifths: Floats  # on the test set, of the network trained on four fifths
    seconds: float


Build = Callable[[int, int, Settings, int], nn.Module]


def train(
    build: Build, split: Split, settings: Settings, seed: int, on_epoch: Callable[[Epoch], None] = lambda epoch: None
) -> Trained:
    """Train on four fifths for the number of epochs, then afresh on everything for that many."""
    started = time.perf_counter()
    words, tags = split.train.x.shape[1], split.train.y.shape[1]
    part, held_out = hold_out(split.train, seed)
    network = build(words, tags, settings, seed)
    history = fit(network, part, settings, seed, held_out, on_epoch)
    best = max(history, key=lambda epoch: cast(Scores, epoch.validation).example)
    y_four_fifths = predict(network, split.test.x)
    network = build(words, tags, settings, seed)
    fit(network, split.train, replace(settings, epochs=best.number), seed, on_epoch=on_epoch)
    return Trained(network, best, y_four_fifths, time.perf_counter() - started)


def report_of(trained: Trained, test: Rows, y: Floats) -> NetworkReport:
    """The test scores of y, the answers of a trained network."""
    best = trained.best
    assert best.validation is not None
    assert best.tuned is not None
    assert best.threshold is not None
    return NetworkReport(
        epochs=best.number,
        threshold=best.threshold,
        validation=best.validation,
        validation_tuned=best.tuned,
        test=scores(test.y, y),
        test_tuned=scores(test.y, y, best.threshold),
        test_four_fifths=scores(test.y, trained.y_four_fifths),
        seconds=trained.seconds,
    )


def export_and_solve(
    layer: BundleEntropyArgmin, split: Split, path: Path, stage: Callable[[str], None], **metadata: Any
) -> tuple[Floats, PackageReport]:
    """Export the trained layer, reload it with onnxruntime, and solve for every test row."""
    import icnnrt
    from icnnrt_exporters.exporter import export

    x, y = (torch.from_numpy(a[:16]) for a in split.train)
    path.parent.mkdir(parents=True, exist_ok=True)
    export(layer.energy, layer, x, y, path, name="bibtex", metadata=metadata, overwrite=True, progress=stage)
    stage("solving the test set with onnxruntime")
    with icnnrt.load(path) as session:
        session.argmin(split.test.x[:1])  # the first call also builds the session
        cuts = range(EVALUATION_BATCH, len(split.test.x), EVALUATION_BATCH)
        started = time.perf_counter()
        parts = [session.argmin(part) for part in np.split(split.test.x, cuts)]
        seconds = time.perf_counter() - started
        single = []
        for i in range(min(50, len(split.test.x))):
            started = time.perf_counter()
            session.argmin(split.test.x[i : i + 1])
            single.append(time.perf_counter() - started)
    found, torch_y = np.concatenate([p.y for p in parts]), predict(layer, split.test.x)
    gap = np.concatenate([p.gap for p in parts])
    status = Counter(icnnrt.Status(int(s)).name for p in parts for s in p.status)
    return found, PackageReport(
        path=str(path),
        megabytes=sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6,
        torch_difference_max=float(np.abs(found - torch_y).max()),
        torch_difference_mean=float(np.abs(found - torch_y).mean()),
        decisions_changed=int(((found >= 0.5) != (torch_y >= 0.5)).sum()),
        gap_median=float(np.median(gap)),
        gap_max=float(gap.max()),
        residual_max=float(max(p.residual.max() for p in parts)),
        status=dict(status),
        batch_milliseconds_per_sample=1e3 * seconds / len(found),
        single_milliseconds=1e3 * float(np.median(single)),
    )


def run(
    split: Split,
    settings: Settings,
    seed: int,
    out: Path,
    on_epoch: Callable[[str, Epoch], None] = lambda name, epoch: None,
    stage: Callable[[str], None] = lambda line: None,
) -> Report:
    """Train both networks, export the PICNN to `out`/bibtex.icnn, and measure."""
    started = time.perf_counter()
    plain = train(feed_forward, split, settings, seed, lambda epoch: on_epoch("feed-forward", epoch))
    convex = train(argmin_network, split, settings, seed, lambda epoch: on_epoch("PICNN", epoch))
    y, package = export_and_solve(
        cast(BundleEntropyArgmin, convex.network),
        split,
        out / "bibtex.icnn",
        stage,
        data="bibtex",
        seed=seed,
        epochs=convex.best.number,
        threshold=convex.best.threshold,
    )
    return Report(
        seed=seed,
        settings=settings,
        picnn=report_of(convex, split.test, y),
        feed_forward=report_of(plain, split.test, predict(plain.network, split.test.x)),
        package=package,
        seconds=time.perf_counter() - started,
    )


def table(report: Report) -> str:
    """The figures in words and columns."""
    lines = [
        "Test F1 on bibtex                 example-averaged   per label   micro   threshold   epochs",
        *(f"paper, {name:<27}{value:>16.3f}" for name, value in report.paper.items()),
    ]
    for name, network in (("PICNN", report.picnn), ("feed-forward", report.feed_forward)):
        for threshold, found in ((0.5, network.test), (network.threshold, network.test_tuned)):
            lines.append(
                f"ours,  {name:<27}{found.example:>16.3f}{found.label:>12.3f}{found.micro:>8.3f}"
                f"{threshold:>12.2f}{network.epochs:>9}"
            )
    p = report.package
    status = ", ".join(f"{count} {name}" for name, count in p.status.items())
    lines += [
        "",
        f"Package {p.path}, {p.megabytes:.1f} MB, run by onnxruntime:",
        f"  status {status}; gap {p.gap_median:.1e} median, {p.gap_max:.1e} at most",
        f"  {p.batch_milliseconds_per_sample:.2f} ms a sample in batches of {EVALUATION_BATCH}, "
        f"{p.single_milliseconds:.1f} ms alone",
        f"  |y − y of torch| {p.torch_difference_max:.1e} at most, {p.torch_difference_mean:.1e} on average; "
        f"{p.decisions_changed} decisions differ",
        f"{report.seconds:.0f} s in all",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for a data file that is absent or unfit."""
    parser = argparse.ArgumentParser(description="Train, export and test the bibtex network of the ICNN paper.")
    parser.add_argument("--data", type=Path, default=DATA, help="the .npz file (default: ../shared/data/bibtex.npz)")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the held-out fifth")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for bibtex.icnn (default: build/bibtex)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    chosen = parser.parse_args(arguments)
    if chosen.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {chosen.epochs}")
    try:
        split = load(chosen.data)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    torch.set_num_threads(1)  # the argmin is a long chain of small operators: a second thread made it slower
    settings = Settings(epochs=chosen.epochs)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def on_epoch(name: str, epoch: Epoch) -> None:
            key = name if epoch.validation else f"{name}, all rows"
            if key not in tasks:
                tasks[key] = progress.add_task(key, total=None, line="")
            line = f"epoch {epoch.number}, loss {epoch.loss:.4f}"
            if epoch.validation and epoch.tuned:
                line += f", validation F1 {epoch.validation.example:.3f}, tuned {epoch.tuned.example:.3f}"
            progress.update(tasks[key], completed=epoch.number, line=line)

        export_task = progress.add_task("export", total=None, line="")
        report = run(
            split,
            settings,
            chosen.seed,
            chosen.out,
            on_epoch,
            lambda line: progress.update(export_task, line=line),
        )
    print(json.dumps(report.as_dict(), indent=2) if chosen.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
