"""On-device fine-tuning with onnxruntime alone: steps of train.onnx, each checked before its weights are used.

One step computes y* = argmin f(x, ·) − H, a loss of y*, the gradient of the loss through the argmin, and the
optimiser's update, all in one graph. Weights of which the proof of f's convexity needs a sign are projected onto it,
there or here, so that a proven energy stays proven; where the proof rests on more than signs, it is repeated for the
new weights (`convexity.grounds`). These become the session's only if the loss, the gradient and they themselves are
finite and the energy is convex; otherwise weights and state are as they were, and the report says why.

What new weights are worth is known once something is computed on them, and that is the next step. Until then they are
on trial:

    θ₀ proven -> step 1 -> θ₁ on trial -> step 2 finds θ₁ sound:    θ₁ proven, θ₂ on trial
                                       -> step 2 finds θ₁ unsound:  back to θ₀, weights and state

Unsound is a loss or gradient that is not finite, an energy that is not convex, or more than `UNSAFE` of the batch left
unsolved, or hidden by rounding, if the proven weights do better on that same batch: a bad batch does not undo a good
step. `check` asks at once; `save`, `write_package` and the end of `fit` ask on the batch of the last step, so what is
kept is proven.
"""

import contextlib
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import alone, batch, finite_rows, flag, integer, number
from icnnrt.errors import InputError, PackageError
from icnnrt.format.checkpoints import KEEP, STATE, WEIGHT, Checkpoint, History, fingerprint_points
from icnnrt.format.fields import strict
from icnnrt.format.manifest import TRAIN_ROLE, TrainingSpec
from icnnrt.format.package import Package, StrPath
from icnnrt.format.signatures import state_of
from icnnrt.limits import call
from icnnrt.mathematics import certificate
from icnnrt.mathematics.domains import MODELS
from icnnrt.mathematics.status import Status
from icnnrt.printable import named
from icnnrt.serving.session import Session
from icnnrt.serving.turns import Turns
from icnnrt.serving.weight_sets import WeightSet, as_used, without_denormals

Floats = NDArray[Any]
Arrays = dict[str, NDArray[Any]]

BATCH_SIZE: Final = 32
LEARNING_RATE: Final = 1e-3
STEP: Final = "state.step"
MAX_INTEGER: Final = 2.0**53  # up to here float64, which targets pass through, holds every integer
# Losses whose targets are values in [0, 1]: where y lies there, and everywhere.
IN_UNIT_BOX: Final = ("squared_error", "binary_cross_entropy", "huber")
CROSS_ENTROPY: Final = ("binary_cross_entropy",)
# Part of a batch that may be unsolved before the step that led there counts as harmful: rates that teach leave none.
UNSAFE: Final = 1 / 8
# Outputs of train.onnx that tell whether weights are sound, all but the gradient, which costs the most.
JUDGED: Final = (
    *("loss", "safe", "y", "lam", "slopes", "offsets", "cut_points"),
    *("energy", "lower_bound", "gap", "residual"),
)
QP_JUDGED: Final = ("loss", "safe", "residual")  # the same of a network of quadratic programs


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    step: int
    """How many steps have been accepted, this one included."""
    accepted: bool
    """Whether weights and state have changed."""
    reason: str
    """Why not; empty if they have."""
    loss: float
    """The loss at the weights before the step, averaged over the samples that were run."""
    gradient_norm: float
    """Euclidean norm of the gradient of all updated weights together, before clipping."""
    samples: int
    """How many samples were run."""
    skipped: int
    """How many were not, because x or target holds NaN or infinity."""
    unsafe: int
    """How many were run but gave no gradient, because a model of theirs was not solved to its tolerance, or rounding
    hides their energy."""
    gap_median: float
    gap_max: float
    """Duality gap of the samples: how far from its minimum the energy of their y* may be."""
    seconds: float
    undone: bool = False
    """Whether the step before was found to have done harm, so that its weights and state are gone again."""
    held: tuple[str, ...] = ()
    """Weights that stayed as they were, as f would not be proven convex with what the step made of them."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for strict JSON: NaN and infinity are None."""
        return dict(strict(asdict(self)))


@dataclass(frozen=True)
class EpochReport:
    """What one pass over the data did."""

    epoch: int
    """From 1."""
    loss: float
    """Mean of the steps' losses, weighted by their samples."""
    validation: float | None
    """Loss on the validation data after the epoch."""
    accepted: int
    """Steps whose weights stayed."""
    refused: int
    """The others, those that were undone among them."""
    skipped: int
    unsafe: int
    rolled_back: bool
    """Whether validation had worsened so much that the last good weights were put back."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for strict JSON: NaN and infinity are None."""
        return dict(strict(asdict(self)))


@dataclass(frozen=True)
class FitReport:
    """What `FineTuner.fit` did."""

    epochs: list[EpochReport] = field(default_factory=list)
    validation_before: float | None = None
    best_epoch: int | None = None
    """The epoch whose weights the session has now: the best by validation, 0 for those before; None without
    validation, which leaves the last ones."""
    stopped: str = ""
    """Why it ended before the last epoch; empty if it did not."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for strict JSON: NaN and infinity are None."""
        return dict(strict(asdict(self)))


class _Verdict(NamedTuple):
    """What a run says of the weights it was made with."""

    broken: str
    """Why no answer of theirs holds; empty if it may."""
    unsafe: float
    """Part of the batch without a gradient to trust, or not solved."""

    @property
    def sound(self) -> bool:
        return not self.broken and self.unsafe <= UNSAFE


class _Stage(NamedTuple):
    """What a tuner knows beside a set of weights. It is noted on the set, so that both change in one operation."""

    owner: "FineTuner"
    state: Arrays
    """The optimiser's; nobody writes into these arrays."""
    trial: "_Trial | None" = None
    """Where the weights come from, as long as nothing has been computed on them; None if they count as proven."""
    undone: int = 0
    """How many steps have been undone."""
    why_undone: str = ""


class _Trial(NamedTuple):
    """Weights come from a step, and nothing has been computed on them yet."""

    weights: WeightSet
    stage: _Stage
    """The proven ones from before that step."""
    unsafe: float
    """The part of that step's batch that they left unsolved."""
    data: Arrays
    """That batch, as the graph is fed with it."""


class FineTuner:
    """Adapts the weights of a session to data, by the train.onnx of its package.

    session:        an open session; whoever else uses it sees each accepted step at their next call, whole
    learning_rate:  of every step that is not given another one
    strict:         refuse samples with NaN or infinity instead of skipping and counting them

    Optimiser state starts at zero. Methods may be called from several threads: steps exclude each other, and runs of
    the session see the weights before a step or after it, never a mixture; while one thread is in `fit`, what others
    ask of the tuner itself waits for its end. One tuner a session: a second one's steps are refused as the weights are
    no longer those it knows.

    The weights that a step produces are looked at by the next step, which undoes the one before if it did harm; `check`
    does so at once, `fit`, `save` and `write_package` before they end or write.

    Raises `InputError` for a package without train.onnx.
    """

    def __init__(self, session: Session, *, learning_rate: float = LEARNING_RATE, strict: bool = False) -> None:
        if not isinstance(session, Session):
            raise InputError(f"session: expected what icnnrt.load returned, but got {type(session).__name__}.")
        spec = session.manifest.train
        if spec is None:
            raise InputError(
                f"session: {session.path.name} has no train.onnx, so it cannot be tuned; export it again with "
                "train=TrainSpec(...), or on the command line by icnnrt export --train squared_error."
            )
        self.session = session
        self.learning_rate = learning_rate
        self.strict = flag(strict, "strict")
        self._spec: TrainingSpec = spec
        self._dtype = session.dtype
        self._runner = session._runner
        self._turns = Turns()
        self._kept = session._kept_convex
        zero = {
            name: np.zeros(tuple(map(int, shape)), dtype)
            for name, (dtype, shape) in state_of(session.manifest, spec).items()
        }
        self._began = self._runner.weights, _Stage(self, zero)
        self._settled = ""  # id of weights on trial that were found sound
        self._qp = session.manifest.kind == "qp"
        self._judged = QP_JUDGED if self._qp else JUDGED
        self._good = self._began
        self._latest = self._began[1]

    # --- What it knows ---------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        """Of every step that is not given another one."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = number(value, "learning_rate", least=0.0)

    @property
    def steps(self) -> int:
        """How many steps have been accepted."""
        return int(self._known().state[STEP])

    @property
    def state(self) -> Mapping[str, NDArray[Any]]:
        """The optimiser's state by name: copies."""
        return {name: array.copy() for name, array in self._known().state.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        raise InputError(
            "tuner: expected what can be pickled, but a FineTuner belongs to the session it tunes; save a checkpoint, "
            "and resume from it in a new one."
        )

    def __repr__(self) -> str:
        return f"<FineTuner of {named(self.session.manifest.name)}: {self._spec.optimizer}, {self.steps} steps>"

    # --- Tuning ----------------------------------------------------------------------------------

    def step(
        self,
        x: object,
        target: object,
        *,
        lower: object = None,
        upper: object = None,
        learning_rate: float | None = None,
    ) -> StepReport:
        """One step on a batch: x [B, *x_shape], target [B, *target_shape], B >= 1; of a box lower and upper too, as
        `Session.argmin` takes them. A sample whose bounds leave nothing is skipped, as one with NaN is.

        Returns a `StepReport`; a step that would harm is refused, not raised: the loss, the gradient or a new weight
        is not finite, the energy is not convex at a sample, or no sample has a gradient to trust. Weights and state
        then are as before, to the bit.

        If the weights it starts from are unsound and those before them are not, the step before did the harm: weights
        and state go back to before that one, the report has `undone`, and its reason says so. So what a step did is
        known at the next one; in a loop of your own, end with `check`, or with `save` or `write_package`, which check.

        Raises `InputError` for wrong shapes or dtypes, no samples, targets outside what the loss takes, and, if strict,
        for NaN or infinity.
        """
        rate = self.learning_rate if learning_rate is None else number(learning_rate, "learning_rate", least=0.0)
        data, skipped = self._data(x, target, "x", "target", lower, upper)
        return self._step(data, rate, skipped)

    def check(self, x: object, target: object, *, lower: object = None, upper: object = None) -> bool:
        """Whether the present weights are sound on a batch, as the next step would find; costs an argmin.

        If not, and the step before is to blame, that step is undone: `steps` is one less, and `step` goes on from the
        weights before it. False with `steps` unchanged means that the earlier weights are no better on this batch.

        Raises what `step` does.
        """
        data, _ = self._data(x, target, "x", "target", lower, upper)
        return self._check(data)[0]

    def fit(
        self,
        x: object,
        target: object,
        *,
        epochs: int,
        lower: object = None,
        upper: object = None,
        batch_size: int = BATCH_SIZE,
        learning_rate: float | None = None,
        validation: tuple[object, ...] | None = None,
        patience: int | None = None,
        worse: float = 0.5,
        seed: int = 0,
        history: StrPath | None = None,
        keep: int = KEEP,
        on_step: Callable[[StepReport], None] = lambda report: None,
        on_epoch: Callable[[EpochReport], None] = lambda report: None,
    ) -> FitReport:
        """Passes over the data in batches drawn anew each time.

        lower, upper: of the samples, for a package whose domain is a box
        validation:  (x, target), or (x, target, lower, upper) of a box, that the loss is measured on after every epoch;
                     then the best weights met are those
                     that stay, the ones from before included
        patience:    stop after so many epochs without a better validation loss
        worse:       roll back to the best weights when validation loss exceeds the best by more than this part of it
        seed:        of the order of the samples
        history:     folder that a checkpoint is saved to after every epoch, and after going back to the best weights at
                     the end; `keep` of them are kept
        on_step, on_epoch:  called with every report; an exception from them, KeyboardInterrupt too, ends the fit
                     between two steps

        Steps that did harm are undone, the last one too: what stays is sound on the last batch, unless an exception
        ends the fit before that is checked. It stops when no step of an epoch has stayed.

        Raises what `step` does, and `OSError` if the history cannot be written: weights and state are then kept in
        memory, so `save` can be called again.
        """
        epochs, batch_size = integer(epochs, "epochs", 1), integer(batch_size, "batch_size", 1)
        patience = None if patience is None else integer(patience, "patience", 1)
        seed = integer(seed, "seed", 0)
        if patience is not None and validation is None:
            raise InputError("patience: expected validation data too, but got none; pass validation=(x, target).")
        worse = number(worse, "worse", above=0.0, finite=False, expected="a positive part of the best loss")
        if validation is not None and (not isinstance(validation, tuple) or len(validation) not in (2, 4)):
            raise InputError(
                "validation: expected a tuple (x, target), but got something else; pass two arrays, or four with lower "
                "and upper for a box."
            )
        rate = self.learning_rate if learning_rate is None else number(learning_rate, "learning_rate", least=0.0)
        data, skipped_rows = self._data(x, target, "x", "target", lower, upper)
        held: Arrays | None = None
        if validation is not None:
            held_x, held_target, *held_bounds = validation
            held = self._data(held_x, held_target, "validation x", "validation target", *held_bounds)[0]
        count = len(data["x"])
        batch_size = min(batch_size, count)
        turn = self._turns.take()
        try:
            self.keep()
            kept = None if history is None else self._history(history, keep)
            before = None if held is None else self._loss(held)
            best, best_epoch = before, None if held is None else 0
            reports: list[EpochReport] = []
            stopped = ""
            order = np.random.default_rng(seed)
            for epoch in range(1, epochs + 1):
                began = time.perf_counter()
                steps: list[StepReport] = []
                accepted = 0
                for rows in np.array_split(order.permutation(count), math.ceil(count / batch_size)):
                    steps.append(self._step({name: a[rows] for name, a in data.items()}, rate, 0))
                    # The step that is undone may be the last of the epoch before, which is reported already.
                    accepted = max(accepted + steps[-1].accepted - steps[-1].undone, 0)
                    on_step(steps[-1])
                reason = steps[-1].reason
                # Where weights may be kept they are looked at; elsewhere the next step does it without another argmin.
                if (held is not None or kept is not None or epoch == epochs) and (undone := self._settle()):
                    accepted, reason = max(accepted - 1, 0), undone
                loss = None if held is None else self._loss(held)
                rolled_back = False
                if loss is not None:
                    assert best is not None
                    if loss < best or not math.isfinite(best):
                        best, best_epoch = loss, epoch
                        self.keep()
                    elif not loss <= best + worse * abs(best):
                        self.rollback()
                        rolled_back = True
                report = EpochReport(
                    epoch=epoch,
                    loss=_mean([s.loss for s in steps], [s.samples for s in steps]),
                    validation=loss,
                    accepted=accepted,
                    refused=len(steps) - accepted,
                    skipped=skipped_rows,
                    unsafe=sum(s.unsafe for s in steps),
                    rolled_back=rolled_back,
                    seconds=time.perf_counter() - began,
                )
                reports.append(report)
                if kept is not None:  # the figures are those of the weights that the session has now
                    figures = {
                        "validation": best if rolled_back else loss,
                        "loss": None if rolled_back else report.loss,
                    }
                    self._save(kept, figures)
                on_epoch(report)
                if not report.accepted:
                    stopped = f"no step of epoch {epoch} was accepted: {reason}"
                    break
                if patience is not None and best_epoch is not None and epoch - best_epoch >= patience:
                    stopped = f"validation has not improved for {patience} epochs"
                    break
            self._settle()
            if best is not None and best_epoch != len(reports):
                self.rollback()
                if kept is not None:  # the last checkpoint is what the session has
                    self._save(kept, {"validation": best})
            return FitReport(reports, before, best_epoch, stopped)
        finally:
            turn.end()

    def loss(self, x: object, target: object, *, lower: object = None, upper: object = None) -> float:
        """The loss at the present weights: nothing is changed. NaN where it is not finite."""
        return self._loss(self._data(x, target, "x", "target", lower, upper)[0])

    # --- Going back ------------------------------------------------------------------------------

    def keep(self) -> None:
        """Declare the present weights and state good: what `rollback` returns to."""
        self._good = self._now()

    def rollback(self) -> None:
        """Put back the weights and state that were last declared good: by `keep`, by `resume`, by an epoch of `fit`
        that was the best so far; at first those that the tuner began with."""
        turn = self._turns.take()
        try:
            weights, stage = self._good
            self._commit(self._moved(weights), stage)
        finally:
            turn.end()

    # --- On the disk -----------------------------------------------------------------------------

    def save(self, history: StrPath, *, keep: int = KEEP, figures: Mapping[str, float] | None = None) -> Checkpoint:
        """Save weights and state as a checkpoint into the folder `history`, whole or not at all.

        Of its checkpoints, `keep` are kept. Resuming from one is the same, to the bit, as never having stopped. Weights
        that nothing was computed on yet are checked first, and the step that led to them undone if it did harm.

        Raises `OSError` if the disk refuses, as when it is full; what is in memory stays, so call again when there is
        room. Raises `InputError` if the folder's checkpoints are of another network.
        """
        if figures is not None and not isinstance(figures, Mapping):
            raise InputError(f"figures: expected numbers by name, but got {type(figures).__name__}.")
        turn = self._turns.take()
        try:
            self._settle()
            return self._save(self._history(history, keep), figures or {})
        finally:
            turn.end()

    def resume(self, history: StrPath, *, step: int | None = None) -> Checkpoint:
        """Continue from a checkpoint: the last one saved, or that of a step.

        Raises `InputError` if there is none or it is of another network, `PackageError` if it is damaged; then nothing
        has changed.
        """
        step = None if step is None else integer(step, "step", 0)
        found = History(history, self.session.manifest)
        if not found.folder.exists():
            raise InputError(
                f"history: expected a folder of checkpoints, but there is no folder {found.folder}; check the path, or "
                "call save first."
            )
        fitting = [c for c in found.checkpoints if step in (None, c.step)]
        if not fitting:
            there = ", ".join(str(c.step) for c in found.checkpoints) or "none"
            raise InputError(
                f"history: expected a checkpoint{'' if step is None else f' of step {step}'} in {found.folder}, but "
                f"its checkpoints are of steps {there}; call save first."
            )
        checkpoint = fitting[-1]
        weights, state = self._restored(found, checkpoint)
        turn = self._turns.take()
        try:
            self._good = self._commit(weights, self._stage()._replace(state=state, trial=None))
        finally:
            turn.end()
        return checkpoint

    def write_package(self, path: StrPath, *, overwrite: bool = False) -> Package:
        """Write the package with the present weights to `path`; `Package.save` says what holds if interrupted.

        How many steps it was tuned by is noted in its metadata, and whether the energy is still proven convex. The
        optimiser's state is not part of a package. As with `save`, a last step that did harm is undone first.
        Raises `OSError` if the disk refuses; what is in memory stays, as with `save`.
        """
        turn = self._turns.take()
        try:
            self._settle()
            package = self.session._package
            metadata = {**package.manifest.metadata, "tuned_steps": self.steps}
            try:
                return package.save(
                    path,
                    weights=dict(self.session.weights),
                    metadata=metadata,
                    convexity=None if self._qp else self.session.prove_convexity(),
                    overwrite=overwrite,
                )
            except OSError as error:
                error.add_note(
                    f"{path} is not written; weights and state are still in memory, so make room or choose another "
                    "folder and call write_package again."
                )
                raise
        finally:
            turn.end()

    # --- How -------------------------------------------------------------------------------------

    def _data(
        self, x: object, target: object, x_name: str, target_name: str, lower: object = None, upper: object = None
    ) -> tuple[Arrays, int]:
        """What train.onnx takes of finite samples, by name, and how many others there were."""
        manifest, spec = self.session.manifest, self._spec
        X = batch(x, x_name, self._dtype, manifest.x_shape)
        integers = spec.target_dtype == "int64"
        T = batch(target, target_name, "float64" if integers else spec.target_dtype, spec.target_shape, length=len(X))
        if not len(X):
            raise InputError(f"{x_name}: expected at least one sample, but got none.")
        bounds = self.session._bounds(len(X), lower, upper)
        finite = np.logical_and.reduce([finite_rows(a) for a in (X, T, *bounds.values())])
        if bounds:  # NaN is told before
            finite &= (bounds["lower"] <= bounds["upper"]).all(1)
        if self.strict and not finite.all():
            raise InputError(
                f"{x_name}, {target_name}: expected finite numbers, but sample {int(np.argmin(finite))} holds NaN or "
                "infinity; clean it, or pass strict=False to skip such samples."
            )
        if not finite.any():
            raise InputError(
                f"{x_name}, {target_name}: expected finite numbers, but every sample holds NaN or infinity; clean them."
            )
        skipped = int((~finite).sum())
        if skipped:
            X, T, bounds = X[finite], T[finite], {name: a[finite] for name, a in bounds.items()}
        if integers:
            if (np.rint(T) != T).any() or (np.abs(T) > MAX_INTEGER).any():
                raise InputError(
                    f"{target_name}: expected integers, as the package's loss takes, but got others; round them."
                )
            T = T.astype(np.int64)
        inside = IN_UNIT_BOX if manifest.domain and manifest.domain.kind in ("unit_box", "simplex") else CROSS_ENTROPY
        if spec.loss in inside and T.size and not (T.min() >= 0 and T.max() <= 1):
            sample = int(np.argmax(((T < 0) | (T > 1)).reshape(len(T), -1).any(1)))
            raise InputError(
                f"{target_name}: expected numbers in [0, 1], where y lies, but finite sample {sample} holds "
                f"{float(T[sample].min()):g} to {float(T[sample].max()):g}; scale the targets as in training."
            )
        return {"x": X, "target": T, **bounds}, skipped

    def _step(self, data: Arrays, rate: float, skipped: int) -> StepReport:
        began = time.perf_counter()
        turn = self._turns.take()
        try:
            weights, stage = now = self._now()
            out = self._run(data, rate, weights, stage.state)
            status, trusted = self._judge(out, data, weights)
            verdict = self._verdict(out, status, trusted)
            reason = self._undo_if_guilty(now, verdict, data)
            held: tuple[str, ...] = ()
            undone = bool(reason)
            if not undone:
                new = {name: out[f"new.{name}"] for name in self._spec.weights}
                # The graph projects too, but for signs that were not known when it was exported.
                self._kept.project(new)
                held = self._hold(new, weights)
                reason = self._refusal(out, status, new)
            if not reason:
                state = {name: out[f"new.{name}"] for name in stage.state}
                before = _Trial(weights.alone(), stage._replace(trial=None), verdict.unsafe, data)
                self._commit(new, stage._replace(state=state, trial=before))
            elif not undone and verdict.sound:
                self._settled = weights.id  # what is refused are the new weights; those before them are proven
            # Of a quadratic program the gap is relative, and there is none where there is no solution.
            gap = out["residual"][out["safe"], 2] if self._qp else out["gap"]
            gap = gap if gap.size else np.array([math.nan])
            return StepReport(
                step=self.steps,
                accepted=not reason,
                reason=reason,
                loss=float(out["loss"]),
                gradient_norm=float(out["gradient_norm"]),
                samples=len(data["x"]),
                skipped=skipped,
                unsafe=int((~out["safe"]).sum()),
                gap_median=float(np.median(gap)),
                gap_max=float(gap.max()),
                seconds=time.perf_counter() - began,
                undone=undone,
                held=held,
            )
        finally:
            turn.end()

    def _hold(self, new: Arrays, weights: WeightSet) -> tuple[str, ...]:
        """Leave weights as they are whose values the proof rests on, if it fails with the new ones; their names."""
        if not all(np.isfinite(array).all() for array in new.values()):
            return ()
        if not call(self.session._limits, self._kept.lost_proof, new, weights.arrays):
            return ()
        held = tuple(name for name in self._kept.values if name in new)
        new.update({name: weights.arrays[name] for name in held})
        return held

    def _check(self, data: Arrays) -> tuple[bool, str]:
        """Whether the present weights are sound on a batch, and why the step before is undone, if it is as they are
        not."""
        turn = self._turns.take()
        try:
            weights, stage = now = self._now()
            out = self._run(data, 0.0, weights, stage.state, only=self._judged)
            verdict = self._verdict(out, *self._judge(out, data, weights))
            if verdict.sound:
                self._settled = weights.id
            return verdict.sound, self._undo_if_guilty(now, verdict, data, only=self._judged)
        finally:
            turn.end()

    def _settle(self) -> str:
        """Check weights that are on trial; why the step that led to them is undone, empty if it is not."""
        turn = self._turns.take()
        try:
            weights, stage = self._now()
            if stage.trial is None:
                return ""
            undone = self._check(stage.trial.data)[1]
            if not undone:
                self._settled = weights.id
            return undone
        finally:
            turn.end()

    def _undo_if_guilty(
        self, now: tuple[WeightSet, _Stage], found: _Verdict, data: Arrays, only: tuple[str, ...] | None = None
    ) -> str:
        """Go back to the proven weights and state if, on the same batch, they are sound where the present ones are not,
        and return why; empty if they stay.

        The proven ones are run only where that may be so.
        """
        trial = now[1].trial
        if trial is None or found.sound or not (found.broken or found.unsafe > trial.unsafe):
            return ""
        out = self._run(data, 0.0, trial.weights, trial.stage.state, only=only)
        then = self._verdict(out, *self._judge(out, data, trial.weights))
        # A package whose samples are hard throughout is not judged by how many are unsolved, but by how many more.
        if then.broken or not (found.broken or then.sound or found.unsafe > then.unsafe + UNSAFE):
            return ""
        what = found.broken or f"{found.unsafe:.0%} of the batch is not solved to the tolerance any more"
        why = f"the step before did harm, so it is undone: {what}; lower the learning rate"
        proven = trial.stage._replace(undone=now[1].undone + 1, why_undone=why)
        self._commit(self._moved(trial.weights), proven)
        return why

    def _run(
        self,
        data: Arrays,
        rate: float,
        weights: WeightSet,
        state: Arrays,
        only: tuple[str, ...] | None = None,
    ) -> Arrays:
        feeds = {**data, "learning_rate": np.array(rate, self._dtype), **state}
        return self._runner.run(TRAIN_ROLE, feeds, weights=weights, only=only)[0]

    def _loss(self, data: Arrays, size: int = 256) -> float:
        """By the part of the same graph that the loss needs."""
        weights, stage = self._now()
        starts = range(0, len(data["x"]), size)
        parts = [{name: a[i : i + size] for name, a in data.items()} for i in starts]
        losses = [float(self._run(part, 0.0, weights, stage.state, only=("loss",))["loss"]) for part in parts]
        return _mean(losses, [len(part["x"]) for part in parts])

    def _judge(self, out: Arrays, data: Arrays, weights: WeightSet) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        """The status of every sample, and which of them have a gradient to trust."""
        if self._qp:
            return np.where(out["safe"], np.int8(Status.CONVERGED), np.int8(Status.SOLVER)), out["safe"]
        manifest = self.session.manifest
        assert manifest.solver is not None, "there is no training graph without a solver"
        assert manifest.domain is not None, "a solver has a domain"
        status, doubt = certificate.judge(
            np.ones(len(out["gap"]), bool),
            out,
            certificate.Tolerances(manifest.solver.gap_tolerance, manifest.solver.residual_tolerance),
            MODELS[manifest.domain.kind],
            data.get("lower"),
            data.get("upper"),
            proven=self.session._is_proven(weights.id),
        )
        return status, out["safe"] & certificate.differentiable(status, doubt, out["lower_bound"])

    def _verdict(self, out: Arrays, status: NDArray[np.int8], trusted: NDArray[np.bool_]) -> _Verdict:
        """On the weights that were run; the new ones are not looked at."""
        broken = ""
        if not math.isfinite(out["loss"]) and not (self._qp and not out["safe"].any()):
            broken = f"the loss is {float(out['loss'])}"
        elif "gradient_norm" in out and not math.isfinite(out["gradient_norm"]):
            broken = "the gradient is not finite"
        elif (status == Status.NOT_CONVEX).any():
            broken = f"the energy is not convex at sample {int(np.argmax(status == Status.NOT_CONVEX))}"
        return _Verdict(broken, float((~trusted).mean()))

    def _refusal(self, out: Arrays, status: NDArray[np.int8], new: Arrays) -> str:
        """Why the new weights must not be used; empty if they may."""
        if self._qp and not out["safe"].any():
            remedy = "loosen the constraints that x asks for, if they contradict each other"
            if self.steps:
                remedy += ", or lower the learning rate and start anew, if the steps led here"
            return f"no sample has a quadratic program with a solution, so there is no gradient; {remedy}"
        if not math.isfinite(out["loss"]):
            where = np.flatnonzero(status == Status.NOT_FINITE)
            which = f" (sample {where[0]} is NOT_FINITE)" if where.size else ""
            return f"the loss is {float(out['loss'])}{which}; leave the sample out, or lower the learning rate"
        if not math.isfinite(out["gradient_norm"]):
            return "the gradient is not finite; lower the learning rate, or export with clip_norm"
        if (status == Status.NOT_CONVEX).any():
            sample = int(np.argmax(status == Status.NOT_CONVEX))
            return f"the energy is not convex at sample {sample}, so no answer holds; roll back, or repair the package"
        if not out["safe"].any():
            # Weights that were never moved are the export's; others are where the steps have led.
            remedy = "lower the learning rate and start anew" if self.steps else "export more steps"
            return f"no sample was solved to the residual tolerance, so there is no gradient to trust; {remedy}"
        if not out["accepted"]:
            return "a new weight is not finite; lower the learning rate"
        if fault := self._kept.sign_fault(new):
            return f"f would no longer be known to be convex: {fault}; lower the learning rate"
        return ""

    def _now(self) -> tuple[WeightSet, _Stage]:
        """The present weights, and what is known beside them."""
        weights = self._runner.weights
        stage = weights.note
        if weights is self._began[0]:
            stage = self._began[1]
        if not isinstance(stage, _Stage) or stage.owner is not self:
            raise InputError(
                "session: expected the weights that this tuner left it with, but something else has changed them; use "
                "one tuner a session, or make a new one."
            )
        return weights, stage._replace(trial=None) if weights.id == self._settled else stage

    def _stage(self) -> _Stage:
        return self._now()[1]

    def _known(self) -> _Stage:
        """The same; where something else has changed the weights, what was known before."""
        stage = self._runner.weights.note
        return stage if isinstance(stage, _Stage) and stage.owner is self else self._latest

    def _moved(self, weights: WeightSet) -> Arrays:
        """Those of the weights that steps change."""
        return {name: weights.arrays[name] for name in self._spec.weights}

    def _take(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Weights from elsewhere, with the optimiser's state as it is; they are what `rollback` returns to."""
        turn = self._turns.take()
        try:
            self._good = self._commit(weights, self._stage()._replace(trial=None))
        finally:
            turn.end()

    def _commit(self, weights: Mapping[str, NDArray[Any]], stage: _Stage) -> tuple[WeightSet, _Stage]:
        """Give the session these weights, and note what is known beside them, in one operation."""
        now, _ = self._now()
        stage = stage._replace(state={name: without_denormals(array) for name, array in stage.state.items()})
        made = self._runner.update_weights(weights, made_with=now.id, note=stage)
        self._latest = stage
        return made, stage

    def _save(self, history: History, figures: Mapping[str, float | None]) -> Checkpoint:
        numbers = {name: None if value is None else alone(value) for name, value in figures.items()}
        lost = [name for name, one in numbers.items() if isinstance(one, float) and not math.isfinite(one)]
        finite = {name: value for name, value in figures.items() if value is not None and name not in lost}
        try:
            weights, stage = self._now()
            return history.save(self.steps, weights.arrays, stage.state, finite, self._fingerprint(weights))
        except OSError as error:
            error.add_note(
                f"Step {self.steps} is not saved in {history.folder}; weights and state are still in memory, so make "
                "room or choose another folder and call save again."
            )
            raise

    def _history(self, folder: StrPath, keep: int) -> History:
        """The history in a folder, to save to: of this network, as far as its last checkpoint tells."""
        history = History.to_write(folder, self.session.manifest, keep)
        if history.checkpoints:
            with contextlib.suppress(PackageError):  # a damaged one is no reason not to save another
                self._restored(history, history.checkpoints[-1])
        return history

    def _restored(self, history: History, checkpoint: Checkpoint) -> tuple[Arrays, Arrays]:
        """The weights and the state of a checkpoint, after checking that they are of this network."""
        tensors = history.load(checkpoint)
        weights = {n.removeprefix(WEIGHT): a for n, a in tensors.items() if n.startswith(WEIGHT)}
        state = {n: a for n, a in tensors.items() if n.startswith(STATE)}
        self._check_restored(history.folder / checkpoint.file, weights, state, len(tensors), checkpoint.step)
        there = WeightSet({name: as_used(array) for name, array in weights.items()}, secrets.token_hex(8))
        history.check(checkpoint, self._fingerprint(there))
        return weights, state

    def _fingerprint(self, weights: WeightSet) -> list[float | None]:
        """What the network gives at a few points with these weights, see `icnnrt.format.checkpoints`."""
        if self._qp:
            return []
        feeds = fingerprint_points(self.session.manifest)
        found = self._runner.run("value", feeds, weights=weights, only=("f",))[0]["f"]
        return [value if math.isfinite(value) else None for value in found.tolist()]

    def _check_restored(self, path: Path, weights: Arrays, state: Arrays, count: int, step: int) -> None:
        """Refuse tensors that are not exactly the session's weights and this optimiser's state."""
        tensors = self.session.manifest.weights.tensors
        expected = {name: (spec.shape, spec.dtype) for name, spec in tensors.items()}
        expected |= {name: (a.shape, a.dtype.name) for name, a in self._stage().state.items()}
        came = {name: (a.shape, a.dtype.name) for name, a in (weights | state).items()}
        if came != expected or count != len(expected):
            odd = sorted(json.dumps(n) for n in expected.keys() ^ came.keys()) or ["shapes or dtypes"]
            raise PackageError(
                f"{path}: expected the weights and the optimiser state of this package, but {odd[0]} differ; give the "
                "history of this package."
            )
        for name, array in (weights | state).items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise PackageError(f"{path}: {named(name)} holds NaN or infinity; resume from another checkpoint.")
        present = self._runner.weights.arrays
        for name in weights.keys() - set(self._spec.weights):
            if not np.array_equal(as_used(weights[name]), present[name], equal_nan=True):
                raise PackageError(
                    f"{path}: expected {named(name)}, which is not trained, to be that of this package, but it is "
                    "another; resume with the package that it was saved by."
                )
        if fault := call(self.session._limits, self._kept.fault, weights, {}):
            raise PackageError(
                f"{path}: {fault}, and the energy would no longer be known to be convex; "
                "resume from another checkpoint."
            )
        if state[STEP] != step:
            raise PackageError(
                f"{path}: expected the state of step {step}, as the history has it, but it is of step "
                f"{int(state[STEP])}; resume from another checkpoint."
            )


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
