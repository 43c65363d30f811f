"""What the graphs of a package take and give: name, dtype and shape of every input and output.

`expected` says what icnnrt feeds and reads, by the role of a graph; `declared` reads what an ONNX file says of itself;
the manifest lists, for those who have neither, what is true of both. An input with a default is a run-time setting: an
overridable initialiser of the graph, so it may be left out, and then the graph does what it was exported to do.

Shapes are of whole batches. A size that is a name is open: `batch` is the number of samples, `B_<name>` that or 1.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from icnnrt.format.onnx_graph import ValueInfo, read_interface

if TYPE_CHECKING:
    from icnnrt.format.manifest import Manifest, TrainingSpec

BATCH: Final = "batch"
Shape: TypeAlias = tuple[int | str, ...]

TRAIN_ROLE: Final = "train"
# kind of energy -> the graph that a package of that kind must have
ENERGY_ROLES: Final = {"energy": "value", "gradient": "gradient", "qp": "solve"}
# These come together, and with a solver, or not at all.
SOLVER_ROLES: Final = ("argmin", "adjoint")
# And these, of a network of quadratic programs.
QP_ROLES: Final = ("solve", "solve_adjoint")
# And these, the argmin over a polyhedron.
POLYHEDRON_ROLES: Final = ("argmin_polyhedron", "adjoint_polyhedron")

# role -> names of inputs and outputs; adjoint.onnx and pullback.onnx also give theta_bar.<trainable weight>.
NAMES: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "value": (("x", "y"), ("f", "gradient")),
    "gradient": (("x", "y"), ("gradient",)),
    "hvp": (("x", "y", "y_dot"), ("hvp",)),
    "hessian": (("x", "y"), ("f", "gradient", "hessian")),
    "gradient_x": (("x", "y"), ("gradient_x",)),
    "pullback": (("x", "y", "f_bar", "gradient_bar"), ("y_bar", "x_bar")),
    "argmin": (
        ("x", "y_init"),
        (
            *("y", "lam", "slopes", "offsets", "cut_points", "lam_history"),
            *("energy", "lower_bound", "gap", "residual", "complementarity_history"),
        ),
    ),
    "adjoint": (
        ("x", "y", "slopes", "offsets", "cut_points", "lam_history", "y_bar", "depth"),
        ("x_bar", "slope_mismatch"),
    ),
    "argmin_polyhedron": (
        ("x", "y_init", "G", "h", "A", "b", "lower", "upper", "iterations", "mu", "tolerance"),
        (
            *("y", "energy", "lower_bound", "gap", "residual", "status", "cuts", "lam", "nu", "bounds"),
            *("best", "slopes", "offsets", "cut_points", "cut_lam", "ray"),
        ),
    ),
    # Of adjoint "prop3"; "implicit" takes no part of the trajectory.
    "adjoint_polyhedron": (
        (
            *("x", "y", "status", "G", "h", "A", "b", "lower", "upper", "mu", "y_bar"),
            *("y_init", "best", "slopes", "offsets", "cut_points"),
        ),
        ("G_bar", "h_bar", "A_bar", "b_bar", "lower_bar", "upper_bar", "mu_bar", "x_bar", "safe"),
    ),
}
# Outputs that graphs of earlier versions do not have; what reads them knows what to do without.
OPTIONAL_OUTPUTS: Final = {"argmin_polyhedron": ("ray",), TRAIN_ROLE: ("lam",)}
TRAJECTORY_NAMES: Final = ("y_init", "best", "slopes", "offsets", "cut_points")
# Names that the graphs of a polyhedron take or give.
POLYHEDRON_NAMES: Final = tuple(
    dict.fromkeys(name for role in POLYHEDRON_ROLES for names in NAMES[role] for name in names)
)
# The same of kind "qp"; solve_adjoint.onnx also gives theta_bar.<trainable weight>.
QP_NAMES: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "solve": (("x", "tolerance", "steps"), ("z", "status", "residual")),
    "solve_adjoint": (("x", "z_bar", "tolerance", "steps"), ("x_bar",)),
}
# Inputs that graphs of earlier versions do not have.
OPTIONAL_INPUTS: Final = dict.fromkeys(QP_ROLES, ("tolerance", "steps"))
# What argmin and adjoint take and give besides, where bounds of y are given at run time.
BOUNDS: Final = ("lower", "upper")
BOUNDS_BAR: Final = ("lower_bar", "upper_bar")
THETA_BAR: Final = "theta_bar."
# What train.onnx gives; of the argmin inside it, what tells whether a sample has a gradient. new.<name> stands for the
# next value of a weight or state tensor.
STEP_ANSWER: Final = (
    *("y", "lam", "slopes", "offsets", "cut_points", "energy", "lower_bound", "gap", "residual"),
    "complementarity_history",
)
STEP_OUTPUTS: Final = ("loss", "gradient_norm", "accepted", "safe", *STEP_ANSWER)
QP_STEP_OUTPUTS: Final = ("loss", "gradient_norm", "accepted", "safe", "z", "residual", "status")
NEW: Final = "new."


class Tensor(NamedTuple):
    """One input or output: numpy's name of its dtype, the shape of a batch, and the default of a setting."""

    dtype: str
    shape: Shape
    default: bool | int | float | None = None


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one graph, by name, weights aside."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


# --- What icnnrt feeds and reads -----------------------------------------------------------------


def expected(manifest: "Manifest", role: str) -> Signature | None:
    """What icnnrt feeds and reads of the graph with this role; None of a role that it does not know. What a graph lacks
    because it is older is left out, where the manifest lists what the graph gives."""
    if role == TRAIN_ROLE:
        names = _names_of_training(manifest, manifest.train) if manifest.train else None
    else:
        names = _names(manifest, role)
    if names is None:
        return None
    inputs, outputs = names
    told = manifest.graphs[role].signature if role in manifest.graphs else None
    if told is not None:
        inputs = tuple(name for name in inputs if name in told.inputs or name not in OPTIONAL_INPUTS.get(role, ()))
        outputs = tuple(name for name in outputs if name in told.outputs or name not in OPTIONAL_OUTPUTS.get(role, ()))
    arrays = _arrays_of_polyhedron(manifest) if role in POLYHEDRON_ROLES else arrays_of(manifest)
    settings = _settings(manifest)
    return Signature(
        {name: Tensor(*arrays[name], settings.get((role, name))) for name in inputs},
        {name: Tensor(*arrays[name]) for name in outputs},
    )


def _settings(manifest: "Manifest") -> dict[tuple[str, str], int | float]:
    """(role, name) -> what the manifest says a setting is by default."""
    settings: dict[tuple[str, str], int | float] = {}
    for role, names in OPTIONAL_INPUTS.items():
        settings |= {(role, name): 0 for name in names}  # which leaves each program its own
    if manifest.solver:
        settings["adjoint", "depth"] = manifest.solver.iterations
    if manifest.polyhedron:
        for name in ("iterations", "mu", "tolerance"):
            settings["argmin_polyhedron", name] = getattr(manifest.polyhedron, name)
        settings["adjoint_polyhedron", "mu"] = manifest.polyhedron.mu
    return settings


def _names(manifest: "Manifest", role: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    found = (QP_NAMES if manifest.kind == "qp" else NAMES).get(role)
    if found is None:
        return None
    inputs, outputs = found
    if role == "hessian" and manifest.kind == "gradient":
        outputs = tuple(name for name in outputs if name != "f")
    if role == "adjoint_polyhedron" and manifest.polyhedron and manifest.polyhedron.adjoint == "implicit":
        inputs = tuple(name for name in inputs if name not in TRAJECTORY_NAMES)
    if role in SOLVER_ROLES and manifest.domain and manifest.domain.kind == "box":
        inputs = (*inputs, *BOUNDS)
        outputs = (*outputs, *BOUNDS_BAR) if role == "adjoint" else outputs
    if role in ("adjoint", "pullback", "solve_adjoint", "adjoint_polyhedron"):
        trainable = manifest.weights.trainable
        outputs = (*outputs, *(THETA_BAR + name for name in trainable))
    return inputs, outputs


def _names_of_training(manifest: "Manifest", train: "TrainingSpec") -> tuple[tuple[str, ...], tuple[str, ...]]:
    state = tuple(state_of(manifest, train))
    moved = tuple(NEW + name for name in (*state, *train.weights))
    bounds = BOUNDS if manifest.domain and manifest.domain.kind == "box" else ()
    step = QP_STEP_OUTPUTS if manifest.kind == "qp" else STEP_OUTPUTS
    return ("x", *bounds, "target", "learning_rate", *state), (*step, *moved)


def outputs_of(manifest: "Manifest", role: str) -> tuple[str, ...]:
    """Names of what icnnrt reads of a graph that it knows."""
    known = expected(manifest, role)
    assert known is not None, f"{role} is no role that icnnrt knows"
    return tuple(known.outputs)


def arrays_of(manifest: "Manifest") -> dict[str, tuple[str, Shape]]:
    """name -> dtype and shape of everything that graphs of such a package take and give. A name means the same in all
    of them but those of a polyhedron, where y and what belongs to it is float64."""
    T, D, x, (n,) = manifest.dtype, "float64", manifest.x_shape, manifest.y_shape
    K = manifest.solver.iterations if manifest.solver else 0
    arrays = _of_shapes(
        (T, (BATCH, *x), ("x", "gradient_x", "x_bar")),
        (T, (BATCH, n), ("y", "y_init", "y_dot", "y_bar", "gradient", "gradient_bar", "hvp", "z", "z_bar")),
        (T, (BATCH, n), (*BOUNDS, *BOUNDS_BAR)),
        (T, (BATCH, n, n), ("hessian",)),
        (T, (BATCH,), ("f", "f_bar", "slope_mismatch")),
        (T, (BATCH, K), ("lam", "offsets")),
        (T, (BATCH, K, n), ("slopes", "cut_points")),
        (T, (BATCH, K, K), ("lam_history",)),
        (D, (BATCH,), ("energy", "lower_bound", "gap")),
        (D, (BATCH, 3), ("residual",)),
        (D, (BATCH, K), ("complementarity_history",)),
        (D, (), ("tolerance",)),
        ("int64", (), ("depth", "steps")),
        ("int32", (BATCH,), ("status",)),
    )
    arrays |= _theta_bar(manifest)
    return arrays if manifest.train is None else arrays | _arrays_of_training(manifest, manifest.train)


def _arrays_of_polyhedron(manifest: "Manifest") -> dict[str, tuple[str, Shape]]:
    return _theta_bar(manifest) | arrays_of_polyhedron(manifest.dtype, manifest.x_shape, manifest.y_shape[0])


def arrays_of_polyhedron(T: str, x: Shape, n: int) -> dict[str, tuple[str, Shape]]:
    """name -> dtype and shape of what graphs over polyhedra take and give, weights aside; contexts [B, *x] of T."""
    D = "float64"
    return _of_shapes(
        (T, (BATCH, *x), ("x", "x_bar")),
        (D, (BATCH, "m", n), ("G_bar",)),
        (D, (BATCH, "m"), ("h_bar", "lam")),
        (D, (BATCH, "q", n), ("A_bar",)),
        (D, (BATCH, "q"), ("b_bar", "nu")),
        (D, (BATCH, n), (*BOUNDS_BAR, "bounds", "y", "y_init", "y_bar", "ray")),
        # Data that all samples share may come as one row.
        (D, ("B_G", "m", n), ("G",)),
        (D, ("B_h", "m"), ("h",)),
        (D, ("B_A", "q", n), ("A",)),
        (D, ("B_b", "q"), ("b",)),
        *((D, (f"B_{name}", n), (name,)) for name in BOUNDS),
        (D, (BATCH,), ("energy", "lower_bound", "gap", "mu_bar")),
        (D, (BATCH, 3), ("residual",)),
        (D, (BATCH, "slots", n), ("slopes", "cut_points")),
        (D, (BATCH, "slots"), ("offsets", "cut_lam")),
        (D, (), ("mu", "tolerance")),
        ("int64", (), ("iterations",)),
        ("int32", (BATCH,), ("status",)),
        ("int64", (BATCH,), ("cuts", "best")),
        ("bool", (BATCH,), ("safe",)),
    )


def _of_shapes(*groups: tuple[str, Shape, tuple[str, ...]]) -> dict[str, tuple[str, Shape]]:
    """name -> dtype and shape, from (dtype, shape, the names that have them)."""
    return {name: (dtype, shape) for dtype, shape, names in groups for name in names}


def _theta_bar(manifest: "Manifest") -> dict[str, tuple[str, Shape]]:
    tensors = manifest.weights.tensors
    return {THETA_BAR + name: (tensors[name].dtype, tensors[name].shape) for name in manifest.weights.trainable}


def _arrays_of_training(manifest: "Manifest", train: "TrainingSpec") -> dict[str, tuple[str, Shape]]:
    state, tensors = state_of(manifest, train), manifest.weights.tensors
    moving = state | {name: (tensors[name].dtype, tensors[name].shape) for name in train.weights}
    return {
        "target": (train.target_dtype, (BATCH, *train.target_shape)),
        "learning_rate": (manifest.dtype, ()),
        "loss": (manifest.dtype, ()),
        "gradient_norm": ("float64", ()),
        "accepted": ("bool", ()),
        "safe": ("bool", (BATCH,)),
        **state,
        **{NEW + name: array for name, array in moving.items()},
    }


def state_of(manifest: "Manifest", train: "TrainingSpec") -> dict[str, tuple[str, Shape]]:
    """name -> dtype and shape of the optimiser's state: the step count, and one vector for each slot."""
    entries = sum(math.prod(manifest.weights.tensors[name].shape) for name in train.weights)
    return {"state.step": ("int64", ()), **{f"state.{slot}": (manifest.dtype, (entries,)) for slot in train.slots}}


# --- What a file says of itself ------------------------------------------------------------------


def declared(data: bytes, file: str, weights: Collection[str]) -> Signature:
    """What the main graph of an ONNX file declares; a dtype that is not known here is "", a size left open a name.

    The batch, by whatever name, is what the first size of x, or else of the first input that has an open one, is
    called. Raises `PackageError` where the bytes are no well-formed model.
    """
    found = read_interface(data, file)
    given = [v for v in found.inputs if v.name not in weights]
    first = (v.shape[0] for v in sorted(given, key=lambda v: v.name != "x") if v.shape)
    batch = next((size for size in first if isinstance(size, str)), BATCH)

    def tensor(v: ValueInfo) -> Tensor:
        shape = tuple(
            BATCH if size == batch else f"{v.name}_{axis}" if size is None else size
            for axis, size in enumerate(v.shape or ())
        )
        return Tensor(v.dtype.name if v.dtype else "", shape, v.default)

    return Signature(
        MappingProxyType({v.name: tensor(v) for v in given}),
        MappingProxyType({v.name: tensor(v) for v in found.outputs}),
    )


def listed(manifest: "Manifest", role: str, data: bytes) -> Signature:
    """What the manifest lists of a graph: what the file declares, and where it leaves a size or a name open, what
    icnnrt expects of that role."""
    found = declared(data, f"{role}.onnx", manifest.weights.tensors)
    known = expected(manifest, role)
    if known is None:
        return found

    def clearer(of: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return MappingProxyType(
            {
                name: tensor._replace(shape=wanted[name].shape)
                if name in wanted and wanted[name].dtype == tensor.dtype and fits(tensor.shape, wanted[name].shape)
                else tensor
                for name, tensor in of.items()
            }
        )

    return replace(found, inputs=clearer(found.inputs, known.inputs), outputs=clearer(found.outputs, known.outputs))


def fits(came: Sequence[object], shape: Shape) -> bool:
    """Whether a declaration allows `shape`: a size that is no number is open, the batch's must be.

    [] may also stand for a value of unknown rank; what such an output turns out to be is checked at each run.
    """
    if not came:
        return True
    return len(came) == len(shape) and all(
        not isinstance(size, int) or size < 0 or size == wanted for size, wanted in zip(came, shape, strict=True)
    )


def shown(shape: Sequence[object]) -> str:
    """A shape for a sentence."""
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
