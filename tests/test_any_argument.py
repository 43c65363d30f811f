"""Whatever is passed for an argument of the public API, nothing but an IcnnrtError comes out."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attacks
import numpy as np
import pytest
from amounts import ALL

import icnnrt
from icnnrt import FineTuner, IcnnrtError, Package, QPPattern, QPSolver, federated, programs, qp
from icnnrt.checking import golden
from icnnrt.checking.recommend import recommend
from icnnrt.checking.repair import project
from icnnrt.checking.verify import verify
from icnnrt.cli import tabular
from icnnrt.convexity import Convexity, prove
from icnnrt.epigraph import epigraph
from icnnrt.format import package
from icnnrt.format.checkpoints import History
from icnnrt.format.contents import weight_layout
from icnnrt.format.manifest import Manifest

FIXTURES = Path(__file__).parent / "fixtures" / "version1"


class Broken:
    """Raises whatever is asked of it."""

    def __array__(self, *args: object, **keywords: object) -> Any:
        raise RuntimeError("no array")

    __float__ = __index__ = __len__ = __iter__ = __fspath__ = __bool__ = __getitem__ = __array__  # type: ignore[assignment]


def odd_values() -> dict[str, Any]:
    """A value of every kind that somebody might pass by mistake."""
    return {
        "None": None,
        "True": True,
        "0": 0,
        "3": 3,
        "-1": -1,
        "1.5": 1.5,
        "nan": float("nan"),
        "inf": float("inf"),
        "1e400": 10**400,
        "complex": 1j,
        "text": "text",
        "blank": "",
        "nul": "nul\0l",
        "surrogate": "\ud800",
        "250 characters": "x" * 250,
        "5000 characters": "x" * 5000,
        "absent": "no/such/place",
        "bytes": b"..",
        "file": FIXTURES / "written_by.py",
        "list": [],
        "ragged": [1, [2, 3]],
        "texts": ["a", "b"],
        "tuple": (),
        "dict": {},
        "table": {"a": 1, 2: "b"},
        "set": {1},
        "function": lambda *args: None,
        "class": int,
        "iterator": iter([1]),
        "object": object(),
        "Broken": Broken(),
        "no numbers": np.zeros(0),
        "no rows": np.zeros((0, 0)),
        "number": np.array(2.0),
        "huge": np.full((2, 3), 1e300),
        "not numbers": np.full((2, 3), np.nan),
        "complex numbers": np.zeros((2, 3), complex),
        "texts in an array": np.array([["a", "b"]]),
        "objects": np.array([None, {}], object),
        "dates": np.array(["2026-01-01"], "datetime64[D]"),
        "five dimensions": np.zeros((1, 1, 1, 1, 1)),
        "record": np.zeros(2, [("a", "f8")]),
        "masked": np.ma.masked_array(np.zeros((2, 3)), True),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory of its own, as texts are taken for places to write to."""
    folder, before = tmp_path_factory.mktemp("arguments"), Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def at(place: Path) -> dict[str, Any]:
    """What the calls below start from."""
    names = ("unit_box", "box", "bregman", "space", "qp", "no_context", "gradient")
    sessions = {name: icnnrt.load(FIXTURES / f"{name}.icnn", native=False) for name in names}
    x = np.zeros((2, 2))
    np.save(place / "x.npy", x)
    np.savez(place / "x.npz", x=x, target=x)
    (place / "x.csv").write_text("1,2\n")
    tuner = FineTuner(sessions["unit_box"])
    tuner.save(place / "history")
    solver = QPSolver(2, 1)
    eye = np.eye(2)
    solver.solve(Q=eye, p=[1.0, 1.0], G=[[1.0, 1.0]], h=[1.0])
    return {
        **sessions,
        "x": x,
        "y": np.full((2, 3), 0.5),
        "tuner": tuner,
        "solver": solver,
        "Q": eye,
        "argmin": sessions["unit_box"].argmin(x),
        "solved": sessions["qp"].solve_qp(x),
        "polyhedron": sessions["space"].argmin_polyhedron(x, lower=0, upper=1),
        "qp answer": qp(eye, np.ones(2), np.ones((1, 2)), np.ones(1)),
        "weights": federated.get_weights(tuner),
    }


def calls(at: dict[str, Any], place: Path) -> dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]]:
    """name -> a function, and arguments that it takes; each is replaced in turn."""
    u, b, s, q, x, y = (at[name] for name in ("unit_box", "box", "space", "qp", "x", "y"))
    h, tuner, data = at["bregman"], at["tuner"], {"x": x, "target": y}
    skip = {"adjoint": "exact", "on_unsafe": "skip"}
    rows = {"G": np.ones((1, 3)), "h": np.ones(1), "A": np.ones((1, 3)), "b": np.ones(1), "lower": 0.0, "upper": 1.0}
    program = {"Q": at["Q"], "p": np.ones(2), "G": np.ones((1, 2)), "h": np.ones(1)}
    written = attacks.fields()
    history = History(place / "history", u.manifest)
    return {
        "load": lambda: (
            icnnrt.load,
            {"path": FIXTURES / "qp.icnn", "providers": None, "threads": None, "native": None, "strict": False}
            | {"memory": 1 << 20, "follow_links": False},
        ),
        "Package.open": lambda: (Package.open, {"path": FIXTURES / "qp.icnn", "follow_links": False}),
        "Package.save": lambda: (
            u.package.save,
            {"path": "saved", "weights": u.package.weights, "parity": {}, "metadata": {}, "convexity": None}
            | {"overwrite": True},
        ),
        "write": lambda: (package.write, {"path": "written", **written, "overwrite": True}),
        "weight_layout": lambda: (weight_layout, {"weights": u.package.weights}),
        "Manifest.from_json": lambda: (Manifest.from_json, {"data": u.manifest.to_json()}),
        "Convexity.from_json": lambda: (Convexity.from_json, {"value": u.manifest.convexity.to_json()}),
        "update_weights": lambda: (at["no_context"].update_weights, {"weights": dict(at["no_context"].weights)}),
        "value": lambda: (u.value, {"x": x, "y": y, "out": np.empty(2, np.float32)}),
        "gradient": lambda: (u.gradient, {"x": x, "y": y}),
        "value_and_gradient": lambda: (u.value_and_gradient, {"x": x, "y": y, "out": None}),
        "hvp": lambda: (h.hvp, {"x": x, "y": y, "v": y}),
        "hessian": lambda: (h.hessian, {"x": x, "y": y}),
        "value_gradient_hessian": lambda: (h.value_gradient_hessian, {"x": x, "y": y}),
        "gradient_x": lambda: (h.gradient_x, {"x": x, "y": y}),
        "pullback": lambda: (
            h.pullback,
            {"x": x, "y": y, "f_bar": np.ones(2), "gradient_bar": y, "out": None},
        ),
        "value without context": lambda: (at["no_context"].value, {"x": None, "y": y}),
        "argmin": lambda: (u.argmin, {"x": x, "lower": None, "upper": None, "y_init": y, "warm": None, "strict": None}),
        "argmin, warm": lambda: (u.argmin, {"x": x, "warm": at["argmin"]}),
        "argmin of a box": lambda: (b.argmin, {"x": x, "lower": 0.0, "upper": 1.0}),
        "solve_qp": lambda: (q.solve_qp, {"x": x, "tolerance": None, "steps": None, "strict": None}),
        "vjp": lambda: (u.vjp, {"solution": at["argmin"], "y_bar": y, **skip}),
        "vjp of a program": lambda: (q.vjp, {"solution": at["solved"], "y_bar": y, **skip}),
        "argmin_polyhedron": lambda: (
            s.argmin_polyhedron,
            {"x": x, **rows, "mu": 1.0, "iterations": 5, "tolerance": 1e-3, "y_init": y, "strict": False},
        ),
        "vjp_polyhedron": lambda: (
            s.vjp_polyhedron,
            {"solution": at["polyhedron"], "y_bar": y, "adjoint": "auto", "on_unsafe": "skip"},
        ),
        "prove_convexity": lambda: (u.prove_convexity, {"x": x, "seed": 0}),
        "prove": lambda: (
            prove,
            {"graph_bytes": u.package.graphs["value"], "weights": u.package.weights, "value": None, "x_samples": None}
            | {"seed": 0, "box": (0.0, 1.0)},
        ),
        "ArgminSolution.advice": lambda: (at["argmin"].advice, {"i": 0}),
        "QPNetworkSolution.advice": lambda: (at["solved"].advice, {"i": 0}),
        "PolyhedronSolution.advice": lambda: (at["polyhedron"].advice, {"i": 0}),
        "FineTuner": lambda: (FineTuner, {"session": u, "learning_rate": 1e-3, "strict": False}),
        "step": lambda: (tuner.step, {**data, "lower": None, "upper": None, "learning_rate": 1e-3}),
        "check": lambda: (tuner.check, {**data, "lower": None, "upper": None}),
        "loss": lambda: (tuner.loss, {**data, "lower": None, "upper": None}),
        "fit": lambda: (
            tuner.fit,
            {**data, "epochs": 1, "lower": None, "upper": None, "batch_size": 2, "learning_rate": 1e-3, "keep": 2}
            | {"validation": (x, y), "patience": 1, "worse": 0.5, "seed": 0, "history": place / "history"},
        ),
        "FineTuner.save": lambda: (tuner.save, {"history": place / "history", "keep": 2, "figures": {"loss": 1.0}}),
        "FineTuner.set_weights": lambda: (tuner.set_weights, {"weights": at["weights"]}),
        "resume": lambda: (tuner.resume, {"history": place / "history", "step": None}),
        "write_package": lambda: (tuner.write_package, {"path": "tuned", "overwrite": True}),
        "History": lambda: (History, {"folder": place / "history", "manifest": u.manifest, "keep": 2}),
        "History.to_write": lambda: (
            History.to_write,
            {"folder": place / "history", "manifest": u.manifest, "keep": 2},
        ),
        "History.load": lambda: (history.load, {"checkpoint": history.checkpoints[-1]}),
        "get_weights": lambda: (federated.get_weights, {"source": tuner}),
        "set_weights": lambda: (federated.set_weights, {"target": tuner, "weights": at["weights"]}),
        "weighted_average": lambda: (federated.weighted_average, {"weights": [at["weights"]] * 2, "samples": [1, 2]}),
        "qp": lambda: (
            qp,
            {**program, "A": np.ones((1, 2)), "b": np.ones(1), "h_lower": None, "lower": None, "upper": None}
            | {"start": None, "tolerance": None, "steps": None, "seconds": None}
            | {"native": False, "providers": None, "threads": None},
        ),
        "QPSolution.vjp": lambda: (at["qp answer"].vjp, {"z_bar": np.ones(2), "on_unsafe": "skip"}),
        "QPSolution.advice": lambda: (at["qp answer"].advice, {"i": 0}),
        "QPSolver": lambda: (
            QPSolver,
            {"n": 2, "m": 1, "q": 1, "batch": 1, "box": True, "two_sided": True, "dtype": "float64", "warm": False}
            | {"tolerance": None, "steps": None, "seconds": None, "native": False, "threads": None, "pattern": None},
        ),
        "QPPattern": lambda: (QPPattern, {"Q": np.eye(2), "G": np.ones((1, 2)), "A": None}),
        "QPSolver.solve": lambda: (at["solver"].solve, program),
        "QPSolver.vjp": lambda: (
            at["solver"].vjp,
            {"z_bar": np.ones((1, 2)), "lam_bar": None, "nu_bar": None, "bound_multipliers_bar": None},
        ),
        "verify": lambda: (
            verify,
            {"path": FIXTURES / "gradient.icnn", "x": None, "samples": 2, "seed": 0, "providers": None, "threads": None}
            | {"native": None},
        ),
        "project": lambda: (
            project,
            {"source": FIXTURES / "no_context.icnn", "target": "repaired", "x": None, "seed": 0, "overwrite": True},
        ),
        "recommend": lambda: (
            recommend,
            {"session": u, "x": x, "gap": 1e-2, "lower": None, "upper": None, "max_iterations": 2},
        ),
        "epigraph": lambda: (epigraph, {"source": u, "x": x, **rows, "mu": 0.0}),
        "replay": lambda: (golden.replay, {"session": at["gradient"], "golden": at["gradient"].package.golden}),
        "write_program": lambda: (programs.write_program, {"path": place / "p.lp", "program": _program(), "name": "n"}),
        "read_array": lambda: (tabular.read_array, {"path": place / "x.csv", "key": "x", "shape": (2,)}),
        "read_archive": lambda: (
            tabular.read_archive,
            {"path": place / "x.npz", "keys": ("x",), "only": True, "also": {}},
        ),
    }


def _program() -> programs.Program:
    none = programs.Coo(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), (0, 1))
    empty = np.zeros(0)
    square = none._replace(shape=(1, 1))
    return programs.Program(square, np.ones(1), none, empty, none, empty, np.zeros(1), np.ones(1), 0.0, ("y0",))


# A whole number of these is an order, and obeyed however large: they are no mistake to tell.
ORDERS = {("fit", "epochs"), ("argmin_polyhedron", "iterations"), ("recommend", "max_iterations")}
# All values for every argument with ICNNRT_ARGUMENTS=all, which takes minutes; else so many, in turn.
SOME = 4 if ALL else 2


@pytest.mark.filterwarnings("ignore")
def test_nothing_but_an_icnnrt_error_comes_out(at: dict[str, Any], place: Path) -> None:
    escaped = []
    names, turn = list(odd_values()), 0
    everything = os.environ.get("ICNNRT_ARGUMENTS") == "all"
    for name, make in calls(at, place).items():
        function, arguments = make()
        if name not in ("History.load", "epigraph"):  # whose checkpoint is gone by then, and whose network is smooth
            function(**arguments)
        for argument in arguments:
            chosen = names if everything else [names[(turn + 9 * i) % len(names)] for i in range(SOME)]
            turn += 1
            for what in chosen:
                if what == "1e400" and (name, argument) in ORDERS:
                    continue
                value = odd_values()[what]
                try:
                    function(**{**arguments, argument: value})
                except Exception as error:
                    if not isinstance(error, IcnnrtError) or not str(error).isprintable():
                        escaped.append(f"{name}({argument}={what}): {type(error).__name__}: {ascii(str(error))[:100]}")
    assert not escaped, "\n".join(escaped)


@pytest.mark.parametrize("what", list(odd_values()))
def test_no_path_gets_an_exception_out_of_load(what: str, place: Path) -> None:
    with pytest.raises(IcnnrtError) as caught:
        icnnrt.load(odd_values()[what])
    assert str(caught.value).isprintable()


def test_a_folder_that_may_not_be_read_is_told(place: Path) -> None:
    closed = place / "closed.icnn"
    closed.mkdir()
    closed.chmod(0)
    with pytest.raises(icnnrt.PackageError, match=r"cannot be read|has no manifest\.json"):  # root may read anything
        Package.open(closed)
    closed.chmod(0o700)


def test_a_name_that_leaves_no_room_for_the_folders_aside_is_refused(place: Path) -> None:
    with pytest.raises(icnnrt.InputError, match="expected a name of at most 224 bytes"):
        attacks.good(place / ("x" * 225))
    attacks.good(place / ("x" * 224))
    attacks.good(place / ("x" * 224), overwrite=True)


def test_a_sample_that_is_not_there_ends_a_loop_and_is_an_input_error(at: dict[str, Any]) -> None:
    assert len(list(at["argmin"])) == 2
    for answer in (at["argmin"], at["solved"]):
        with pytest.raises(icnnrt.SampleError, match="sample 2 of 2 samples"):
            answer[2]
    assert issubclass(icnnrt.SampleError, icnnrt.InputError)
    assert issubclass(icnnrt.SampleError, IndexError)
