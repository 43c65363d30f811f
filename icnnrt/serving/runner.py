"""The ONNX Runtime sessions of one package, and the weights that all of them share.

Each weight is one OrtValue, bound to a session by io-binding: without that a session keeps the weights that it was made
with. Nothing is read from the disk: what runs is what was checked.

There is no lock on the way of a run. A run takes the weights that are the last (see `weight_sets`) and a binding that
is idle, by the one `pop` of a list, and puts it back by the one `append`; a binding that is not put back, for an
exception at whatever place, is lost, and the next run makes another.
"""

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from icnnrt import native_library
from icnnrt.arguments import COPIED, integer, refused
from icnnrt.errors import IcnnrtError, InputError, PackageError
from icnnrt.format import wire
from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.format.onnx_graph import read_interface
from icnnrt.format.package import Package
from icnnrt.format.signatures import BATCH, TRAIN_ROLE, Shape, Signature, expected, fits, shown
from icnnrt.limits import Deadline, Limits, deadline, each_call, ended, needs_memory
from icnnrt.ort import (
    Provider,
    bound_memory,
    checked_providers,
    checked_threads,
    first_line,
    native_operators,
    onnxruntime,
    open_session,
    provider_names,
    session_options,
)
from icnnrt.printable import harmless
from icnnrt.serving.chunks import MEMORY, WEIGHTS, Footprint, Gathered, chunks, fed
from icnnrt.serving.once import Once
from icnnrt.serving.served import Served
from icnnrt.serving.turns import Link, Turns
from icnnrt.serving.weight_sets import WeightSet, as_used

# What onnxruntime, and the C++ below it, say where there is none left.
NO_MEMORY: Final = re.compile(r"[Ff]ailed to allocate memory|bad_alloc|[Aa]vailable memory of|out of memory")
_bounding: Final = Turns()


class _Graph:
    """One ONNX file as a session, with its idle bindings and the weights they bind."""

    def __init__(
        self,
        session: Any,
        outputs: Mapping[str, Shape],
        weights: Sequence[str],
        optional: frozenset[str],
        native: bool,
        made_with: Mapping[str, Any],
    ) -> None:
        self.session = session
        self.native = native  # its solver operators have no bodies, so that nothing but kernels can run them
        self.outputs = tuple(outputs)
        self._shapes = tuple(outputs.values())
        self._last: tuple[int, list[Shape]] = (-1, [])  # batch size, shapes of its outputs
        self.weights = weights  # names of those that are overridable, so bound: an update reaches them
        self.optional = optional  # inputs that have a default, which are bound in another way
        self.idle: list[tuple[Any, str]] = []  # binding, id of the weights that it binds
        self._made_with = made_with  # the session may use their memory

    def shapes(self, samples: int) -> list[Shape]:
        """What the outputs must look like for so many samples."""
        known, shapes = self._last
        if known != samples:
            shapes = [tuple(samples if size == BATCH else size for size in shape) for shape in self._shapes]
            self._last = samples, shapes
        return shapes


class Runner:
    """Runs the graphs of one package by role. Thread-safe; a forked child makes its sessions anew.

    A session is made when its role is first run: adjoint.onnx costs nothing until a gradient is asked for.
    """

    def __init__(
        self,
        package: Package,
        providers: Sequence[Provider] | None,
        threads: int | None,
        native: bool | None,
        memory: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._ort = onnxruntime()
        self.package = package
        self._providers = checked_providers(self._ort, providers)
        self._kernels = native_operators(self._ort, native)
        self._threads = checked_threads(threads)
        self.limits = limits
        hashes = [package.manifest.weights.sha256, *sorted(g.sha256 for g in package.manifest.graphs.values())]
        self._first = WeightSet(
            {name: as_used(array) for name, array in package.weights.items()},
            hashlib.sha256("".join(hashes).encode()).hexdigest()[:16],
        )
        self._link = Link(self._first)
        self.options: Mapping[str, Any] = {"providers": providers, "threads": threads, "native": native}
        self._served = Served(package, self.options, limits, self._first.id) if limits and limits.process else None
        large = WEIGHTS * sum(array.nbytes for array in self._first.arrays.values())
        self._memory = max(MEMORY, large) if memory is None else integer(memory, "memory", 1)
        self._signatures: dict[str, Signature] = {}
        self._footprints: dict[str, Footprint] = {}
        self._samples: dict[str, int] = {}  # at once, by role; of graphs without open sizes but the batch
        self._constants: frozenset[str] | None = None
        self._graphs: Once[_Graph] = Once()
        self._closed = False

    @property
    def provider_names(self) -> tuple[str, ...]:
        """The execution providers in use, in order of preference."""
        return provider_names(self._providers)

    @property
    def native(self) -> bool:
        """Whether native kernels serve the operators of this package."""
        ops = self.package.manifest.ops.get(OP_DOMAIN)
        return ops is not None and not self._kernels.isdisjoint(ops.names)

    def ran_native(self, role: str) -> bool:
        """Whether native kernels served the runs of this graph; False if there were none."""
        graph = self._graphs.find(role)
        return graph is not None and graph.native

    def info(self, role: str, began: float, *, ran: bool = True, **settings: Any) -> dict[str, Any]:
        """How an answer was computed that a graph gave, for `Solution.info`; `began` is of time.perf_counter, `ran`
        says whether any sample was run."""
        return {
            "providers": self.provider_names,
            "native": ran and self.ran_native(role),
            **settings,
            "seconds": time.perf_counter() - began,
        }

    @property
    def first_id(self) -> str:
        """The id of the weights of the package."""
        return self._first.id

    @property
    def weights(self) -> WeightSet:
        """The weights as they are now."""
        link = self._link = self._link.last()
        return link.value

    @each_call
    def run(
        self,
        role: str,
        feeds: Mapping[str, NDArray[Any]],
        *,
        made_with: str | None = None,
        weights: WeightSet | None = None,
        only: Sequence[str] | None = None,
        where: NDArray[np.bool_] | None = None,
        fill: Mapping[str, object] | None = None,
        out: Mapping[str, NDArray[Any]] | None = None,
    ) -> tuple[dict[str, NDArray[Any]], str]:
        """Run a graph; return its outputs by name and the id of the weights that were used, one set for all samples.

        Many samples are run in chunks, so that what they take on the way has a bound, see `chunks`.

        `weights` are those to use, by default the last ones. `made_with` is the id of the weights that the feeds come
        from; if the last ones are others, they are refused. With `only`, no more of the graph is run than these outputs
        need; outputs of `signatures.OPTIONAL_OUTPUTS` are missing where the graph does not have them. `where` [B] are
        the samples to run; of the others outputs are NaN, or what `fill` says by name, and sums have no part of them.
        What `out` has arrays for is written to these.
        """
        self.check_open()
        if weights is None:
            weights = self.weights
            _check_same(weights, made_with)
        if only is not None:
            only = tuple(name for name in only if name in self._signature(role).outputs)
        samples = len(feeds["x"])
        every = where is None or bool(where.all())
        size = self.samples_at_once(role, feeds)
        if every and 0 < samples <= size and not out:
            return self._run(self._graph(role), role, feeds, weights, only), weights.id
        outputs, inputs = self._signature(role).outputs, self._signature(role).inputs
        kept = np.ones(samples, bool) if where is None else where
        of_these = outputs if only is None else {name: outputs[name] for name in only}
        gathered = Gathered(of_these, kept, self._sizes(role, feeds), fill or {}, out or {})
        if kept.any():
            graph = self._graph(role)
            rows_of = chunks(samples if every else np.flatnonzero(kept), size)
            # Of many chunks the last may hold all feeds in memory, so their binding ends with this call.
            binding = graph.session.io_binding() if samples > size and self._served is None else None
            bound = ""
            for rows in rows_of:
                part = fed(feeds, inputs, rows)
                gathered.add(rows, self._run(graph, role, part, weights, only, binding, bound))
                bound = weights.id
        return gathered.result(), weights.id

    def samples_at_once(self, role: str, feeds: Mapping[str, NDArray[Any]]) -> int:
        """How many samples, such as these feeds are, the graph takes in one run."""
        samples = len(feeds["x"])
        if samples < 2 or role == TRAIN_ROLE:  # a step is one, whatever it takes
            return max(1, samples)
        size = self._samples.get(role)
        if size is None:
            footprint = self._footprints.get(role)
            if footprint is None:
                data, file = self.package.graphs[role], f"{role}.onnx"
                footprint = self._footprints[role] = Footprint(data, file, self._signature(role), self._kernels)
            sizes = self._sizes(role, feeds)
            if "iterations" in feeds:  # as many slots as that at most
                sizes.setdefault("slots", int(feeds["iterations"]))
            size = max(1, self._memory // footprint.of_a_sample(sizes))
            if footprint.fixed:
                self._samples[role] = size
        return size

    def _signature(self, role: str) -> Signature:
        """What is fed to a graph and read of it."""
        found = self._signatures.get(role)
        if found is None:
            known = expected(self.package.manifest, role)
            assert known is not None, "icnnrt runs no graph that it does not know"
            found = self._signatures[role] = known
        return found

    def _sizes(self, role: str, feeds: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """The open sizes of a graph besides the batch, as far as these feeds tell."""
        return {
            size: feeds[name].shape[axis]
            for name, tensor in self._signature(role).inputs.items()
            for axis, size in enumerate(tensor.shape)
            if axis and isinstance(size, str)
        }

    def _run(
        self,
        graph: _Graph,
        role: str,
        feeds: Mapping[str, NDArray[Any]],
        weights: WeightSet,
        only: Sequence[str] | None,
        binding: Any = None,
        bound: str = "",
    ) -> dict[str, NDArray[Any]]:
        """Run a graph once. `binding` is one to use, which binds the weights with the id `bound`, in place of an idle
        one."""
        wanted = graph.outputs if only is None else tuple(only)
        end = None if self.limits is None else deadline()
        if self._served is None:
            found = self._computed(graph, role, feeds, weights, wanted, only is not None, binding, bound, end)
        else:
            assert end is not None, "with limits, every run has an end"
            dtypes = {name: self._signature(role).outputs[name].dtype for name in wanted}
            found = self._served.run(role, feeds, weights, dtypes, end)
        # A graph may leave sizes open where it declares its outputs, so they are only known now.
        shapes = graph.shapes(len(feeds["x"]))
        if only is not None:
            by_name = dict(zip(graph.outputs, shapes, strict=True))
            shapes = [by_name[name] for name in wanted]
        if [value.shape for value in found] != shapes:
            for name, value, shape in zip(wanted, found, shapes, strict=True):
                if value.shape != shape and not _is_of(value.shape, shape):
                    self._disagree(role, name, shown(shape), shown(value.shape))
        return dict(zip(wanted, found, strict=True))

    def run_once(
        self, role: str, feeds: Mapping[str, NDArray[Any]], weights: WeightSet, only: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """Run a graph once, for all samples together."""
        return self._run(self._graph(role), role, feeds, weights, only)

    def _computed(
        self,
        graph: _Graph,
        role: str,
        feeds: Mapping[str, NDArray[Any]],
        weights: WeightSet,
        wanted: Sequence[str],
        no_more: bool,
        binding: Any,
        bound: str,
        end: Deadline | None,
    ) -> list[NDArray[Any]]:
        """What onnxruntime makes of it in this process; with `no_more`, nothing that the wanted outputs do not need."""
        idle = binding is None
        if idle:
            try:
                binding, bound = graph.idle.pop()
            except IndexError:
                binding, bound = graph.session.io_binding(), ""
        try:
            if bound != weights.id:
                values = weights.values(self._ort.OrtValue.ortvalue_from_numpy)
                for name in graph.weights:
                    binding.bind_ortvalue_input(name, values[name])
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
            if not no_more and end is None:
                graph.session.run_with_iobinding(binding)
            else:
                options = self._ort.RunOptions()
                options.only_execute_path_to_fetches = no_more
                with ended(end, lambda: setattr(options, "terminate", True)):
                    graph.session.run_with_iobinding(binding, options)
            found: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
            binding.clear_binding_outputs()
        except Exception as error:
            what = f"{self.package.path}: {role}.onnx"
            if end is not None and (late := end.over(what)):
                raise late from harmless(error)
            memory = isinstance(error, MemoryError) or NO_MEMORY.search(str(error))
            if memory and self.limits is not None:
                raise needs_memory(what, self.limits) from harmless(error)
            remedy = "icnnrt verify says whether the package is sound on this machine"
            if memory:
                remedy = "run smaller batches"
            raise IcnnrtError(
                f"{what}: onnxruntime failed on a batch of {len(feeds['x'])} ({first_line(error)}); {remedy}."
            ) from harmless(error)
        # A binding keeps what it was fed alive until it is fed anew: large batches are not to stay with an idle one.
        if idle and (len(feeds["x"]) < 2 or sum([array.nbytes for array in feeds.values()]) <= COPIED):
            graph.idle.append((binding, weights.id))
        return found

    def update_weights(
        self, new: Mapping[str, NDArray[Any]], *, made_with: str | None = None, note: object = None
    ) -> WeightSet:
        """Put new values in the place of some weights; later runs use them, runs under way end with the old ones.

        The arrays are kept: nobody may write in them afterwards. `made_with` is the id of the weights that they follow
        from; others are not followed. Returns the new set, which carries `note`. Raises `InputError` if a weight is
        unknown, differs in shape or dtype, or is a constant of some graph; then none has changed.
        """
        tensors = self.package.manifest.weights.tensors
        for name, array in new.items():
            spec = tensors.get(name)
            if spec is None:
                raise InputError(f"weights: the package has no weight {name!r}; its weights are {sorted(tensors)}.")
            if not isinstance(array, np.ndarray) or array.dtype != spec.dtype or array.shape != spec.shape:
                came = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise refused("weights", f"{spec.dtype}{list(spec.shape)} for {name!r}", came)
            if name in self._frozen():
                raise InputError(f"weights: {name!r} was exported as a constant; export it as an overridable weight.")
        kept = {name: as_used(array) for name, array in new.items()}
        while True:
            link = self._link.last()
            self.check_open()
            _check_same(link.value, made_with)
            following = WeightSet({**link.value.arrays, **kept}, secrets.token_hex(8), note)
            if link.follow(Link(following)):
                return following

    def close(self) -> None:
        """Drop the sessions. Runs under way end well; later ones are refused."""
        self._closed = True
        self._graphs.give_up()
        if self._served is not None:
            self._served.close()

    def check_weights(self, made_with: str | None, method: str = "argmin") -> None:
        """Refuse a solution of `method` that was computed with other weights than the present ones."""
        _check_same(self.weights, made_with, method)

    def check_open(self) -> None:
        """Refuse further use after `close`."""
        if self._closed:
            raise IcnnrtError("the session is closed; call icnnrt.load again.")

    def _graph(self, role: str) -> _Graph:
        self.check_open()
        graph = self._graphs.find(role)
        if graph is None:
            graph = self._graphs.get(role, lambda: self._make(role))
            if self._closed:  # meanwhile: it serves the call under way, and nobody keeps it
                self._graphs.give_up()
        return graph

    def _make(self, role: str) -> _Graph:
        data = self.package.graphs[role]
        file = f"{role}.onnx"
        found = wire.survey(data, file)
        names = [tensor.tensor for tensor in found.external]
        if not self._first.arrays.keys() >= set(names) or len(set(names)) < len(names):
            raise PackageError(
                f"{file}: tensors kept in {self.package.manifest.weights.file} should bear the names of weights, each "
                "once; export the package again."
            )
        outputs = self._check_signature(role)
        native = not self._kernels.isdisjoint(name for domain, name in found.operators if domain == OP_DOMAIN)
        if self._served is not None:
            return _Graph(None, outputs, (), frozenset(), native, {})
        options = session_options(self._ort, self._threads)
        options.add_session_config_entry("session.load_model_format", "ONNX")
        values = self._first.values(self._ort.OrtValue.ortvalue_from_numpy)
        options.add_external_initializers(names, [values[name] for name in names])
        if native:
            native_library.register(options)
            # Kernels win over bodies, but which of them ran could not be told. Without the bodies a session that can
            # be made at all runs the kernels.
            data = wire.without_functions(data, OP_DOMAIN, self._kernels, file)

        def refused(why: str) -> IcnnrtError:
            return PackageError(
                f"{self.package.path}: {file}: onnxruntime cannot load it ({why}); "
                f"upgrade onnxruntime, {'try native=False, ' if native else ''}or export the package again."
            )

        session = self._opened(data, options, file, refused)
        overridable = frozenset(node.name for node in session.get_overridable_initializers())
        bound = tuple(name for name in values if name in overridable)
        return _Graph(session, outputs, bound, overridable, native, values)

    def _opened(self, data: bytes, options: Any, file: str, refused: Callable[[str], IcnnrtError]) -> Any:
        """The session of a graph, within limits if there are some."""
        if self.limits is None:
            return open_session(self._ort, data, options, self._providers, file, refused)
        end = deadline()
        later = hasattr(options, "set_load_cancellation_flag")  # of versions of onnxruntime
        # The bound is the process's until the session is made.
        turn = _bounding.take()
        try:
            bound_memory(self._ort, options, self.limits.bytes)
            with ended(end if later else None, lambda: options.set_load_cancellation_flag(True)):
                return open_session(self._ort, data, options, self._providers, file, refused)
        except PackageError as error:
            if end is not None and (late := end.over(f"{self.package.path}: {file}")):
                raise late from error.__cause__
            raise
        finally:
            turn.end()

    def _frozen(self) -> frozenset[str]:
        """Weights that are constants of some graph, so that an update would not reach it."""
        if self._constants is None:
            found: set[str] = set()
            for role, data in self.package.graphs.items():
                inputs = {v.name for v in read_interface(data, f"{role}.onnx").inputs}
                found |= {tensor.tensor for tensor in wire.survey(data, f"{role}.onnx").external} - inputs
            self._constants = frozenset(found)
        return self._constants

    def _check_signature(self, role: str) -> dict[str, Shape]:
        """Return the outputs to read and their shapes, after checking that icnnrt can feed and read this graph."""
        wanted, given = self._signature(role), self.package.manifest.graphs[role].signature
        assert given is not None, "a package that is open lists what its graphs take and give"
        wrong = [f"has no input {name}" for name in wanted.inputs if name not in given.inputs]
        wrong += [
            f"wants an input {name}"
            for name, tensor in given.inputs.items()
            if name not in wanted.inputs and tensor.default is None
        ]
        wrong += [f"has no output {name}" for name in wanted.outputs if name not in given.outputs]
        if wrong:
            raise PackageError(
                f"{self.package.path}: {role}.onnx should take {', '.join(wanted.inputs)} and give "
                f"{', '.join(wanted.outputs)}, but {wrong[0]}; export the package again."
            )
        for told, came in ((wanted.inputs, given.inputs), (wanted.outputs, given.outputs)):
            for name, tensor in told.items():
                dtype, shape, _ = came[name]
                if dtype != tensor.dtype or not fits(shape, tensor.shape):
                    self._disagree(
                        role, name, f"{tensor.dtype} {shown(tensor.shape)}", f"{dtype or 'another'} {shown(shape)}"
                    )
        return {name: tensor.shape for name, tensor in wanted.outputs.items()}

    def _disagree(self, role: str, name: str, expected: str, came: str) -> NoReturn:
        raise PackageError(
            f"{self.package.path}: {role}.onnx: expected {name} to be {expected} as the manifest has it, but the graph "
            f"has {came}; export the package again."
        )


def _check_same(weights: WeightSet, made_with: str | None, method: str = "argmin") -> None:
    if made_with is not None and made_with != weights.id:
        raise InputError(
            f"solution: expected one that {method} computed with the weights this session has now, but it is of other "
            f"weights: it comes from another package or from before an update of the weights; call {method} again."
        )


def _is_of(came: tuple[int, ...], shape: Shape) -> bool:
    """Whether an output has this shape, in which a size that is a name may be any."""
    return len(came) == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(came, shape, strict=True)
    )
