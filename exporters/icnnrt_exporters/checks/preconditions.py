"""What must hold before an export begins: told at once, in one sentence, and not after the tracing."""

import copy
import functools
from collections.abc import Collection, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from icnnrt import arguments
from icnnrt.arguments import shown
from icnnrt.errors import ExportError
from icnnrt.format.manifest import MAX_ITERATIONS
from icnnrt.format.signatures import BOUNDS, BOUNDS_BAR, NAMES, POLYHEDRON_NAMES, POLYHEDRON_ROLES, QP_NAMES, THETA_BAR
from icnnrt_exporters.assembly.train_spec import TrainSpec
from icnnrt_exporters.checks.by_torch import value_and_slope
from icnnrt_exporters.tracing.place import first_line
from icnnrt_models import BregmanProximalGradient, BundleEntropyArgmin, PolyhedronArgmin

Solver = BundleEntropyArgmin | BregmanProximalGradient
MAX_NUMBER: Final = 1e300  # of a setting
# What `export` reads of a solver, of whatever class.
SOLVER: Final = ("energy", "y_dim", "iterations", "steps", "gap_tolerance", "residual_tolerance")

# Names of the graphs' inputs and outputs, which no weight may bear; those of quadratic programs only in such a package.
RESERVED = frozenset(
    name
    for named in (*(s for role, s in NAMES.items() if role not in POLYHEDRON_ROLES), (BOUNDS, BOUNDS_BAR))
    for names in named
    for name in names
)
RESERVED_QP = frozenset(name for named in QP_NAMES.values() for names in named for name in names)
STORABLE = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
HEADS = ("hvp", "hessian", "gradient_x", "pullback", "polyhedron")  # that are there if they are asked for
# Largest |f(batch) − f(sample alone)| in float64, relative: sums in another order stay far below it. Through quadratic
# programs by the solver's accuracy too.
SAMPLES_APART: Final = {"energy": 1e-9, "answer": 1e-6}

_refused = functools.partial(arguments.refused, kind=ExportError)


def check_examples(x_example: Tensor, y_example: Tensor) -> None:
    """Both are finite batches of one floating dtype, y of shape [B, n]."""
    for argument, example in (("x_example", x_example), ("y_example", y_example)):
        if not isinstance(example, Tensor) or example.dtype not in (torch.float32, torch.float64):
            came = example.dtype if isinstance(example, Tensor) else type(example).__name__
            raise _refused(argument, "a float32 or float64 tensor", came, "convert it")
        if example.dim() < (1 if argument == "x_example" else 2) or example.shape[0] == 0:
            remedy = f"pass {argument}[None] for a single sample"
            raise _refused(argument, "at least one sample with a leading batch dimension", shown(example), remedy)
        if not torch.isfinite(example).all():
            raise _refused(argument, "finite numbers", "NaN or infinity", "clean it")
    if x_example.dtype != y_example.dtype:
        both = f"{y_example.dtype} beside x_example's {x_example.dtype}"
        remedy = "convert both to the dtype of the model"
        raise _refused("y_example", "one dtype for x, y and the weights", both, remedy)
    if y_example.dim() != 2:
        raise _refused("y_example", "shape [B, n]", shown(y_example), "flatten y in the forward")


def check_solver(solver: Solver, n: int) -> None:
    """The solver is one, and its n is the examples'."""
    if not isinstance(solver, nn.Module):
        raise _refused("solver", "a layer", shown(solver), "pass BundleEntropyArgmin(energy)")
    missing = [name for name in SOLVER if not hasattr(solver, name)]
    if missing:
        raise ExportError(
            f"solver: {type(solver).__name__} is none that can be exported, it has no {missing[0]}; pass "
            "BundleEntropyArgmin(energy), or what has its attributes"
        )
    _check_y_dim(solver, n)


def _check_y_dim(solver: Solver | PolyhedronArgmin, n: int) -> None:
    if solver.y_dim != n:
        raise ExportError(
            f"solver: it was made for y_dim={solver.y_dim}, but y_example has {n} columns; make one fit the other"
        )


def check_adjoint(train: TrainSpec | None, solver: object, kind: str) -> None:
    """A training step has "prop3" for the bundle method alone."""
    if train is None or train.adjoint == "exact":
        return
    if kind == "qp":
        raise ExportError(f"adjoint: a quadratic program has one adjoint, got {train.adjoint!r}; leave it 'exact'")
    if isinstance(solver, BregmanProximalGradient):
        raise ExportError("adjoint: 'prop3' belongs to the bundle method, not to the Bregman step; leave it 'exact'")


def check_weights(energy: nn.Module, dtype: torch.dtype, heads: Collection[str] = (), kind: str = "energy") -> None:
    """Names, dtypes and sizes of the state_dict are such that graphs and files can hold them."""
    for name, parameter in energy.named_parameters():
        if parameter.dtype != dtype:
            raise ExportError(
                f"energy: {name} is {parameter.dtype}, but x_example {dtype}; convert the model with .float() or "
                ".double(), or the examples"
            )
    reserved = RESERVED.union(POLYHEDRON_NAMES if "polyhedron" in heads else (), RESERVED_QP if kind == "qp" else ())
    for name, tensor in energy.state_dict().items():
        if name in reserved or name.startswith(THETA_BAR):
            raise ExportError(
                f"energy: a weight is called {name!r}, as an input or output of the graphs is; rename it in the module"
            )
        if not name.isprintable() or any(mark in name for mark in "\"'\\/"):
            raise ExportError(f"energy: the weight name {name!r} holds a quote or a slash; rename it in the module")
        if tensor.dtype not in STORABLE:
            raise ExportError(f"energy: {name} is {tensor.dtype}, which a package cannot hold; convert or remove it")
        if tensor.numel() == 0:
            raise ExportError(f"energy: {name} is empty, of shape {tuple(tensor.shape)}; remove it from the module")


def check_heads(heads: object, kind: str, solver: object, train: object) -> None:
    """Heads that there are, of a kind that there is, and a solver where something asks for one."""
    arguments.choice(kind, "kind", ("energy", "gradient", "qp"), "leave it out for an energy", kind=ExportError)
    if isinstance(heads, str) or not isinstance(heads, Collection):
        listed, remedy = f"a list of {', '.join(HEADS)}", f"write [{heads!r}] for one"
        raise _refused("heads", listed, repr(heads), remedy)
    for head in heads:
        arguments.choice(head, "heads", HEADS, "value and gradient are always there", kind=ExportError)
    if kind == "gradient":
        if solver is not None:
            raise ExportError("solver: a gradient alone has no value to minimise; pass solver=None, or the energy")
        for head in ("gradient_x", "pullback"):
            if head in heads:
                raise ExportError(f"heads: a gradient alone has no value to differentiate by x; leave {head!r} out")
        if "polyhedron" in heads:
            raise ExportError("heads: a gradient alone has no value to minimise; leave 'polyhedron' out")
    if kind == "qp":
        if solver is not None:
            raise ExportError("solver: a network of quadratic programs needs none; pass solver=None")
        if heads:
            raise ExportError("heads: a network of quadratic programs has no energy to take them of; leave them out")
        return
    if train is not None and solver is None:
        raise ExportError("train: a training graph needs the argmin, got solver=None; pass a solver")


def of_layer(solver: PolyhedronArgmin, energy: nn.Module, y_example: torch.Tensor) -> dict[str, float | str]:
    """What the head polyhedron takes over from the layer."""
    if solver.energy is not energy:
        raise ExportError(
            f"solver: {type(solver).__name__} was made around another energy than the one to export; pass solver.energy"
        )
    if y_example.ndim == 2:
        _check_y_dim(solver, y_example.shape[1])
    if solver.adjoint == "exact":
        raise ExportError("adjoint: there is no graph for 'exact'; make the layer with 'auto', 'prop3' or 'implicit'")
    settings: dict[str, float | str] = {"iterations": solver.iterations, "mu": solver.mu}
    if solver.tolerance is not None:
        settings["tolerance"] = solver.tolerance
    if solver.adjoint != "auto":
        settings["adjoint"] = solver.adjoint
    return settings


def check_polyhedron(settings: Mapping[str, float | str] | None, heads: Collection[str]) -> None:
    """Settings of the head polyhedron that there are, within their bounds."""
    if settings is None:
        return
    if "polyhedron" not in heads:
        raise ExportError("polyhedron: the settings belong to a head that was not asked for; add it to heads")
    for name, number in settings.items():
        arguments.choice(
            name, "polyhedron", ("iterations", "mu", "tolerance", "adjoint"), "leave it out", kind=ExportError
        )
        place = f"polyhedron[{name!r}]"
        if name == "adjoint":
            arguments.choice(number, place, ("prop3", "implicit"), kind=ExportError)
        elif name == "iterations":
            arguments.integer(number, place, 1, MAX_ITERATIONS, kind=ExportError)
        else:
            arguments.number(number, place, least=0.0, below=MAX_NUMBER, kind=ExportError)


def float64_judge(energy: nn.Module, kind: str = "energy") -> nn.Module:
    """A float64 copy of the energy in eval mode; energies of shape [B, 1] become [B]."""
    judge = copy.deepcopy(energy).double().eval()
    if kind == "energy":
        # A hook, as a module around it would change the names of its weights.
        judge.register_forward_hook(_squeeze)
    return judge


def _squeeze(module: nn.Module, arguments: tuple[Tensor, ...], f: Tensor) -> Tensor:
    return f.squeeze(1) if isinstance(f, Tensor) and f.dim() == 2 and f.shape[1] == 1 else f


def check_energy(energy: nn.Module, judge: nn.Module, x: Tensor, y: Tensor, *, kind: str = "energy") -> None:
    """The energy and its float64 copy run on any batch, and each sample's energy and slope are its own.

    x, y: a batch of several different samples in the energy's dtype. The package answers for every sample alone,
    whatever batch it comes in; an energy that mixes samples would make that untrue, and no comparison batch by batch
    would show it.
    """
    look = value_and_slope if kind == "energy" else _gradient_alone
    for rows in (len(x), 1):
        try:
            look(energy, x[:rows], y[:rows])
        except Exception as error:
            raise ExportError(
                f"energy: its forward must work for a batch of any size, but fails on {rows} samples made from "
                f"x_example and y_example ({first_line(error)})"
            ) from error
    X, Y = x.double(), y.double()
    try:
        together = look(judge, X, Y)
        alone = [look(judge, X[i : i + 1], Y[i : i + 1]) for i in range(len(X))]
    except Exception as error:
        raise ExportError(
            "energy: it must work in float64 too, for the check that ends an export, but fails there "
            f"({first_line(error)}); register plain tensor attributes with register_buffer"
        ) from error
    if together[0].shape != ((len(x),) if kind == "energy" else y.shape):
        return  # trace_energy tells of a wrong output shape
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        _check_apart("energy", whole, torch.cat([part.reshape(-1, *whole.shape[1:]) for part in parts]))


def check_network(judge: nn.Module, x: Tensor) -> None:
    """The same of a network z(x), of which `judge` is the float64 copy; answers that are not finite aside."""
    X = x.double()
    try:
        with torch.no_grad():
            together = judge(X)
            if not isinstance(together, Tensor):
                return  # QPNetwork tells of a wrong output
            alone = torch.cat([judge(X[i : i + 1]) for i in range(len(X))])
    except Exception as error:
        raise ExportError(
            f"module: its forward must work for a batch of any size, and in float64 too, but fails on samples like "
            f"x_example ({first_line(error)}); register plain tensor attributes with register_buffer, and leave "
            "on_unsafe='raise' out"
        ) from error
    if together.shape == alone.shape:
        both = torch.isfinite(together) & torch.isfinite(alone)
        _check_apart("answer", *(torch.where(both, t, 0.0) for t in (together, alone)))


def _check_apart(what: str, together: Tensor, alone: Tensor) -> None:
    apart = float((together - alone).abs().max())
    if not apart <= SAMPLES_APART[what] * max(1.0, float(together.abs().max())):
        raise ExportError(
            f"{'energy' if what == 'energy' else 'module'}: the {what} of a sample depends on the others of its batch "
            f"(by {apart:.1e}); make the forward treat every row of what it is given on its own, without statistics "
            "over the batch"
        )


def _gradient_alone(judge: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor]:
    return (judge(x, y).detach(),)
