"""Averages of convex networks are convex, whatever comes from elsewhere is checked, and Flower can drive it."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amounts import amount

pytest.importorskip("onnxruntime")
pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

import icnnrt
from icnnrt import federated
from icnnrt.errors import InputError, MissingDependencyError
from icnnrt.federated import get_weights, set_weights, weighted_average

BASE = Path(__file__).parents[1] / "models" / "digits_completion" / "digits_0to4.icnn"


@pytest.fixture(scope="module")
def softplus_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float64, x [2] to y [3], z-path weights positive as the softplus of free ones."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from exports import export

    from icnnrt_models import FICNN, BundleEntropyArgmin

    generator = torch.Generator().manual_seed(0)
    energy = FICNN(2, 3, hidden=(5, 5), positivity="softplus", dtype=torch.float64, generator=generator)
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    y = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    path = tmp_path_factory.mktemp("packages") / "softplus.icnn"
    export(energy, BundleEntropyArgmin(energy, iterations=4), x, y, path)
    return path


@pytest.fixture
def session(train_package: Path) -> Iterator[icnnrt.Session]:
    with icnnrt.load(train_package) as opened:
        yield opened


def drawn(session: icnnrt.Session, rng: np.random.Generator, scale: float) -> dict[str, Any]:
    """Weights of a convex network, many of them exactly zero."""
    made = {}
    for name, array in get_weights(session).items():
        new = scale * rng.standard_normal(array.shape)
        if session.manifest.weights.tensors[name].nonnegative:
            new = np.maximum(new, 0.0)
        made[name] = new.astype(array.dtype)
    return made


# --- Averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relu_package", "train_package", "softplus_package"])
@settings(deadline=None, max_examples=amount(25))
@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.lists(st.floats(0, 1e9), min_size=1, max_size=5).filter(lambda n: sum(n) > 0),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_averages_of_convex_networks_are_convex(
    kind: str, request: pytest.FixtureRequest, seed: int, samples: list[float], scale: float
) -> None:
    opened = OPEN.setdefault(kind, icnnrt.load(request.getfixturevalue(kind)))
    rng = np.random.default_rng(seed)
    mean = weighted_average([drawn(opened, rng, scale) for _ in samples], samples)
    for name, array in mean.items():
        if opened.manifest.weights.tensors[name].nonnegative:
            assert array.min() >= 0
    set_weights(opened, mean)
    B, n = 32, opened.manifest.y_shape[0]
    x = rng.standard_normal((B, *opened.manifest.x_shape))
    ends, part = rng.uniform(-1, 2, (2, B, n)), rng.uniform(0, 1, (B, 1))
    (low, _), (high, _) = (opened.value_and_gradient(x, y) for y in ends)
    between, _ = opened.value_and_gradient(x, part * ends[0] + (1 - part) * ends[1])
    chord = part[:, 0] * low + (1 - part[:, 0]) * high
    rounding = 1e-12 * (1 + np.abs([low, high]).max())
    assert (between <= chord + rounding).all()


OPEN: dict[str, icnnrt.Session] = {}  # hypothesis calls a test many times, and sessions take long to make


@settings(deadline=None, max_examples=amount(50))
@given(seed=st.integers(0, 2**32 - 1), devices=st.integers(1, 6))
def test_the_average_is_the_weighted_mean(seed: int, devices: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [{"a": rng.standard_normal((2, 3)).astype(np.float32), "b": rng.random(4)} for _ in range(devices)]
    samples = rng.integers(1, 100, devices)
    mean = weighted_average(weights, samples.tolist())
    for name in ("a", "b"):
        assert mean[name].dtype == weights[0][name].dtype
        stacked = np.stack([w[name] for w in weights])
        np.testing.assert_allclose(mean[name], np.average(stacked, axis=0, weights=samples), rtol=1e-6, atol=1e-7)
        assert (mean[name] >= stacked.min(0) - 1e-6).all()
        assert (mean[name] <= stacked.max(0) + 1e-6).all()


def test_a_device_without_samples_does_not_count() -> None:
    one, other = {"a": np.ones(2)}, {"a": np.full(2, 5.0)}
    assert weighted_average([one, other], [3, 0])["a"].tolist() == [1.0, 1.0]


def test_what_cannot_be_averaged_is_refused() -> None:
    def bad(weights: Any, samples: Any) -> str:
        with pytest.raises(InputError) as caught:
            weighted_average(weights, samples)
        return str(caught.value)

    one = {"a": np.ones(2)}
    assert "one device or more, but got 0 devices" in bad([], [])
    assert "got 1 devices and 2 numbers" in bad([one], [1, 2])
    for samples in ([0.0], [-1.0], [np.nan], [np.inf]):
        assert "samples: expected numbers of at least 0, not all 0" in bad([one], samples)
    assert "'b' is in only one of devices 0 and 1" in bad([one, {"a": np.ones(2), "b": np.ones(1)}], [1, 1])
    assert "expected a as float64[2] of floats from every device, but got float64[3]" in bad(
        [one, {"a": np.ones(3)}], [1, 1]
    )
    assert "but got float32[2] from device 1" in bad([one, {"a": np.ones(2, np.float32)}], [1, 1])
    assert "but got int64[2] from device 0" in bad([{"a": np.ones(2, np.int64)}], [1])
    assert "a of device 1 holds NaN or infinity" in bad([one, {"a": np.array([1.0, np.nan])}], [1, 1])


# --- To and from a session -----------------------------------------------------------------------


def test_weights_come_back_as_they_were_set(session: icnnrt.Session) -> None:
    tuner = icnnrt.FineTuner(session)
    assert get_weights(session).keys() == get_weights(tuner).keys() == set(session.manifest.train.weights)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3)), rng.random((8, 4))
    new = drawn(session, rng, 0.3)
    set_weights(tuner, new)
    for name, array in get_weights(tuner).items():
        np.testing.assert_array_equal(array, new[name])
    assert tuner.step(x, y).accepted
    tuner.rollback()
    np.testing.assert_array_equal(session.weights["layers.0.W_y"], new["layers.0.W_y"])
    one = "layers.0.b"
    set_weights(tuner, {one: np.zeros(new[one].shape, np.float32)})
    assert session.weights[one].dtype == np.float64
    assert not session.weights[one].any()
    np.testing.assert_array_equal(session.weights["layers.0.W_y"], new["layers.0.W_y"])


def test_only_weights_that_move_travel(relu_package: Path) -> None:
    with icnnrt.load(relu_package) as opened:
        trainable = {name for name, spec in opened.manifest.weights.tensors.items() if spec.trainable}
        assert get_weights(opened).keys() == trainable


def test_what_cannot_be_set_is_refused_and_changes_nothing(session: icnnrt.Session) -> None:
    tuner = icnnrt.FineTuner(session)
    before = get_weights(session)
    good = drawn(session, np.random.default_rng(0), 1.0)

    def bad(name: str, array: Any) -> None:
        for target in (session, tuner):
            with pytest.raises(InputError) as caught:
                set_weights(target, {**good, name: array})
            told.append(str(caught.value))
            for key, value in get_weights(session).items():
                np.testing.assert_array_equal(value, before[key])

    told: list[str] = []
    bad("layers.9.W_y", np.ones(3))
    assert 'expected names of weights that train trains, but got "layers.9.W_y"' in told[-1]
    bad("layers.0.b", np.ones(7))
    assert "expected layers.0.b as float64[6], but got float64[7]" in told[-1]
    bad("layers.0.b", np.ones(6, np.int64))
    assert "but got int64[6]" in told[-1]
    bad("layers.0.b", np.full(6, np.nan))
    assert "layers.0.b holds NaN or infinity" in told[-1]
    bad("layers.1.W_z.weight", -1e-3 * np.ones((6, 6)))
    assert (
        "layers.1.W_z.weight should be nonnegative, but its smallest entry is -0.001, and the energy would no longer be"
        in told[-1]
    )
    with pytest.raises(InputError, match="expected arrays by name, but got list"):
        set_weights(session, [1.0])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a session or a FineTuner, but got str"):
        get_weights("model.icnn")  # type: ignore[arg-type]


def test_weights_read_while_another_thread_tunes_are_of_one_step(session: icnnrt.Session) -> None:
    levels = [{name: np.full(array.shape, level) for name, array in get_weights(session).items()} for level in (1, 2)]
    levels = [{name: array.astype(float) for name, array in level.items()} for level in levels]
    set_weights(session, levels[0])
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            set_weights(session, levels[turn % 2])
            time.sleep(0.001)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            assert len({float(array.flat[0]) for array in get_weights(session).values()}) == 1
    finally:
        stop.set()
        writer.join()


# --- Flower --------------------------------------------------------------------------------------


def test_icnnrt_federated_imports_without_flower_and_says_what_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['flwr'] = None\n"
        "from icnnrt import errors, federated\n"
        "try:\n"
        "    federated.client_app(lambda context: None)\n"
        "except errors.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'icnnrt[federated]'" in done.stdout
    assert issubclass(MissingDependencyError, icnnrt.IcnnrtError)


class InProcess:
    """Flower's grid with every client in this process: messages are handed over, nothing is sent."""

    def __init__(self, app: Any, clients: int) -> None:
        from flwr.app import Context, RecordDict

        self._app = app
        self._contexts = {
            i + 1: Context(run_id=1, node_id=i + 1, node_config={"partition-id": i}, state=RecordDict(), run_config={})
            for i in range(clients)
        }

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
        return [self._app(message, self._contexts[message.metadata.dst_node_id]) for message in messages]


@pytest.fixture
def in_flower(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Flower's strategies, and the identity that its runtime gives the process of a server's app."""
    pytest.importorskip("flwr", reason="Flower is not installed: pip install 'icnnrt[federated]'")
    strategy = pytest.importorskip("flwr.serverapp.strategy", reason="this Flower has no message strategies: >= 1.21")
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # older ones do not ask
        return strategy
    for field in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)
    return strategy


CLIENTS, ROUNDS, EPOCHS, BATCH = 4, 5, 2, 64


def test_four_clients_of_flower_on_split_digits_end_better_than_each_alone(in_flower: Any) -> None:
    """Every client starts from a network that knows 0 to 4, and sees mostly two or three of the ten digits. Flower's
    own FedAvg averages; alone, each learns as long."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    x, y = images[:, :, :4].reshape(-1, 32), images[:, :, 4:].reshape(-1, 32)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    test, learnt = order[:360], order[360:]
    # Most of a digit's images go to one client.
    home = np.where(
        rng.random(len(learnt)) < 0.85, digits.target[learnt] % CLIENTS, rng.integers(0, CLIENTS, len(learnt))
    )
    parts = [learnt[home == i] for i in range(CLIENTS)]

    def error(session: icnnrt.Session) -> float:
        return float(np.mean((session.argmin(x[test]).y - y[test]) ** 2))

    def devices() -> list[federated.Local]:
        return [
            federated.Local(
                icnnrt.FineTuner(icnnrt.load(BASE), learning_rate=3e-3), x[part], y[part], (x[part[:40]], y[part[:40]])
            )
            for part in parts
        ]

    locals_ = devices()
    start = get_weights(locals_[0].tuner)
    alone = []
    for local in locals_:
        local.tuner.fit(local.x, local.target, epochs=ROUNDS * EPOCHS, batch_size=BATCH)
        alone.append(error(local.tuner.session))

    locals_ = devices()
    app = federated.client_app(
        lambda context: locals_[context.node_config["partition-id"]], epochs=EPOCHS, batch_size=BATCH
    )
    result = in_flower.FedAvg().start(
        grid=InProcess(app, CLIENTS), initial_arrays=federated.to_record(start), num_rounds=ROUNDS
    )
    with icnnrt.load(BASE) as session:
        before = error(session)
        set_weights(session, federated.from_record(result.arrays))
        together = error(session)
    print(f"before {before:.4f}, alone {', '.join(f'{e:.4f}' for e in alone)}, together {together:.4f}")
    assert together < min(alone) < before
    assert sum(metrics["refused"] for metrics in result.train_metrics_clientapp.values()) == 0
    losses = [metrics["loss"] for _, metrics in sorted(result.evaluate_metrics_clientapp.items())]
    assert losses[-1] < losses[0]
