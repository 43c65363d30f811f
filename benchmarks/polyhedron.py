"""The argmin over a polyhedron at batch 1: its graph beside the same method in Python.

Networks of x [3] and y [4] on the simplex {1'y = 1, y >= 0}, float64, μ = 0.1, of ReLU and of softplus units. `graph`
is argmin_polyhedron.onnx by io-binding with native kernels, `portable` on portable bodies, `session` and `vjp` the
calls as Python makes them; `python` and `python vjp` are the same calls of a package without the head: one call of
value.onnx and one quadratic program a cut.
"""

from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnxruntime

import icnnrt
from benchmarks import graphs, networks
from benchmarks.interleaved import Contender, Missing, race
from benchmarks.report import Row, entries
from benchmarks.settings import Settings
from benchmarks.threads import threads
from icnnrt.format.package import Package
from icnnrt.format.signatures import POLYHEDRON_ROLES

ACTIVATIONS: Final = ("relu", "softplus")
MU: Final = 0.1
BASE: Final = "session"


def polyhedron(settings: Settings) -> list[Row]:
    """A row for each activation; with --quick for one."""
    chosen = ACTIVATIONS[:1] if settings.quick else ACTIVATIONS
    return [row(settings, activation) for activation in chosen]


def row(settings: Settings, activation: str) -> Row:
    opened = Package.open(networks.on_polyhedron(activation, MU, settings.progress))
    setting = {"network": f"{activation} 16×2", "n": 4, "batch": 1, "dtype": "float64", "threads": 1}
    settings.progress("polyhedron " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    facts: dict[str, Any] = {}
    with threads(1):
        contenders = _contenders(opened, facts)
        outcome = race(contenders, settings.budget)
    return Row(setting, BASE, entries(contenders, outcome, BASE), facts, ())


def _contenders(opened: Package, facts: dict[str, Any]) -> dict[str, Contender | Missing]:
    x, y_bar = np.random.default_rng(0).random((1, 3)), np.ones((1, 4))
    budget: dict[str, Any] = {"A": np.ones((1, 4)), "b": [1.0], "lower": 0.0, "mu": MU}
    kept = {role: graph for role, graph in opened.graphs.items() if role not in POLYHEDRON_ROLES}
    files = {role: file for role, file in opened.manifest.graphs.items() if role in kept}
    manifest = replace(opened.manifest, graphs=files, polyhedron=None)
    contenders: dict[str, Contender | Missing] = {}
    for name, package in (("session", opened), ("python", replace(opened, manifest=manifest, graphs=kept))):
        session = icnnrt.load(package)
        found = session.argmin_polyhedron(x, **budget)
        facts[f"cuts_{name}"], facts[f"energy_{name}"] = int(found.cuts[0]), float(found.energy[0])
        contenders[name] = Contender(lambda session=session: session.argmin_polyhedron(x, **budget))  # type: ignore[misc]
        vjp = "vjp" if name == "session" else f"{name} vjp"
        contenders[vjp] = Contender(lambda session=session, found=found: session.vjp_polyhedron(found, y_bar))  # type: ignore[misc]
    weights = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(a)) for name, a in opened.weights.items()}
    feeds = {
        **{"x": x, "y_init": np.zeros((1, 4)), "G": np.zeros((1, 0, 4)), "h": np.zeros((1, 0))},
        **{"A": np.ones((1, 1, 4)), "b": np.ones((1, 1)), "lower": np.zeros((1, 4)), "upper": np.full((1, 4), np.inf)},
    }
    library = graphs.native_library()
    for name, path in (("graph", library), ("portable", None)):
        if isinstance(path, Missing):
            contenders[name] = path
        else:
            model = opened.graphs["argmin_polyhedron"]
            contenders[name] = Contender(graphs.Bound(model, feeds, threads=1, library=path, weights=weights))
    return contenders
