"""A wrong argument ends in one sentence: which argument, what was expected, what came, and what to do.

The public functions of icnnrt_models and icnnrt_exporters, with each of their arguments wrong in turn; and the
sentences of `icnnrt.arguments`. What icnnrt itself makes of any argument at all is told by test_any_argument, whose
calls it names the argument in.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_any_argument import at, calls, place  # noqa: E402, F401

import icnnrt_exporters  # noqa: E402
from icnnrt import arguments  # noqa: E402
from icnnrt.errors import IcnnrtError, InputError  # noqa: E402
from icnnrt_exporters import checkpoint  # noqa: E402
from icnnrt_models import (  # noqa: E402
    CELU,
    FICNN,
    PICNN,
    BundleEntropyArgmin,
    LeakyReLU,
    NonNegativeLinear,
    PolyhedronArgmin,
    QPLayer,
)

Call = tuple[Callable[..., Any], dict[str, Any], dict[str, tuple[Any, ...]]]
B, X, N = 2, 3, 4
FIXTURES = Path(__file__).parent / "fixtures" / "version1"
x, y = torch.zeros(B, X), torch.full((B, N), 0.5)

NO_INTEGER: tuple[Any, ...] = (None, "3", 1.5, -1, True, [3], object())
NO_NUMBER: tuple[Any, ...] = ("1", float("nan"), 1j, [1.0], object())
NO_FLAG: tuple[Any, ...] = (None, 1, "yes", object())
NO_TEXT: tuple[Any, ...] = (None, 3, "something else", b"relu", ["relu"], object())
NO_TENSOR: tuple[Any, ...] = ("text", [1.0], np.zeros(3), object())


def no_rows(*shape: int) -> tuple[Any, ...]:
    """What is no float32 tensor of this shape, without or with a batch axis."""
    wrong = torch.zeros(*(size + 1 for size in shape))
    return (*NO_TENSOR, wrong, wrong[None], torch.zeros(1, 1, 1, 1), torch.zeros(*shape, dtype=torch.int32))


def network(kind: type) -> Any:
    return kind(X, N, (5,), generator=torch.Generator().manual_seed(0))


PLACE = {"dtype": ("float32", torch.int32, 3), "device": ("nowhere", 1.5, object()), "generator": (3, "seed", object())}
SIZES = {
    "y_dim": (*NO_INTEGER, 0),
    "hidden": (None, 5, "ab", (0,), (1.5,), ("a",), object()),
    "activation": (*NO_TEXT, torch.nn.ReLU()),
    "positivity": NO_TEXT,
}
ROWS = {"G": torch.ones(2, N), "h": torch.ones(2), "A": torch.ones(1, N), "b": torch.ones(1)}
BOUNDS = {"lower": -1.0, "upper": torch.ones(N)}
WRONG_ROWS = {"G": no_rows(2, N), "h": no_rows(2), "A": no_rows(1, N), "b": no_rows(1)}
WRONG_BOUNDS = {"lower": (*no_rows(N), True), "upper": no_rows(N)}


def of_models() -> Iterator[tuple[str, Call]]:
    yield "FICNN", (FICNN, {"x_dim": X, "y_dim": N}, {"x_dim": NO_INTEGER, **SIZES, **PLACE})
    flags = dict.fromkeys(("batch_norm", "linear_context_output"), NO_FLAG)
    free = {"context_activation": NO_TEXT, "context_hidden": (5, (0,), (1, 2, 3), "ab"), **flags}
    yield "PICNN", (PICNN, {"x_dim": X, "y_dim": N}, {"x_dim": (*NO_INTEGER, 0), **SIZES, **PLACE, **free})
    sizes = dict.fromkeys(("in_features", "out_features"), (*NO_INTEGER, 0))
    yield (
        "NonNegativeLinear",
        (NonNegativeLinear, {"in_features": 2, "out_features": 2}, {**sizes, "positivity": NO_TEXT}),
    )
    yield "LeakyReLU", (LeakyReLU, {}, {"slope": (*NO_NUMBER, None, 1.0, -0.1)})
    yield "CELU", (CELU, {}, {"alpha": (*NO_NUMBER, None, 0.0)})
    for kind in (FICNN, PICNN):
        energy = network(kind)
        inputs = {"x": (None, *NO_TENSOR, x[0], y, x.double()), "y": (None, *NO_TENSOR, y[0], x, y.double())}
        yield kind.__name__ + ".forward", (energy, {"x": x, "y": y}, inputs)
        given = {"context": energy.context(x), "y": y}
        yield kind.__name__ + ".value", (energy.value, given, {"context": (None, (), 3, "text"), "y": inputs["y"]})
    unsafe = {"on_unsafe": NO_TEXT}
    given = {"steps": (*NO_INTEGER, 0), "seconds": (*NO_NUMBER, 0.0, -1.0), "tolerance": (*NO_NUMBER, 0.0, 1e-300)}
    numbers = {name: tuple(value for value in values if value is not None) for name, values in given.items()}
    yield "QPLayer", (QPLayer, {}, {"multipliers": NO_FLAG, **numbers, **unsafe})
    data = {"Q": torch.eye(N), "p": torch.zeros(B, N), **ROWS, "h_lower": torch.zeros(2), **BOUNDS}
    wrong = {
        "Q": (None, *NO_TENSOR, torch.eye(N).int(), torch.ones(N), torch.eye(N).double()),
        "p": (None, *no_rows(N), torch.zeros(3, N).half()),
    }
    more = {**wrong, **WRONG_ROWS, **WRONG_BOUNDS, "h_lower": no_rows(2), "b": (None, *no_rows(1))}
    yield "QPLayer.forward", (QPLayer(), data, more)
    yield (
        "PolyhedronArgmin",
        (
            PolyhedronArgmin,
            {"energy": network(PICNN)},
            {
                **{"energy": (None, 3, "text", FICNN), "iterations": (*NO_INTEGER, 0), "mu": (*NO_NUMBER, None, -1.0)},
                **{"adjoint": NO_TEXT, "tolerance": (*NO_NUMBER, -1.0), "y_dim": ("3", 0, 1.5), **unsafe},
            },
        ),
    )
    layer = PolyhedronArgmin(network(PICNN), 2)
    start = (*NO_TENSOR, y[0], x, torch.nan * y)
    wrong = {**WRONG_ROWS, **WRONG_BOUNDS, "y_init": start, "x": (None, *NO_TENSOR, torch.zeros(()))}
    for call, name in ((layer, "PolyhedronArgmin.forward"), (layer.solve, "PolyhedronArgmin.solve")):
        yield name, (call, {"x": x, **ROWS, **BOUNDS, "y_init": y}, wrong)


def of_exporters() -> Iterator[tuple[str, Call]]:
    energy = network(PICNN)
    examples = {
        "x_example": (None, *NO_TENSOR, x[:0], x.int(), torch.nan * x),
        "y_example": (None, *NO_TENSOR, y[0], y[:0], y.int(), torch.nan * y),
    }
    given = {"energy": energy, "solver": BundleEntropyArgmin(energy, 2), "x_example": x, "y_example": y}
    given["path"] = "never/written"
    solver = {"solver": ("text", 3, FICNN, object())}
    wrong = {
        **{
            **examples,
            **solver,
            "kind": (None, "x", 3),
            "heads": (3, "hvp", ["nope"], [3]),
            "path": (None, 3, "no/folder/x"),
        },
        **{"polyhedron": ({"mu": -1.0}, {"nope": 1}, {"adjoint": 3}, {"iterations": 1.5})},
    }
    yield "export", (icnnrt_exporters.export, {**given, "heads": ()}, wrong)
    for name in ("export_torchscript", "export_program"):
        yield (
            name,
            (
                getattr(icnnrt_exporters, name),
                given,
                {**examples, "solver": (*solver["solver"], None), "path": (None, 3)},
            ),
        )
    wrong = {
        **{"loss": ("nope", 3, None), "optimizer": ("nope", 3, None), "clip_norm": ("1", 0.0, -1, True, np.nan)},
        **{"adjoint": ("implicit", None, 3)},
    }
    yield "TrainSpec", (icnnrt_exporters.TrainSpec, {}, wrong)
    yield "SGD", (icnnrt_exporters.SGD, {}, dict.fromkeys(("momentum", "weight_decay"), (*NO_NUMBER, -1.0, None)))
    betas = {"betas": ((1.0, 0.9), (0.9, -1.0), ("1", 0.9), None, 3)}
    yield "Adam", (icnnrt_exporters.Adam, {}, {**betas, "eps": ("1", -1.0, None), "weight_decay": ("1", -1.0, None)})
    source = {"source": FIXTURES / "unit_box.icnn", "target": "never/written/x.onnx"}
    yield "pack", (icnnrt_exporters.pack, source, {"target": (None, 3, b"x")})
    yield "siblings", (icnnrt_exporters.siblings, source, {"target": (None, 3)})
    yield "make", (checkpoint.make, {}, {"factory": (None, "", "a", "a:", "no_such_module:x", "json:nothing")})


# NAME: expected WHAT WAS, but got WHAT CAME; REMEDY.
GRAMMAR = re.compile(r"^(?P<name>[^:;]+): .*\bexpected .+, but got .+; .+\.$")
# The errors of an export say the same without "but", and some of them only what is wrong and the remedy.
OF_EXPORT = re.compile(r"^(?P<name>[^:;]+): .+; .+$")


def told(error: IcnnrtError, argument: str, grammar: re.Pattern[str]) -> bool:
    match = grammar.match(str(error))
    return match is not None and argument in match["name"]


def mistakes(calls: Mapping[str, Call], grammar: re.Pattern[str]) -> list[str]:
    found = []
    for name, (function, given, wrong) in calls.items():
        for argument, values in wrong.items():
            for value in values:
                what = f"{name}({argument}={value!r:.40})"
                try:
                    function(**{**given, argument: value})
                except IcnnrtError as error:
                    if not told(error, argument, grammar):
                        found.append(f"{what}: {error}")
                except Exception as error:
                    found.append(f"{what}: {type(error).__name__}: {str(error)[:100]}")
                else:
                    found.append(f"{what} was taken")
    return found


def test_models_tell_in_one_grammar_what_is_wrong() -> None:
    assert not (found := mistakes(dict(of_models()), GRAMMAR)), "\n".join(found)


def test_exporters_tell_what_is_wrong() -> None:
    assert not (found := mistakes(dict(of_exporters()), OF_EXPORT)), "\n".join(found)


def test_what_is_right_is_taken() -> None:
    for name, (function, given, _) in dict(of_models()).items():
        assert function(**given) is not None, name


# Sentences of a manifest, and of a file; those of the exchange of weights do not know which of two arguments it is.
OTHERWISE = {"write", "Convexity.from_json", "Manifest.from_json", "get_weights", "set_weights"}


def test_the_runtime_names_what_is_wrong(at: dict[str, Any], place: Path) -> None:  # noqa: F811
    found = []
    for name, make in calls(at, place).items():
        function, given = make()
        for argument in given if name not in OTHERWISE else ():
            for value in (object(), "text"):
                try:
                    function(**{**given, argument: value})
                except InputError as error:
                    if not re.match(
                        rf"^[^:]*\b({'|'.join(given)}|sample|history|path|text)\b[^:]*: .*expected .+, but .+\.$",
                        str(error),
                    ):
                        found.append(f"{name}({argument}={value!r:.20}): {error}")
                except IcnnrtError:
                    pass  # of a file
    assert not found, "\n".join(found)


CHECKS: dict[str, Callable[[], Any]] = {
    "integer": lambda: arguments.integer("3", "k", 1),
    "number": lambda: arguments.number(2.0, "k", least=0.0, below=1.0),
    "flag": lambda: arguments.flag("yes", "k"),
    "choice": lambda: arguments.choice("c", "k", ("a", "b")),
    "one choice, or something else": lambda: arguments.choice(3, "k", ("a",), also="a module"),
    "instance": lambda: arguments.instance(3, "k", Path, "a path"),
    "path": lambda: arguments.path(b"a", "k"),
    "names, of a text": lambda: arguments.names("ab", "k", "names of weights"),
    "names, of numbers": lambda: arguments.names([1], "k", "names of weights"),
    "names, of an array without axes": lambda: arguments.names(np.array(1), "k", "names of weights"),
    "batch": lambda: arguments.batch(np.zeros(3), "k", "float64", (3,)),
    "reals": lambda: arguments.reals(["a"], "k", "float64"),
    "converted": lambda: arguments.converted([1, [2, 3]], "k"),
    "writeable": lambda: arguments.writeable([0.0], "k", "float64", (1,), ()),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_tells_in_one_grammar_what_is_wrong(check: str) -> None:
    with pytest.raises(InputError) as caught:
        CHECKS[check]()
    assert told(caught.value, "k", GRAMMAR), str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_a_check_takes_it_gives_back() -> None:
    assert arguments.choice("a", "k", ("a", "b")) == "a"
    assert arguments.names(["a", "b"], "k", "names") == ("a", "b")
    assert arguments.instance(B, "k", int, "an integer") == B
    assert arguments.number(0.5, "k", least=0.0, below=1.0) == 0.5


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (3, "3"), ("a", '"a"'), (np.zeros((2, 3)), "shape [2, 3]"), ([1], "list"), (object(), "object")],
)
def test_what_came_is_shown_in_few_words(value: object, text: str) -> None:
    assert arguments.shown(value) == text
