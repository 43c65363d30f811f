"""Quadratic programs of one size over and over, as a control loop has them: memory and bindings are made once.

    solver = icnnrt.QPSolver(n=10, m=5)
    z = solver.solve(Q, p, G, h)             # a view of solver.z, written over by the next call
    gradients = solver.vjp(z_bar)            # of every datum, written over by the next call too

    pattern = icnnrt.QPPattern(Q, G, A)      # large and sparse: where the data may be other than 0
    solver = icnnrt.QPSolver(n, m, q, pattern=pattern)

The problem, its signs and its statuses are those of `icnnrt.qp`, the better choice where sizes change, or where a
microsecond does not matter: it checks more, copies nothing, and its answers last. A `QPSolver` is for one thread, the
first that solves with it: its memory would be written by two at once.
"""

import functools
import time
from collections.abc import Callable
from threading import get_ident
from typing import Any, Final, NamedTuple

import numpy as np
from numpy import ndarray  # looked up in every call
from numpy.typing import NDArray

from icnnrt.arguments import choice, converted, flag, instance, integer, refused, sample, shown
from icnnrt.errors import IcnnrtError, LimitError
from icnnrt.mathematics.qp_advice import qp_advice
from icnnrt.mathematics.qp_data import SHAPES
from icnnrt.mathematics.qp_names import SENSITIVITY, SOLUTION
from icnnrt.mathematics.qp_pattern import QPPattern
from icnnrt.mathematics.qp_reliability import dependent, moved, reliable
from icnnrt.mathematics.qp_settings import Settings
from icnnrt.mathematics.qp_status import STATUSES, QPStatus, statuses
from icnnrt.mathematics.status import summarise
from icnnrt.ort import onnxruntime
from icnnrt.serving.direct_kernels import Bound, adjoint_call, solve_call
from icnnrt.serving.forks import generation, inherit
from icnnrt.serving.operators import operator_session, stopped_after
from icnnrt.serving.quadratic_program import DTYPES

__all__ = ["QPData", "QPSolver"]

Floats = NDArray[Any]
ABSENT: Final = {"h_lower": "two_sided=True", "lower": "box=True", "upper": "box=True"}
DIRECT: Final = {"qp_solve": solve_call, "qp_sensitivity": adjoint_call}
NONE: Final = -1  # of the calls of `solve`
SIZES_MAX: Final = 1 << 20  # far more than memory holds of Q


class QPData(NamedTuple):
    """An array for every datum; those of bounds that the solver was made without have no columns."""

    Q: Floats
    p: Floats
    G: Floats
    h_lower: Floats
    h: Floats
    A: Floats
    b: Floats
    lower: Floats
    upper: Floats


class QPSolver:
    """B problems of n variables, m rows of G and q equalities, one call after the other.

    Everything that `solve` gets is copied into `data`, and what it does not get is still there from the call before:
    `solver.solve(p=p)` solves for a new p. `data` may also be written in place. After a call `z`, `lam`, `nu`,
    `bound_multipliers`, `slack`, `box_slack`, `residual`, `status`, `ray` and `steps` hold what `QPSolution` says of
    them, and `advice` and `summary` tell how it went. Before the first call, and after one that raised in the middle of
    its work, there is no answer: z, what goes with it and `residual` are NaN, `status` is SOLVER and `ok` False.
    """

    z: Floats
    lam: Floats
    nu: Floats
    bound_multipliers: Floats
    slack: Floats
    box_slack: Floats
    residual: NDArray[np.float64]
    _codes: NDArray[np.int32]
    ray: Floats
    steps: NDArray[np.int32]

    def __init__(
        self,
        n: int,
        m: int = 0,
        q: int = 0,
        *,
        batch: int = 1,
        dtype: str = "float64",
        box: bool = False,
        two_sided: bool = False,
        warm: bool = False,
        pattern: QPPattern | None = None,
        tolerance: float | None = None,
        steps: int | None = None,
        seconds: float | None = None,
        native: bool | None = None,
        threads: int | None = None,
    ) -> None:
        """
        n, m, q:    sizes of z, h and b; m and q may be 0
        batch:      B, how many problems a call solves
        dtype:      "float32" or "float64"
        box:        there are `lower` and `upper`; until they are given they are infinite
        two_sided:  there is `h_lower`
        warm:       a call starts from the answer of the one before; samples without one start cold
        pattern:    where Q, G and A may be other than 0. It pays from some tens of variables on where most entries are
                    0 (`QPPattern.pays`): native kernels then factor no zeros, and answer the same
        tolerance, steps, seconds:  of every call, as `icnnrt.qp` takes them
        native, threads:  as `icnnrt.load` takes them

        Raises `InputError` for sizes and settings that do not fit, and what `icnnrt.load` raises for the last two.
        """
        sizes = {"n": n, "m": m, "q": q, "batch": batch}
        for name, size in sizes.items():
            sizes[name] = integer(size, name, 1 if name in ("n", "batch") else 0, SIZES_MAX)
        dtype = choice(dtype, "dtype", tuple(DTYPES.values()))
        box, two_sided, warm = flag(box, "box"), flag(two_sided, "two_sided"), flag(warm, "warm")
        n, m, q, B = sizes.values()
        self._settings = Settings.checked(tolerance, steps, seconds, dtype)
        self._pattern = None if pattern is None else _checked_pattern(pattern, n, m, q)
        absent = {"h_lower": not two_sided, "lower": not box, "upper": not box}
        empty = {"h_lower": -np.inf, "h": np.inf, "lower": -np.inf, "upper": np.inf}
        length = {"n": n, "m": m, "q": q}

        def array(name: str) -> Floats:
            shape = (1, 0) if absent.get(name) else (B, *(length[letter] for letter in SHAPES[name]))
            return np.full(shape, empty.get(name, 0.0), dtype)

        self.data = QPData(*(array(name) for name in QPData._fields))
        # Arrays of these shapes are taken without another look; none is where there is no such datum.
        self._inputs = [
            (name, a, a.dtype, () if absent.get(name) else (a.shape[1:], a.shape), a.size > 0)
            for name, a in self.data._asdict().items()
        ]
        self._threads: dict[int, int] = {}  # of each generation of forks, which has its own, that of the first call
        self._start = np.full((B, 2 * n + m + q) if warm else (1, 0), np.nan, dtype)
        kinds = {"residual": np.float64, "status": np.int32, "steps": np.int32}
        shapes: dict[str, tuple[int, ...]] = {
            **{"z": (n,), "lam": (m,), "nu": (q,), "mu": (n,), "slack": (m,), "box_slack": (n,)},
            **{"residual": (3,), "status": (), "ray": (2 * n + m + q,), "steps": ()},
        }
        answers = {name: np.zeros((B, *shapes[name]), kinds.get(name, dtype)) for name in SOLUTION}
        self._answers = answers
        self._share, self._weak = np.full(B, np.nan), np.zeros(B, np.int32)
        self._differentiated = NONE  # which call of `solve` these two are of
        self._forget()
        for name, value in answers.items():
            setattr(self, {"status": "_codes", "mu": "bound_multipliers"}.get(name, name), value)
        self._bars = {f"{name}_bar": np.zeros((B, *shapes[name]), dtype) for name in ("z", "lam", "nu", "mu")}
        self._only_z_bar = True  # the other three are zero, and need not be written again
        self.gradients = QPData(*(np.zeros_like(a) for a in self.data))
        rows = (np.zeros((B, *shapes[name.removeprefix("d_")]), dtype) for name in SENSITIVITY[1:4])
        self._d = [self.gradients.p, *rows]  # d_z is the gradient by p
        self._moved_share, self._told_of = np.full(B, np.nan), NONE  # of `_dependent`, and of which call
        self._where = dtype, native, threads
        self._sparse = "" if self._pattern is None else "sparse_"
        self._plan = {} if self._pattern is None else {"plan": self._pattern.plan}
        inputs = {name: a for name, a in self.data._asdict().items() if not absent.get(name)}
        inputs |= ({"start": self._start} if warm else {}) | self._settings.feeds() | self._plan
        self._solve = _Bound(f"{self._sparse}qp_solve", self._where, inputs, answers, self._settings.seconds)
        points = self.z, self.lam, self.nu, self.bound_multipliers
        # Where each part of the last answer goes in the next start.
        places = np.split(self._start, np.cumsum([n, m, q]), 1) if warm else []
        self._starts = [(into, part) for into, part in zip(places, points, strict=False) if part.size]
        self._data_gradients = _DataGradients(self._d, points, self.gradients)

    def solve(
        self,
        Q: Any = None,
        p: Any = None,
        G: Any = None,
        h: Any = None,
        A: Any = None,
        b: Any = None,
        *,
        lower: Any = None,
        upper: Any = None,
        h_lower: Any = None,
    ) -> Floats:
        """z [B, n]. Data are [B, ...], or without the batch axis to be the same for all samples.

        Bounds of ±1e20 and beyond are none. What became of each sample is in `status`, a `Status` each; z is NaN where
        there is no answer. It is the same array in every call: copy what has to last.

        Raises `InputError` for shapes that do not fit, for what are no real numbers, for what lies outside the pattern,
        and in another thread than the first; `data` is as before then. What is written outside the pattern in place is
        solved all the same, as slowly as without one.
        """
        if self._solve.thread != get_ident():
            self._demand_own_thread()
        # All are looked at before the first is copied, so that what is refused changes nothing.
        parts = []
        given = (Q, p, G, h_lower, h, A, b, lower, upper)
        for value, wanted in zip(given, self._inputs):  # noqa: B905  a tenth of a microsecond
            if value is not None:
                name, into, dtype, shapes, holds = wanted
                # A dtype of the same kind may be another object: that is seen to by the longer way.
                if type(value) is not ndarray or value.dtype is not dtype or value.shape not in shapes:
                    value = _fitted(name, value, into)
                if self._pattern is not None and name in "QGA":
                    _check_within(self._pattern, name, value, into)
                if holds:
                    parts.append((into, value))
        try:
            for into, value in parts:
                into[...] = value
            if not self._solve.direct:  # which reads its last answer itself
                for into, value in self._starts:
                    into[...] = value
            self._solve()
        except BaseException:  # what the arrays hold now is of no program, be it that only some data are new
            self._forget()
            raise
        return self.z

    def vjp(self, z_bar: Any, lam_bar: Any = None, nu_bar: Any = None, bound_multipliers_bar: Any = None) -> QPData:
        """∂ℓ/∂ of all data of the last `solve`, for a loss ℓ with ∂ℓ/∂z = z_bar and so on; None is zero.

        Samples that are not SOLVED have NaN, and of a loss that has a part without a gradient it is that of the rest:
        `reliable` says where. Where the same datum was given to all samples, sum over the first axis. The arrays are
        the same in every call. `icnnrt.qp` has smoothed gradients and `on_unsafe`.
        """
        if not self._solve.calls:
            raise refused("z_bar", "a solved problem to differentiate", "none", "call solve before vjp")
        self._demand_own_thread()
        given = {"z_bar": z_bar}
        if lam_bar is not None or nu_bar is not None or bound_multipliers_bar is not None or not self._only_z_bar:
            given |= {"lam_bar": lam_bar, "nu_bar": nu_bar, "mu_bar": bound_multipliers_bar}
        parts = []
        for name, value in given.items():
            into = self._bars[name]
            if value is None and name != "z_bar":
                value = 0.0
            elif type(value) is not np.ndarray or value.dtype != into.dtype or value.shape != into.shape:
                value = _fitted("bound_multipliers_bar" if name == "mu_bar" else name, value, into)
            parts.append((into, value))
        self._only_z_bar &= len(given) == 1  # what is interrupted here leaves nothing behind
        self._differentiated = NONE
        for into, value in parts:
            into[...] = value
        self._only_z_bar = lam_bar is None and nu_bar is None and bound_multipliers_bar is None
        self._adjoint()
        self._data_gradients.write()
        self._differentiated = self._solve.calls
        return self.gradients

    def _forget(self) -> None:
        """There is no answer."""
        for name, value in self._answers.items():
            value.fill(0 if name in ("ray", "steps") else QPStatus.FAILED if name == "status" else np.nan)
        self._differentiated = NONE

    def _demand_own_thread(self) -> None:
        thread = get_ident()
        if self._threads.setdefault(generation(), thread) != thread:  # setdefault lets one be the first
            raise refused("solver", "calls from one thread", "another", "make a QPSolver for each thread")
        self._solve.thread = thread

    @functools.cached_property
    def _adjoint(self) -> "_Bound":
        """Made with the first `vjp`: who only solves needs no session for it."""
        return self._bound_adjoint(self._bars, [*self._d, self._share, self._weak])

    def _bound_adjoint(self, bars: dict[str, Floats], found: list[Any]) -> "_Bound":
        read = {name: getattr(self, name) for name in ("lam", "slack", "box_slack")}
        read |= {"mu": self.bound_multipliers, "status": self._codes}
        return _Bound(
            f"{self._sparse}qp_sensitivity",
            self._where,
            {**{name: getattr(self.data, name) for name in "QGA"}, **read, **bars, **self._plan},
            dict(zip(SENSITIVITY, found, strict=True)),
        )

    @property
    def status(self) -> NDArray[np.int32]:
        """[B] int32, a `Status` each, of the last `solve`; SOLVER before the first."""
        return statuses(self._codes)

    @property
    def reliable(self) -> NDArray[np.bool_]:
        """[B] bool, of the last `vjp`: as `QPGradients.reliable`; False before the first one of the last `solve`.

        To be asked for it costs about as much as a `vjp`, once for every `solve`, where there are constraints.
        """
        if self._differentiated != self._solve.calls:  # what it would be told from is of another program
            return np.zeros(len(self._share), bool)
        found = reliable(self._share, self._weak, self.z.dtype.name)
        return found & ~self._dependent() if found.any() else found

    def _dependent(self) -> NDArray[np.bool_]:
        """[B] bool: whether rows that hold z depend on each other, see `qp_reliability.moves`."""
        if self._told_of != self._solve.calls and any(into.size for _, into, *_ in self._inputs[2:]):
            self._demand_own_thread()
            told = self._independence
            bars = moved(self.data.G, self.data.A, self.bound_multipliers)
            for name, bar in zip(("lam_bar", "nu_bar", "mu_bar"), bars, strict=True):
                told.inputs[name][...] = bar
            told()
            self._told_of = self._solve.calls
        return np.asarray(dependent(self._moved_share, self.z.dtype.name))

    @functools.cached_property
    def _independence(self) -> "_Bound":
        """The adjoint of what rows are moved by; nothing but the share is of interest."""
        bars = {name: np.zeros_like(a) for name, a in self._bars.items()}
        found = [*map(np.zeros_like, self._d), self._moved_share, np.zeros_like(self._weak)]
        return self._bound_adjoint(bars, found)

    @property
    def ok(self) -> bool:
        """Whether every sample of the last `solve` is CONVERGED; False before the first."""
        return not self._codes.any()

    def advice(self, i: int = 0) -> str:
        """One sentence with numbers: how sample `i` of the last `solve` went, and what would make it better."""
        if not self._solve.calls:
            raise refused("advice", "a solved problem to tell of", "none", "call solve first")
        i = sample(i, len(self._codes))
        data = {name: a[i if len(a) > 1 else 0] for name, a in self.data._asdict().items()}
        course = self._settings.told(self.z.dtype, int(self.steps[i]), self._solve.elapsed)
        return qp_advice(i, STATUSES[int(self._codes[i])], self.residual[i], data, **course)

    def summary(self) -> str:
        """How many samples have which status, and the advice on the first of each kind that was not solved."""
        return summarise(self.status.tolist(), self.advice) if self._solve.calls else "not run"

    def __reduce__(self) -> tuple[Any, ...]:
        came = "a QPSolver, which holds memory that onnxruntime works in"
        raise refused("solver", "what can be pickled", came, "make one of the same sizes where it is needed")

    def __repr__(self) -> str:
        B, n = self.z.shape
        state = self.summary().partition("\n")[0]
        return f"<QPSolver of {B} x (n {n}, m {self.lam.shape[1]}, q {self.nu.shape[1]}): {state}>"


def _checked_pattern(pattern: object, n: int, m: int, q: int) -> QPPattern:
    found = instance(pattern, "pattern", QPPattern, "a QPPattern", "make one by icnnrt.QPPattern(Q, G, A)")
    found.check_sizes(n, m, q)
    return found


def _check_within(pattern: QPPattern, name: str, value: Floats, into: Floats) -> None:
    if value.shape[-2:] != into.shape[1:]:
        value = np.broadcast_to(value, into.shape if value.ndim == into.ndim else into.shape[1:])
    at = pattern.outside(name, value)
    if at is not None:
        *samples, row, column = at
        came = f"{value[at]:g} in row {row}, column {column}" + "".join(f" of sample {i}" for i in samples)
        raise refused(name, "0 outside the pattern", came, "make the pattern of all matrices that may come")


def _fitted(name: str, value: Any, into: Floats) -> Floats:
    """`value` as an array of real numbers that can be assigned to `into`."""
    array: Floats = value if type(value) is np.ndarray else converted(value, name)
    wanted = into.shape
    if not wanted[1] and name in ABSENT:
        raise refused(name, "none, as the solver was made without", shown(array), f"make it with {ABSENT[name]}")
    if array.dtype != into.dtype and not np.can_cast(array.dtype, into.dtype, "same_kind"):
        raise refused(name, "real numbers", array.dtype, f"convert them to {into.dtype}")
    if array.shape != wanted and array.shape != wanted[1:]:
        try:
            np.broadcast_to(array, wanted)
        except ValueError:
            expected, remedy = f"shape {list(wanted)} or {list(wanted[1:])}", "make a QPSolver of the sizes of the data"
            raise refused(name, expected, list(array.shape), remedy) from None
    return array


class _Bound:
    """A graph whose inputs and outputs are arrays of numpy for good; a forked child binds them anew.

    Of one program the graph's kernel is called without onnxruntime.
    """

    def __init__(
        self,
        role: str,
        where: tuple[str, bool | None, int | None],
        inputs: dict[str, Floats],
        outputs: dict[str, Floats],
        seconds: float | None = None,
    ) -> None:
        self._role, self._where, self._seconds = role, where, seconds
        self.elapsed = 0.0  # in the last call, where seconds are limited
        self.inputs, self._outputs = inputs, outputs
        self.direct = False  # whether the kernel is called without onnxruntime
        self.thread = 0  # the one that may call
        self._held: Bound | None = self._bind()
        self.calls = 0
        inherit(self)

    def _bind(self) -> Bound:
        dtype, native, threads = self._where
        session, has_kernel = operator_session(self._role, dtype, native, None, threads)
        alone = has_kernel and len(self.inputs["Q"]) == 1 and self._role in DIRECT
        direct = DIRECT[self._role](self.inputs, self._outputs) if alone else None
        self.direct = direct is not None
        run, held = direct or self._bind_to(session)
        return run if self._seconds is None else functools.partial(self._limited, run, has_kernel), held

    def _bind_to(self, session: Any) -> Bound:
        ort = onnxruntime()
        binding = session.io_binding()
        values = []  # the OrtValues, which do not own the arrays' memory
        for arrays, bind in (
            (self.inputs, binding.bind_ortvalue_input),
            (self._outputs, binding.bind_ortvalue_output),
        ):
            for name, array in arrays.items():
                value = ort.OrtValue.ortvalue_from_numpy(array)
                bind(name, value)
                values.append(value)
        return functools.partial(session.run_with_iobinding, binding), values

    def give_up(self) -> object:
        held, self._held, self.thread = self._held, None, 0
        return held

    def __call__(self) -> None:
        held = self._held
        if held is None:
            held = self._held = self._bind()
        try:
            held[0]()
        except LimitError:
            raise
        except Exception as error:
            raise IcnnrtError(f"qp: onnxruntime failed ({error}); try smaller batches, or native=False.") from error
        self.calls += 1

    def _limited(self, run: Callable[..., None], has_kernel: bool) -> None:
        """Kernels look at the clock themselves."""
        began = time.perf_counter()
        if has_kernel:
            run()
        else:
            assert self._seconds is not None
            stopped_after(self._seconds, run)
        self.elapsed = time.perf_counter() - began


class _DataGradients:
    """The gradients of the data from (d_z, d_λ, d_ν, d_μ), written into memory that is there.

    The formula stands in `icnnrt.mathematics.qp_adjoint.gradients`, which makes arrays of its own; here nothing is
    allocated in a call.
    """

    def __init__(self, d: list[Floats], points: tuple[Floats, ...], out: QPData) -> None:
        (d_z, d_lam, d_nu, d_mu), (z, lam, nu, mu) = d, points
        square, of_G, of_A = (np.zeros_like(M) for M in (out.Q, out.G, out.A))
        products = ((d_z, z, square), (lam, d_z, out.G), (d_lam, z, of_G), (nu, d_z, out.A), (d_nu, z, of_A))
        self.products = [(a[:, :, None], c[:, None], M) for a, c, M in products if M.size]
        sums = (out.Q, square, square.swapaxes(1, 2)), (out.G, out.G, of_G), (out.A, out.A, of_A)
        self.sums = [parts for parts in sums if parts[0].size]
        above, below = ((d_lam, lam, out.h), (d_mu, mu, out.upper)), ((d_lam, lam, out.h_lower), (d_mu, mu, out.lower))
        self.sides: list[Any] = [(*side, np.greater_equal) for side in above if side[-1].size]
        self.sides += [(*side, np.less) for side in below if side[-1].size]
        self.Q, self.negated = out.Q, [(d_nu, out.b)] if d_nu.size else []

    def write(self) -> None:
        for a, c, M in self.products:
            np.multiply(a, c, out=M)
        for total, M, N in self.sums:
            np.add(M, N, out=total)
        np.multiply(self.Q, 0.5, out=self.Q)
        for d, gradient in self.negated:
            np.negative(d, out=gradient)
        for d, multiplier, gradient, beyond in self.sides:
            np.multiply(d, beyond(multiplier, 0.0), out=gradient)
            np.negative(gradient, out=gradient)
