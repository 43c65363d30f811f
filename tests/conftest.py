"""Settings and packages that several test files share; none of them changes one."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import pytest
import seeds

if seeds.SHIFT:  # before any test is imported: some draw as they are
    seeds.shift_numpy()
    seeds.shift_torch()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "cache"):
        exports.FOLDER = config.cache.mkdir("exports")
        if not hasattr(config, "workerinput"):
            exports.prune()


# The files that take longest, longest first: by turns of one file each, the workers end together only if the last turns
# are short.
LONGEST = (
    *("test_zoo", "test_train_graph", "test_export", "test_qp_hard", "test_cli_tune", "test_cli", "test_kept_convex"),
    *("test_qp_export", "test_verify_faults", "test_finetune", "test_polyhedron", "test_packer", "test_cut_models"),
    *("test_epigraph", "test_repair", "test_heads", "test_domain_packages", "test_polyhedron_graph", "test_domains"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_report_header() -> str | None:
    return f"seeds of the tests are moved by {seeds.SHIFT}" if seeds.SHIFT else None


# A shell that puts the tests in the background has SIGINT ignored, and nohup SIGHUP, also by what they start; some of
# them press Ctrl-C or hang up.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argmin layer's method in torch, eagerly too: kernels round in another way."""
    from icnnrt_models.layers import bundle_entropy

    monkeypatch.setattr(bundle_entropy, "kernel", lambda role, dtype: None)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The networks here are tiny: waking a second thread of torch costs up to a hundred times what it saves."""
    torch = sys.modules.get("torch")  # collection has imported it, if any test wants it
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this process for packages that its tests share."""
    return tmp_path_factory.mktemp("packages")


def _export(path: Path, energy: Any, x_dim: int, n: int, iterations: int, **keywords: Any) -> Path:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from icnnrt_models import BundleEntropyArgmin

    generator = torch.Generator().manual_seed(1)
    T = next(energy.parameters()).dtype
    x = torch.randn(4, x_dim, generator=generator, dtype=T)
    y = torch.rand(4, n, generator=generator, dtype=T)
    exports.export(energy, BundleEntropyArgmin(energy, iterations=iterations), x, y, path, **keywords)
    return path


@pytest.fixture(scope="session")
def digits_like_package(packages: Path) -> Path:
    """float32, x [4] to y [5], a PICNN of softplus units."""
    torch = pytest.importorskip("torch")
    from icnnrt_models import PICNN

    energy = PICNN(4, 5, hidden=(8, 8), activation="softplus", generator=torch.Generator().manual_seed(0))
    note = {"note": "[a] test"}
    return _export(packages / "digits_like.icnn", energy, 4, 5, 8, metadata=note)


@pytest.fixture(scope="session")
def relu_network() -> Any:
    """float64, x [3] to y [4], a FICNN of ReLU units, of the first draw where x moves a quarter of the answers or more.

    Within one piece of a network that is convex in x and y together x moves no slope, and so no answer. Where it bends
    little, all of them may lie there.
    """
    torch = pytest.importorskip("torch")
    from icnnrt_models import FICNN, BundleEntropyArgmin

    generator, T = torch.Generator().manual_seed(1), torch.float64
    x, d = torch.randn(2, 64, 3, generator=generator, dtype=T)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        energy = FICNN(3, 4, hidden=(8, 8), activation="relu", dtype=T, generator=generator)
        with torch.no_grad():
            for layer in energy.layers:
                layer.W_y.mul_(4.0)
        argmin = BundleEntropyArgmin(energy, iterations=12)
        moved = (argmin.solve(x + 1e-3 * d).y - argmin.solve(x).y).abs().amax(1) > 1e-6
        if moved.double().mean() >= 0.25:
            return energy
    raise AssertionError("x moves hardly any answer of any draw")


@pytest.fixture(scope="session")
def relu_package(packages: Path, relu_network: Any) -> Path:
    """`relu_network`, solved by 12 cuts."""
    return _export(packages / "relu.icnn", relu_network, 3, 4, 12)


@pytest.fixture(scope="session")
def polyhedron_packages(packages: Path) -> dict[str, Path]:
    """float64, x [3] to y [4], with the head polyhedron: "smooth" of softplus units, "pieces" of ReLU units."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from icnnrt_models import FICNN, PICNN

    generator, T = torch.Generator().manual_seed(0), torch.float64
    smooth = PICNN(3, 4, hidden=(6, 5), activation="softplus", dtype=T, generator=generator)
    pieces = FICNN(3, 4, hidden=(9, 8), activation="relu", dtype=T, generator=generator)
    x, y = torch.randn(4, 3, generator=generator, dtype=T), torch.rand(4, 4, generator=generator, dtype=T)

    heads = ("pullback", "polyhedron")
    exports.export(smooth, None, x, y, packages / "smooth.icnn", heads=(*heads, "hessian"))
    exports.export(pieces, None, x, y, packages / "pieces.icnn", heads=heads)
    return {name: packages / f"{name}.icnn" for name in ("smooth", "pieces")}


@pytest.fixture(scope="session")
def train_package(packages: Path) -> Path:
    """float64, x [3] to y [4], a PICNN of softplus units, tuned by squared error and Adam."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from icnnrt_exporters import TrainSpec
    from icnnrt_models import PICNN

    generator = torch.Generator().manual_seed(0)
    energy = PICNN(3, 4, hidden=(6, 6), activation="softplus", dtype=torch.float64, generator=generator)
    return _export(packages / "train.icnn", energy, 3, 4, 8, train=TrainSpec())


@pytest.fixture(scope="session")
def nonconvex_package(packages: Path) -> Path:
    """float32, x [4] to y [5]: negative weights between hidden layers, which nothing in the package owns up to."""
    torch = pytest.importorskip("torch")
    from icnnrt_models import PICNN

    energy = PICNN(4, 5, hidden=(8, 8), activation="softplus", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i in (1, 2):
            energy.get_parameter(f"layers.{i}.W_z.weight")[:, :3] = -3.0

    with pytest.warns(UserWarning, match="not convex in y"):
        return _export(packages / "nonconvex.icnn", energy, 4, 5, 8, nonnegative=(), allow_not_convex=True)


@pytest.fixture(scope="session")
def six_strains(packages: Path) -> Path:
    """float64, x [2] to y [6], as many as a strain has, with the heads hessian and pullback: for large batches."""
    torch = pytest.importorskip("torch")
    from icnnrt_models import PICNN

    generator = torch.Generator().manual_seed(0)
    energy = PICNN(2, 6, hidden=(8, 8), activation="softplus", dtype=torch.float64, generator=generator)
    heads = ("hessian", "pullback")
    return _export(packages / "six_strains.icnn", energy, 2, 6, 5, heads=heads)
