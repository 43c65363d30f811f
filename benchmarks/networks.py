"""The networks of the argmin part, exported once and kept in the system's folder for temporary files."""

import getpass
import hashlib
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.environment import ROOT

if TYPE_CHECKING:
    import onnx
    import torch

X_DIM: Final = 8  # small: evaluating value.onnx K times repeats the x path, which must not pad that floor


@dataclass(frozen=True)
class Network:
    """A FICNN of softplus units as it is drawn at the start of training, and the cuts K of its argmin."""

    n: int
    hidden: tuple[int, ...]
    K: int
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def name(self) -> str:
        return f"n {self.n}, {self.hidden[0]}×{len(self.hidden)}, K {self.K}"


NETWORKS: Final = (
    Network(24, (64, 64), 10, ("float32", "float64")),
    Network(159, (600, 600), 10),
    Network(2048, (200, 200), 30),
)


@dataclass(frozen=True)
class Map:
    """A FICNN of softplus units without context, for its gradient map y -> ∇f(y)."""

    n: int
    hidden: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"n {self.n}, {self.hidden[0]}×{len(self.hidden)}"


MAP: Final = Map(50, (64, 64, 64, 64))
DIGITS: Final = ROOT / "models" / "digits_completion" / "digits_completion.icnn"  # --quick: needs no export


def package(network: Network, dtype: str, progress: Callable[[str], None]) -> Path:
    """The network's package, exported if there is none yet that today's exporter has made."""
    shape = "x".join(map(str, (network.n, *network.hidden, network.K)))
    path = _folder() / f"ficnn-{shape}-{dtype}-{_sources()}.icnn"
    if path.exists():
        return path
    import torch

    from icnnrt_exporters.exporter import export
    from icnnrt_models import FICNN, BundleEntropyArgmin

    generator = torch.Generator().manual_seed(0)
    T = getattr(torch, dtype)
    energy = FICNN(X_DIM, network.n, network.hidden, dtype=T, generator=generator)
    x = torch.randn(4, X_DIM, generator=generator, dtype=T)
    y = torch.rand(4, network.n, generator=generator, dtype=T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(
            energy,
            BundleEntropyArgmin(energy, iterations=network.K),
            x,
            y,
            path,
            name="benchmark",
            progress=lambda stage: progress(f"exporting {network.name}, {dtype}, once: {stage}"),
        )
    return path


def map_energy(network: Map) -> "torch.nn.Module":
    """The module of a gradient map, as it is drawn at the start of training."""
    import torch

    from icnnrt_models import FICNN

    return FICNN(0, network.n, network.hidden, generator=torch.Generator().manual_seed(0))


def gradient_map(network: Map, progress: Callable[[str], None]) -> Path:
    """The package of a gradient map, without a solver; kept as `package` keeps its own."""
    path = _folder() / f"map-{'x'.join(map(str, (network.n, *network.hidden)))}-{_sources()}.icnn"
    if path.exists():
        return path
    import torch

    from icnnrt_exporters.exporter import export

    x, y = torch.zeros(4, 0), torch.rand(4, network.n, generator=torch.Generator().manual_seed(0))
    export(map_energy(network), None, x, y, path, name="map", progress=lambda s: progress(f"exporting, once: {s}"))
    return path


def on_polyhedron(activation: str, mu: float, progress: Callable[[str], None]) -> Path:
    """A package with the head polyhedron, x [3] and y [4], float64; kept as `package` keeps its own."""
    path = _folder() / f"polyhedron-{activation}-{mu}-{_sources()}.icnn"
    if path.exists():
        return path
    import torch

    from icnnrt_exporters.exporter import export
    from icnnrt_models import FICNN

    generator, T = torch.Generator().manual_seed(0), torch.float64
    energy = FICNN(3, 4, (16, 16), activation=activation, dtype=T, generator=generator)
    x, y = (torch.rand(4, size, generator=generator, dtype=T) for size in (3, 4))
    heads = ("pullback", "polyhedron") if activation == "relu" else ("pullback", "hessian", "polyhedron")
    export(
        *(energy, None, x, y, path),
        heads=heads,
        polyhedron={"mu": mu},
        progress=lambda stage: progress(f"exporting {activation}, once: {stage}"),
    )
    return path


def only(graph: bytes, output: str) -> bytes:
    """The part of a graph that one output needs."""
    import onnx_ir as ir
    from onnx_ir.passes import common as passes

    model = ir.from_proto(_model(graph))
    kept = [v for v in model.graph.outputs if v.name == output]
    model.graph.outputs[:] = kept
    passes.RemoveUnusedNodesPass()(model)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _model(graph: bytes) -> "onnx.ModelProto":
    import onnx

    return onnx.load_model_from_string(graph)


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"icnnrt-benchmarks-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _sources() -> str:
    """Changes whenever an export might come out differently."""
    import onnxscript
    import torch

    digest = hashlib.sha256(f"{torch.__version__} {onnxscript.__version__}".encode())
    folders = (ROOT / "exporters" / "icnnrt_exporters", ROOT / "models" / "icnnrt_models")
    files = [
        *(file for folder in folders for file in folder.rglob("*.py")),
        ROOT / "icnnrt" / "mathematics" / "reference.py",
    ]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
