"""The ONNX Runtime sessions of one package, and the weights that all of them share.

Each weight is one OrtValue, injected into a session as it is made (so that nothing is read from the disk, and what
runs is what was checked) and bound to it by io-binding (so that an update in place is seen by every graph: without
the binding a session keeps a copy of its own).

Bindings are not thread-safe, so each graph keeps a pool of them and a run borrows one. The same lock makes runs and
updates of the weights exclude each other: a run never sees half an update.
"""

import hashlib
import math
import re
import secrets
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt import _native, _wire
from icnnrt.errors import IcnnrtError, InputError, MissingDependencyError, PackageError, ProviderError
from icnnrt.manifest import POLYHEDRON_ROLES, SOLVER_ROLES, TRAIN_ROLE, Manifest, TrainingSpec
from icnnrt.package import OP_DOMAIN, Package

Provider: TypeAlias = str | tuple[str, Mapping[str, Any]]

CPU: Final = "CPUExecutionProvider"
# The graphs of an icnnrt package are many small operators one after the other. Measured on two busy cores with a
# PICNN of 1836 inputs: a second thread gained nothing at batch 1 and doubled the time at 16 and 128 (it spins).
THREADS: Final = 1
# 3 = errors. The default, warnings, prints a line on stderr for every weight, because a session may override it.
LOG_SEVERITY: Final = 3

# role -> inputs and outputs that icnnrt feeds and reads; adjoint.onnx and pullback.onnx also give
# theta_bar.<trainable weight>.
SIGNATURES: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "value": (("x", "y"), ("f", "gradient")),
    "gradient": (("x", "y"), ("gradient",)),
    "hvp": (("x", "y", "y_dot"), ("hvp",)),
    "hessian": (("x", "y"), ("f", "gradient", "hessian")),
    "gradient_x": (("x", "y"), ("gradient_x",)),
    "pullback": (("x", "y", "f_bar", "gradient_bar"), ("y_bar", "x_bar")),
    "argmin": (
        ("x", "y_init"),
        (
            "y",
            "lam",
            "slopes",
            "offsets",
            "cut_points",
            "lam_history",
            "energy",
            "lower_bound",
            "gap",
            "residual",
            "complementarity_history",
        ),
    ),
    "adjoint": (
        ("x", "y", "slopes", "offsets", "cut_points", "lam_history", "y_bar", "depth"),
        ("x_bar", "slope_mismatch"),
    ),
    "argmin_polyhedron": (
        ("x", "y_init", "G", "h", "A", "b", "lower", "upper", "iterations", "mu", "tolerance"),
        (
            "y",
            "energy",
            "lower_bound",
            "gap",
            "residual",
            "status",
            "cuts",
            "lam",
            "nu",
            "bounds",
            "best",
            "slopes",
            "offsets",
            "cut_points",
            "cut_lam",
            "ray",
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
SINCE: Final = {"argmin_polyhedron": ("ray",), TRAIN_ROLE: ("lam",)}
OF_TRAJECTORY: Final = ("y_init", "best", "slopes", "offsets", "cut_points")
# Names that the graphs of a polyhedron take or give.
OF_POLYHEDRON: Final = tuple(
    dict.fromkeys(name for role in POLYHEDRON_ROLES for names in SIGNATURES[role] for name in names)
)
# The same of kind "qp"; solve_adjoint.onnx also gives theta_bar.<trainable weight>.
QP_SIGNATURES: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "solve": (("x",), ("z", "status", "residual")),
    "solve_adjoint": (("x", "z_bar"), ("x_bar",)),
}
# What argmin and adjoint take and give besides, where bounds of y are given at run time.
BOUNDS: Final = ("lower", "upper")
BOUNDS_BAR: Final = ("lower_bar", "upper_bar")
THETA_BAR: Final = "theta_bar."
# What train.onnx gives of the argmin inside it; new.<name> stands for the next value of a weight or state tensor.
OF_ONE_STEP: Final = (
    "loss",
    "gradient_norm",
    "accepted",
    "safe",
    "y",
    "lam",
    "slopes",
    "offsets",
    "cut_points",
    "energy",
    "lower_bound",
    "gap",
    "residual",
    "complementarity_history",
)
OF_ONE_QP_STEP: Final = ("loss", "gradient_norm", "accepted", "safe", "z", "residual", "status")
NEW: Final = "new."
BATCH: Final = "batch"  # in a shape: the number of samples
Shape: TypeAlias = tuple[int | str, ...]
# onnxruntime's names
DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def arrays_of(manifest: Manifest, role: str = "") -> dict[str, tuple[str, Shape]]:
    """name -> dtype and shape of everything that graphs of such a package take and give. A name means the same in all
    of them but those of a polyhedron, `role`, where y and what belongs to it is float64."""
    if role in POLYHEDRON_ROLES:
        return _arrays_of_polyhedron(manifest)
    T, D, x, (n,) = manifest.dtype, "float64", manifest.x_shape, manifest.y_shape
    K = manifest.solver.iterations if manifest.solver else 0
    arrays: dict[str, tuple[str, Shape]] = {
        "x": (T, (BATCH, *x)),
        "y": (T, (BATCH, n)),
        "y_init": (T, (BATCH, n)),
        "f": (T, (BATCH,)),
        "gradient": (T, (BATCH, n)),
        "y_dot": (T, (BATCH, n)),
        "f_bar": (T, (BATCH,)),
        "gradient_bar": (T, (BATCH, n)),
        "hvp": (T, (BATCH, n)),
        "hessian": (T, (BATCH, n, n)),
        "gradient_x": (T, (BATCH, *x)),
        **dict.fromkeys((*BOUNDS, *BOUNDS_BAR), (T, (BATCH, n))),
        "lam": (T, (BATCH, K)),
        "slopes": (T, (BATCH, K, n)),
        "offsets": (T, (BATCH, K)),
        "cut_points": (T, (BATCH, K, n)),
        "lam_history": (T, (BATCH, K, K)),
        "energy": (D, (BATCH,)),
        "lower_bound": (D, (BATCH,)),
        "gap": (D, (BATCH,)),
        "residual": (D, (BATCH, 3)),
        "complementarity_history": (D, (BATCH, K)),
        "y_bar": (T, (BATCH, n)),
        "depth": ("int64", ()),
        "x_bar": (T, (BATCH, *x)),
        "slope_mismatch": (T, (BATCH,)),
        "z": (T, (BATCH, n)),
        "z_bar": (T, (BATCH, n)),
        "status": ("int32", (BATCH,)),
    }
    for name, spec in manifest.weights.tensors.items():
        if spec.trainable:
            arrays[THETA_BAR + name] = (spec.dtype, spec.shape)
    if manifest.train is not None:
        arrays |= _arrays_of_training(manifest, manifest.train)
    return arrays


def _arrays_of_polyhedron(manifest: Manifest) -> dict[str, tuple[str, Shape]]:
    D, x, (n,) = "float64", manifest.x_shape, manifest.y_shape
    rows = {
        "G": ("m", n),
        "h": ("m",),
        "A": ("q", n),
        "b": ("q",),
        "lower": (n,),
        "upper": (n,),
        "y_init": (n,),
        "y": (n,),
        "y_bar": (n,),
        "lam": ("m",),
        "nu": ("q",),
        "bounds": (n,),
        "ray": (n,),
        "energy": (),
        "lower_bound": (),
        "gap": (),
        "residual": (3,),
        "slopes": ("slots", n),
        "offsets": ("slots",),
        "cut_points": ("slots", n),
        "cut_lam": ("slots",),
        "mu_bar": (),
    }
    rows |= {f"{name}_bar": rows[name] for name in ("G", "h", "A", "b", "lower", "upper")}
    arrays: dict[str, tuple[str, Shape]] = {name: (D, (BATCH, *shape)) for name, shape in rows.items()}
    arrays |= {
        "x": (manifest.dtype, (BATCH, *x)),
        "x_bar": (manifest.dtype, (BATCH, *x)),
        "iterations": ("int64", ()),
        "mu": (D, ()),
        "tolerance": (D, ()),
        "status": ("int32", (BATCH,)),
        "cuts": ("int64", (BATCH,)),
        "best": ("int64", (BATCH,)),
        "safe": ("bool", (BATCH,)),
    }
    for name, spec in manifest.weights.tensors.items():
        if spec.trainable:
            arrays[THETA_BAR + name] = (spec.dtype, spec.shape)
    return arrays


def _arrays_of_training(manifest: Manifest, train: TrainingSpec) -> dict[str, tuple[str, Shape]]:
    arrays: dict[str, tuple[str, Shape]] = {
        "target": (train.target_dtype, (BATCH, *train.target_shape)),
        "learning_rate": (manifest.dtype, ()),
        "loss": (manifest.dtype, ()),
        "gradient_norm": ("float64", ()),
        "accepted": ("bool", ()),
        "safe": ("bool", (BATCH,)),
        **state_of(manifest, train),
    }
    moving = {name: arrays[name] for name in state_of(manifest, train)}
    moving |= {
        name: (manifest.weights.tensors[name].dtype, manifest.weights.tensors[name].shape) for name in train.weights
    }
    return arrays | {NEW + name: array for name, array in moving.items()}


def state_of(manifest: Manifest, train: TrainingSpec) -> dict[str, tuple[str, Shape]]:
    """name -> dtype and shape of the optimiser's state: the step count, and one vector for each slot."""
    entries = sum(math.prod(manifest.weights.tensors[name].shape) for name in train.weights)
    return {"state.step": ("int64", ()), **{f"state.{slot}": (manifest.dtype, (entries,)) for slot in train.slots}}


def signature_of(manifest: Manifest, role: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and outputs of a graph of this package, weights aside."""
    if role == TRAIN_ROLE:
        assert manifest.train is not None
        state = tuple(state_of(manifest, manifest.train))
        moved = tuple(NEW + name for name in (*state, *manifest.train.weights))
        bounds = BOUNDS if manifest.domain and manifest.domain.kind == "box" else ()
        step = OF_ONE_QP_STEP if manifest.kind == "qp" else OF_ONE_STEP
        return ("x", *bounds, "target", "learning_rate", *state), (*step, *moved)
    inputs, outputs = (QP_SIGNATURES if manifest.kind == "qp" else SIGNATURES)[role]
    if role == "hessian" and manifest.kind == "gradient":
        outputs = tuple(name for name in outputs if name != "f")
    if role == "adjoint_polyhedron" and manifest.polyhedron and manifest.polyhedron.adjoint == "implicit":
        inputs = tuple(name for name in inputs if name not in OF_TRAJECTORY)
    if role in SOLVER_ROLES and manifest.domain and manifest.domain.kind == "box":
        inputs = (*inputs, *BOUNDS)
        outputs = (*outputs, *BOUNDS_BAR) if role == "adjoint" else outputs
    if role in ("adjoint", "pullback", "solve_adjoint", "adjoint_polyhedron"):
        trainable = (name for name, spec in manifest.weights.tensors.items() if spec.trainable)
        outputs = (*outputs, *(THETA_BAR + name for name in trainable))
    return inputs, outputs


def onnxruntime() -> ModuleType:
    """Import onnxruntime, or say how to install it."""
    remedy = "install one of pip install 'icnnrt[cpu]' or pip install 'icnnrt[gpu]', never both."
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(f"onnxruntime cannot be imported ({error}); {remedy}") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        # What is left when the CPU and the GPU package were both installed and one of them is removed.
        raise MissingDependencyError(
            "onnxruntime is installed in part only; pip uninstall onnxruntime onnxruntime-gpu, then " + remedy
        )
    return onnxruntime


def checked_threads(threads: object) -> int:
    """How many threads a session gets; `InputError` for what is no number of them."""
    if threads is None:
        return THREADS
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise InputError(f"threads: expected an integer of at least 1 or None, but got {threads!r}.")
    return threads


def session_options(ort: ModuleType, threads: int) -> Any:
    """What every session is made with."""
    options = ort.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options


def open_session(
    ort: ModuleType,
    data: bytes,
    options: Any,
    providers: Sequence[tuple[str, Mapping[str, Any]]],
    file: str,
    refused: Callable[[str], IcnnrtError],
) -> Any:
    """A session of the graph `data`, which `file` holds, on these providers and no others.

    Raises `ProviderError` where a provider is at fault, and `refused(why)` where the graph or onnxruntime is.
    """
    wanted = [(name, dict(settings)) for name, settings in providers]
    try:
        session = ort.InferenceSession(data, options, providers=wanted, enable_fallback=0)
    except Exception as error:
        if any(name != CPU for name, _ in wanted):
            raise ProviderError(
                f"providers: onnxruntime cannot run {file} on {[name for name, _ in wanted]} "
                f"({_first_line(error)}); check the drivers and options, or use {CPU}."
            ) from error
        raise refused(_first_line(error)) from error
    missing = [name for name, _ in wanted if name not in session.get_providers()]
    if missing:
        raise ProviderError(
            f"providers: {missing[0]} was asked for, but onnxruntime fell back to {session.get_providers()}; "
            "its libraries or its device are missing on this machine, so install them (onnxruntime prints which) "
            f"or use {CPU}."
        )
    return session


class _Graph:
    """One ONNX file as a session, with its idle bindings and the weights they bind."""

    def __init__(
        self,
        session: Any,
        outputs: Mapping[str, Shape],
        weights: Mapping[str, Any],
        frozen: frozenset[str],
        optional: frozenset[str],
        native: bool,
    ) -> None:
        self.session = session
        self.native = native  # its solver operators have no bodies, so that nothing but kernels can run them
        self.outputs = tuple(outputs)
        self._shapes = tuple(outputs.values())
        self._last: tuple[int, list[Shape]] = (-1, [])  # batch size, shapes of its outputs
        self.weights = weights  # overridable, so bound: an update reaches them
        self.frozen = frozen  # fixed at the export, so an update would not
        self.optional = optional  # inputs that have a default, which are bound in another way
        self.idle: list[tuple[Any, str]] = []  # binding, the weights_id it was made for

    def shapes(self, samples: int) -> list[Shape]:
        """What the outputs must look like for so many samples."""
        known, shapes = self._last
        if known != samples:
            shapes = [tuple(samples if size == BATCH else size for size in shape) for shape in self._shapes]
            self._last = samples, shapes
        return shapes


class Runner:
    """Runs the graphs of one package by role. Thread-safe.

    A session is made when its role is first run: adjoint.onnx costs nothing until a gradient is asked for.
    """

    def __init__(
        self, package: Package, providers: Sequence[Provider] | None, threads: int | None, native: bool | None
    ) -> None:
        self._ort = onnxruntime()
        self.package = package
        self._providers = _check_providers(self._ort, providers)
        self._kernels = _native_operators(self._ort, native)
        self._threads = checked_threads(threads)
        # Copies, as the package's arrays are read-only views of its file and updates are made in place.
        self.weights: dict[str, Any] = {
            name: self._ort.OrtValue.ortvalue_from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
            for name, array in package.weights.items()
        }
        hashes = [package.manifest.weights.sha256, *sorted(g.sha256 for g in package.manifest.graphs.values())]
        self.weights_id = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
        self._graphs: dict[str, _Graph] = {}
        self._making = threading.Lock()
        self._state = threading.Condition()
        self._running = 0
        self._updating = False
        self._closed = False

    @property
    def provider_names(self) -> tuple[str, ...]:
        """The execution providers in use, in order of preference; ONNX Runtime always puts the CPU last."""
        names = [name for name, _ in self._providers]
        return tuple(names if CPU in names else [*names, CPU])

    @property
    def native(self) -> bool:
        """Whether native kernels serve the operators of this package."""
        ops = self.package.manifest.ops.get(OP_DOMAIN)
        return ops is not None and not self._kernels.isdisjoint(ops.names)

    def ran_native(self, role: str) -> bool:
        """Whether native kernels served the runs of this graph; False if there were none."""
        graph = self._graphs.get(role)
        return graph is not None and graph.native

    def run(
        self,
        role: str,
        feeds: Mapping[str, NDArray[Any]],
        *,
        made_with: str | None = None,
        only: Sequence[str] | None = None,
    ) -> tuple[dict[str, NDArray[Any]], str]:
        """Run a graph; return its outputs by name and the id of the weights that were used.

        `made_with` is the id of the weights that the feeds come from; other weights are refused. With `only`, no more
        of the graph is run than these outputs need. Outputs of `SINCE` are missing where the graph does not have them.
        """
        graph = self._graph(role)
        later = SINCE.get(role, ())
        wanted = graph.outputs if only is None else tuple(n for n in only if n in graph.outputs or n not in later)
        binding, weights_id = self._borrow(graph, made_with)
        try:
            for name, array in feeds.items():
                array = np.asarray(array, order="C")
                if name in graph.optional:
                    # bind_cpu_input knows required inputs only.
                    binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
                else:
                    binding.bind_cpu_input(name, array)
            # Anew for every run: outputs that stay bound keep their shape, so the next batch would have to match.
            for name in wanted:
                binding.bind_output(name, "cpu")
            if only is None:
                graph.session.run_with_iobinding(binding)
            else:
                options = self._ort.RunOptions()
                options.only_execute_path_to_fetches = True
                graph.session.run_with_iobinding(binding, options)
            values = binding.copy_outputs_to_cpu()
            binding.clear_binding_outputs()
        except Exception as error:
            self._give_back(graph, None)
            remedy = (
                "run smaller batches"
                if isinstance(error, MemoryError) or re.search("alloc|memory", str(error), re.IGNORECASE)
                else "icnnrt verify says whether the package is sound on this machine"
            )
            raise IcnnrtError(
                f"{self.package.path}: {role}.onnx: onnxruntime failed on a batch of {len(feeds['x'])} "
                f"({_first_line(error)}); {remedy}."
            ) from error
        except BaseException:
            self._give_back(graph, None)
            raise
        self._give_back(graph, (binding, weights_id))
        # A graph may leave sizes open where it declares its outputs, so they are only known now.
        expected = graph.shapes(len(feeds["x"]))
        if only is not None:
            shapes = dict(zip(graph.outputs, expected, strict=True))
            expected = [shapes[name] for name in wanted]
        if [value.shape for value in values] != expected:
            for name, value, shape in zip(wanted, values, expected, strict=True):
                if value.shape != shape and not _is_of(value.shape, shape):
                    self._disagree(role, name, _shown(shape), _shown(value.shape))
        return dict(zip(wanted, values, strict=True)), weights_id

    def read_weights(self, name: str) -> NDArray[Any]:
        """A read-only copy of one weight as it is now."""
        with self._state:
            self.check_open()
            while self._updating:
                self._state.wait()
            array: NDArray[Any] = np.array(self.weights[name].numpy())
        array.flags.writeable = False
        return array

    def update_weights(self, new: Mapping[str, NDArray[Any]], *, made_with: str | None = None) -> str:
        """Write new values into the weights, once every run under way is done; later runs use them.

        `made_with` is the id of the weights that they follow from; others are not overwritten. Returns the new id.
        Raises `InputError` if one is unknown, differs in shape or dtype, or is a constant of some graph; then none
        has changed.
        """
        tensors = self.package.manifest.weights.tensors
        known = (*(QP_SIGNATURES if self.package.manifest.kind == "qp" else SIGNATURES), TRAIN_ROLE)
        graphs = [self._graph(role) for role in self.package.graphs if role in known]
        for name, array in new.items():
            spec = tensors.get(name)
            if spec is None:
                raise InputError(f"weights: the package has no weight {name!r}; its weights are {sorted(tensors)}.")
            if not isinstance(array, np.ndarray) or array.dtype != spec.dtype or array.shape != spec.shape:
                came = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise InputError(f"weights: expected {spec.dtype}{list(spec.shape)} for {name!r}, but got {came}.")
            if any(name in graph.frozen for graph in graphs):
                raise InputError(f"weights: {name!r} was exported as a constant; export it as an overridable weight.")
        with self._state:
            while self._updating:
                self._state.wait()
            self.check_open()
            self.check_weights(made_with)
            self._updating = True
            try:
                while self._running:
                    self._state.wait()
            except BaseException:  # Ctrl-C: nothing is written, and nobody must wait for it
                self._updating = False
                self._state.notify_all()
                raise
        try:
            for name, array in new.items():
                self.weights[name].update_inplace(np.ascontiguousarray(array).astype(tensors[name].dtype, copy=False))
        finally:
            with self._state:
                weights_id = self.weights_id = secrets.token_hex(8)
                self._updating = False
                self._state.notify_all()
        return weights_id  # not the attribute, which another update may have changed again

    def close(self) -> None:
        """Drop the sessions. Runs under way end well; later ones are refused."""
        with self._state:
            self._closed = True
            for graph in self._graphs.values():
                graph.idle.clear()
            self._graphs = {}

    def _borrow(self, graph: _Graph, made_with: str | None) -> tuple[Any, str]:
        with self._state:
            while self._updating:
                self._state.wait()
            weights_id = self.weights_id
            self.check_weights(made_with)
            self._running += 1
            binding, bound = graph.idle.pop() if graph.idle else (None, "")
        try:
            if binding is None:
                binding = graph.session.io_binding()
            if bound != weights_id:
                # On the CPU the binding sees an update by itself; other devices take their copy here.
                for name, value in graph.weights.items():
                    binding.bind_ortvalue_input(name, value)
        except BaseException:
            self._give_back(graph, None)
            raise
        return binding, weights_id

    def _give_back(self, graph: _Graph, binding: tuple[Any, str] | None) -> None:
        with self._state:
            if binding is not None and not self._closed:
                graph.idle.append(binding)
            self._running -= 1
            if self._updating:
                self._state.notify_all()

    def check_weights(self, made_with: str | None) -> None:
        """Refuse a solution that was computed with other weights than the present ones."""
        if made_with is not None and made_with != self.weights_id:
            raise InputError(
                "solution: expected one that argmin computed with the weights this session has now, but it comes from "
                "another package or from before an update of the weights; call argmin again."
            )

    def check_open(self) -> None:
        """Refuse further use after `close`."""
        if self._closed:
            raise IcnnrtError("the session is closed; call icnnrt.load again.")

    def _graph(self, role: str) -> _Graph:
        self.check_open()
        graph = self._graphs.get(role)
        if graph is None:
            # Making takes long, and runs of other graphs go on meanwhile, so only the dictionary is under `_state`.
            with self._making:
                graph = self._graphs.get(role)
                if graph is None:
                    graph = self._make(role)
                    with self._state:
                        if not self._closed:  # else it serves the call under way and nobody keeps it
                            self._graphs[role] = graph
        return graph

    def _make(self, role: str) -> _Graph:
        data = self.package.graphs[role]
        file = f"{role}.onnx"
        found = _wire.survey(data, file)
        names = [tensor.tensor for tensor in found.external]
        if not self.weights.keys() >= set(names) or len(set(names)) < len(names):
            raise PackageError(
                f"{file}: tensors kept in {self.package.manifest.weights.file} should bear the names of weights, each "
                "once; export the package again."
            )
        options = session_options(self._ort, self._threads)
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.add_external_initializers(names, [self.weights[name] for name in names])
        native = not self._kernels.isdisjoint(name for domain, name in found.operators if domain == OP_DOMAIN)
        if native:
            _native.register(options)
            # Kernels win over bodies, but which of them ran could not be told. Without the bodies a session that can
            # be made at all runs the kernels.
            data = _wire.without_functions(data, OP_DOMAIN, self._kernels, file)

        def refused(why: str) -> IcnnrtError:
            return PackageError(
                f"{self.package.path}: {file}: onnxruntime cannot load it ({why}); "
                f"upgrade onnxruntime, {'try native=False, ' if native else ''}or export the package again."
            )

        session = open_session(self._ort, data, options, self._providers, file, refused)
        overridable = {node.name for node in session.get_overridable_initializers()}
        outputs = self._check_signature(role, session, overridable)
        bound = {name: value for name, value in self.weights.items() if name in overridable}
        return _Graph(session, outputs, bound, frozenset(names) - overridable, frozenset(overridable), native)

    def _check_signature(self, role: str, session: Any, overridable: set[str]) -> dict[str, Shape]:
        """Return the outputs to read and their shapes, after checking that icnnrt can feed and read this graph."""
        manifest = self.package.manifest
        inputs, outputs = signature_of(manifest, role)
        required = {node.name: node for node in session.get_inputs()}
        taken = required | {node.name: node for node in session.get_overridable_initializers()}
        given = {node.name: node for node in session.get_outputs()}
        outputs = tuple(name for name in outputs if name in given or name not in SINCE.get(role, ()))
        wrong = [f"has no input {name}" for name in inputs if name not in taken]
        wrong += [f"wants an input {name}" for name in required if name not in inputs]
        wrong += [f"has no output {name}" for name in outputs if name not in given]
        if wrong:
            raise PackageError(
                f"{self.package.path}: {role}.onnx should take {', '.join(inputs)} and give {', '.join(outputs)}, "
                f"but {wrong[0]}; export the package again."
            )
        arrays = arrays_of(manifest, role)
        for name, node in [*((name, taken[name]) for name in inputs), *((name, given[name]) for name in outputs)]:
            dtype, shape = arrays[name]
            came = DTYPES.get(node.type, node.type)
            if came != dtype or not _fits(node.shape, shape):
                self._disagree(role, name, f"{dtype} {_shown(shape)}", f"{came} {_shown(node.shape)}")
        return {name: arrays[name][1] for name in outputs}

    def _disagree(self, role: str, name: str, expected: str, came: str) -> NoReturn:
        raise PackageError(
            f"{self.package.path}: {role}.onnx: expected {name} to be {expected} as the manifest has it, but the graph "
            f"has {came}; export the package again."
        )


def _fits(declared: Sequence[object], shape: Shape) -> bool:
    """Whether a graph's declaration allows `shape`: a size that is no number is open, the batch's must be.

    onnxruntime also gives [] for a value of unknown rank; what such an output turns out to be is checked at each run.
    """
    if not declared:
        return True
    return len(declared) == len(shape) and all(
        not isinstance(size, int) or size < 0 or size == wanted for size, wanted in zip(declared, shape, strict=True)
    )


def _is_of(came: tuple[int, ...], shape: Shape) -> bool:
    """Whether an output has this shape, in which a size that is a name may be any."""
    return len(came) == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(came, shape, strict=True)
    )


def _shown(shape: Sequence[object]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _check_providers(
    ort: ModuleType, providers: Sequence[Provider] | None
) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    if providers is None:
        return ((CPU, {}),)
    if isinstance(providers, str) or not isinstance(providers, Sequence) or not providers:
        raise InputError(f"providers: expected a list such as [{CPU!r}], but got {providers!r}.")
    named: list[tuple[str, Mapping[str, Any]]] = []
    for provider in providers:
        name, settings = (provider, {}) if isinstance(provider, str) else _pair(provider)
        if name not in ort.get_available_providers():
            raise ProviderError(
                f"providers: {name} is not in this onnxruntime, which has {', '.join(ort.get_available_providers())}; "
                "GPU providers come with pip install 'icnnrt[gpu]' in place of 'icnnrt[cpu]'."
            )
        named.append((name, settings))
    return tuple(named)


def _native_operators(ort: ModuleType, native: bool | None) -> frozenset[str]:
    """The operators that native kernels are to serve."""
    if native is not None and not isinstance(native, bool):
        raise InputError(f"native: expected True, False or None, but got {native!r}.")
    if native is False or (native is None and _native.build().library is None):
        return frozenset()
    try:
        return _native.kernels(ort).operators
    except MissingDependencyError as error:
        if native:
            raise
        # The portable bodies give the same answers, only later, so a robot need not stand still for it. But whoever
        # installed the library meant to have it, so this is said aloud, and not only where one would have to look.
        warnings.warn(f"{error} Operators run on their portable bodies.", RuntimeWarning, stacklevel=5)
        return frozenset()


def _pair(provider: object) -> tuple[str, Mapping[str, Any]]:
    if isinstance(provider, tuple) and len(provider) == 2:
        name, settings = provider
        if isinstance(name, str) and isinstance(settings, Mapping):
            return name, settings
    raise InputError(f"providers: expected names or pairs (name, options), but one is {provider!r}.")


def _first_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return text if len(text) <= 300 else text[:297] + "..."
