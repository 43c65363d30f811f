"""On-device fine-tuning with onnxruntime alone: steps of train.onnx, each checked before its weights are used.

One step computes y* = argmin f(x, ·) − H, a loss of y*, the gradient of the loss through the argmin, and the
optimiser's update, all in one graph. Weights of which the proof of f's convexity needs a sign are projected onto it,
there (`projected` of `icnnrt_exporters.assembly.train_graph`) or here (`KeptConvex.project` of
`icnnrt.serving.kept_convex`), so that a proven energy stays proven; where the proof rests on more than signs, it is
repeated for the new weights (`convexity.grounds`). These become the session's only if the loss, the gradient and they
themselves are finite and the energy is convex; otherwise weights and state are as they were, and the report says why.

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
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import flag, instance, integer, number, refused, shown
from icnnrt.errors import InputError, PackageError
from icnnrt.format.checkpoints import KEEP, Checkpoint, History
from icnnrt.format.folder import StrPath
from icnnrt.format.manifest import TrainingSpec
from icnnrt.format.package import Package
from icnnrt.format.signatures import NEW, TRAIN_ROLE, state_of
from icnnrt.limits import call
from icnnrt.printable import named
from icnnrt.serving.load import AnySession
from icnnrt.serving.session import Session
from icnnrt.serving.turns import Turns
from icnnrt.serving.weight_sets import WeightSet, without_denormals
from icnnrt.tuning.checkpointing import STEP, checkpoint_of, restored, saved
from icnnrt.tuning.epochs import Epochs, mean
from icnnrt.tuning.given import new_weights, samples
from icnnrt.tuning.judges import UNSAFE, Verdict, judge_of
from icnnrt.tuning.reports import EpochReport, FitReport, StepReport

Arrays = dict[str, NDArray[Any]]

BATCH_SIZE: Final = 32
LEARNING_RATE: Final = 1e-3
LOSS_BATCH: Final = 256  # samples whose loss is computed at once


class _Stage(NamedTuple):
    """What is known beside a set of weights. It is noted on the set, so that both change in one operation."""

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


Method = TypeVar("Method", bound=Callable[..., Any])


def _in_turn(method: Method) -> Method:
    """A method that one thread runs at a time, of all of these of an object; each may call others."""

    @functools.wraps(method)
    def taken(self: Any, *args: Any, **keywords: Any) -> Any:
        turn = self._turns.take()
        try:
            return method(self, *args, **keywords)
        finally:
            turn.end()

    return cast(Method, taken)


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

    def __init__(self, session: AnySession, *, learning_rate: float = LEARNING_RATE, strict: bool = False) -> None:
        instance(session, "session", Session, "what icnnrt.load returned")
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
        self._runner = session.runner
        self._turns = Turns()
        self._kept = session.convexity.kept
        self._judge = judge_of(session)
        zero = {
            name: np.zeros(tuple(map(int, shape)), dtype)
            for name, (dtype, shape) in state_of(session.manifest, spec).items()
        }
        self._began = self._runner.weights, _Stage(self, zero)
        self._settled = ""  # id of weights on trial that were found sound
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

    @property
    def undone(self) -> int:
        """How many steps were found to have done harm, and undone."""
        return self._known().undone

    @property
    def why_undone(self) -> str:
        """Why the last of these was; empty if there were none."""
        return self._known().why_undone

    def __reduce__(self) -> tuple[Any, ...]:
        came = "a FineTuner, which belongs to the session it tunes"
        raise refused("tuner", "what can be pickled", came, "save a checkpoint, and resume from it in a new one")

    def __repr__(self) -> str:
        optimizer = self._spec.optimizer
        return f"<FineTuner of {named(self.session.manifest.name)}: {optimizer}, {self.steps} steps>"

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
        `EnergySession.argmin` takes them. A sample whose bounds leave nothing is skipped, as one with NaN is.

        Returns a `StepReport`; a step that would harm is refused, not raised: the loss, the gradient or a new weight
        is not finite, the energy is not convex at a sample, or no sample has a gradient to trust. Weights and state
        then are as before, to the bit.

        If the weights it starts from are unsound and those before them are not, the step before did the harm: weights
        and state go back to before that one, the report has `undone`, and its reason says so. So what a step did is
        known at the next one; in a loop of your own, end with `check`, or with `save` or `write_package`, which check.

        Raises `InputError` for wrong shapes or dtypes, no samples, targets outside what the loss takes, and, if strict,
        for NaN or infinity.
        """
        rate = self._rate(learning_rate)
        data, skipped = self._samples(x, target, lower, upper)
        return self._step(data, rate, skipped)

    def check(self, x: object, target: object, *, lower: object = None, upper: object = None) -> bool:
        """Whether the present weights are sound on a batch, as the next step would find; costs an argmin.

        If not, and the step before is to blame, that step is undone: `steps` is one less, and `step` goes on from the
        weights before it. False with `steps` unchanged means that the earlier weights are no better on this batch.

        Raises what `step` does.
        """
        return self._check(self._samples(x, target, lower, upper)[0])[0]

    @_in_turn
    def settle(self) -> str:
        """Check weights that come from a step, on the batch of that step, as `save` does.

        Returns why the step is undone; empty if it is not, or if they were checked already.
        """
        weights, stage = self._now()
        if stage.trial is None:
            return ""
        undone = self._check(stage.trial.data)[1]
        if not undone:
            self._settled = weights.id
        return undone

    @_in_turn
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
                     then the best weights met are those that stay, the ones from before included
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
            raise refused("patience", "validation data too", "none", "pass validation=(x, target)")
        worse = number(worse, "worse", above=0.0, finite=False, expected="a positive part of the best loss")
        if validation is not None and (not isinstance(validation, tuple) or len(validation) not in (2, 4)):
            remedy = "pass two arrays, or four with lower and upper for a box"
            raise refused("validation", "a tuple (x, target)", shown(validation), remedy)
        rate = self._rate(learning_rate)
        data, skipped = self._samples(x, target, lower, upper)
        held = None
        if validation is not None:
            held_x, held_target, *held_bounds = validation
            held = self._samples(held_x, held_target, *held_bounds, of="validation ")[0]
        fitting = Epochs(
            self,
            step=lambda data: self._step(data, rate, 0),
            loss=self._loss,
            save=None if history is None else functools.partial(self._save, self._history(history, keep)),
            data=data,
            skipped=skipped,
            held=held,
            batch_size=min(batch_size, len(data["x"])),
            patience=patience,
            worse=worse,
            order=np.random.default_rng(seed),
            on_step=on_step,
            on_epoch=on_epoch,
        )
        return fitting.run(epochs)

    def loss(self, x: object, target: object, *, lower: object = None, upper: object = None) -> float:
        """The loss at the present weights: nothing is changed. NaN where it is not finite."""
        return self._loss(self._samples(x, target, lower, upper)[0])

    # --- Going back ------------------------------------------------------------------------------

    def keep(self) -> None:
        """Declare the present weights and state good: what `rollback` returns to."""
        self._good = self._now()

    @_in_turn
    def rollback(self) -> None:
        """Put back the weights and state that were last declared good: by `keep`, by `resume`, by an epoch of `fit`
        that was the best so far; at first those that the tuner began with."""
        weights, stage = self._good
        self._commit(self._moved(weights), stage)

    @_in_turn
    def set_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take new values for some weights or all, whole or not at all, see `icnnrt.federated.set_weights`.

        The optimiser's state stays, and what was set is what `rollback` returns to.
        """
        # In turn, or a step in between would change what the rest of the weights is.
        self._good = self._commit(
            new_weights(self.session, weights, self._runner.weights), self._now()[1]._replace(trial=None)
        )

    # --- On the disk -----------------------------------------------------------------------------

    @_in_turn
    def save(self, history: StrPath, *, keep: int = KEEP, figures: Mapping[str, float] | None = None) -> Checkpoint:
        """Save weights and state as a checkpoint into the folder `history`, whole or not at all.

        Of its checkpoints, `keep` are kept. Resuming from one is the same, to the bit, as never having stopped. Weights
        that nothing was computed on yet are checked first, and the step that led to them undone if it did harm.

        Raises `OSError` if the disk refuses, as when it is full; what is in memory stays, so call again when there is
        room. Raises `InputError` if the folder's checkpoints are of another network.
        """
        if figures is not None:
            instance(figures, "figures", Mapping, "numbers by name")
        self.settle()
        return self._save(self._history(history, keep), figures or {})

    @_in_turn
    def resume(self, history: StrPath, *, step: int | None = None) -> Checkpoint:
        """Continue from a checkpoint: the last one saved, or that of a step.

        Raises `InputError` if there is none or it is of another network, `PackageError` if it is damaged; then nothing
        has changed.
        """
        step = None if step is None else integer(step, "step", 0)
        found = History(history, self.session.manifest)
        checkpoint = checkpoint_of(found, step)
        weights, state = restored(self.session, self._spec, self._now()[1].state, found, checkpoint)
        self._good = self._commit(weights, self._now()[1]._replace(state=state, trial=None))
        return checkpoint

    @_in_turn
    def write_package(self, path: StrPath, *, overwrite: bool = False) -> Package:
        """Write the package with the present weights to `path`; `Package.save` says what holds if interrupted.

        How many steps it was tuned by is noted in its metadata, and whether the energy is still proven convex. The
        optimiser's state is not part of a package. As with `save`, a last step that did harm is undone first.
        Raises `OSError` if the disk refuses; what is in memory stays, as with `save`.
        """
        self.settle()
        package, session = self.session.package, self.session
        try:
            return package.save(
                path,
                weights=dict(session.weights),
                metadata={**package.manifest.metadata, "tuned_steps": self.steps},
                convexity=None if package.manifest.kind == "qp" else session.prove_convexity(),
                overwrite=overwrite,
            )
        except OSError as error:
            error.add_note(
                f"{path} is not written; weights and state are still in memory, so make room or choose another "
                "folder and call write_package again."
            )
            raise

    # --- How -------------------------------------------------------------------------------------

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

    def _known(self) -> _Stage:
        """What is known now; where something else has changed the weights, what was known before."""
        stage = self._runner.weights.note
        return stage if isinstance(stage, _Stage) and stage.owner is self else self._latest

    @_in_turn
    def _step(self, data: Arrays, rate: float, skipped: int) -> StepReport:
        """`step`, of data from which so many samples were `skipped`."""
        began = time.perf_counter()
        weights, stage = now = self._now()
        out = self._run(data, rate, weights, stage.state)
        verdict = self._judge.verdict(out, data, weights)
        reason = self._undo_if_guilty(now, verdict, data)
        held: tuple[str, ...] = ()
        undone = bool(reason)
        if not undone:
            new = {name: out[f"{NEW}{name}"] for name in self._spec.weights}
            # The graph projects too, but for signs that were not known when it was exported.
            self._kept.project(new)
            held = self._hold(new, weights)
            reason = self._refusal(out, verdict, new)
        if not reason:
            state = {name: out[f"{NEW}{name}"] for name in stage.state}
            before = _Trial(weights.alone(), stage._replace(trial=None), verdict.unsafe, data)
            self._commit(new, stage._replace(state=state, trial=before))
        elif not undone and verdict.sound:
            self._settled = weights.id  # what is refused are the new weights; those before them are proven
        gaps = self._judge.gaps(out)
        return StepReport(
            step=self.steps,
            accepted=not reason,
            reason=reason,
            loss=float(out["loss"]),
            gradient_norm=float(out["gradient_norm"]),
            samples=len(data["x"]),
            skipped=skipped,
            unsafe=int((~out["safe"]).sum()),
            gap_median=float(np.median(gaps)) if gaps.size else math.nan,
            gap_max=float(gaps.max()) if gaps.size else math.nan,
            seconds=time.perf_counter() - began,
            undone=undone,
            held=held,
        )

    def _run(
        self, data: Arrays, rate: float, weights: WeightSet, state: Arrays, only: tuple[str, ...] | None = None
    ) -> Arrays:
        feeds = {**data, "learning_rate": np.array(rate, self.session.dtype), **state}
        return self._runner.run(TRAIN_ROLE, feeds, weights=weights, only=only)[0]

    def _hold(self, new: Arrays, weights: WeightSet) -> tuple[str, ...]:
        """Leave weights as they are whose values the proof rests on, if it fails with the new ones; their names."""
        if not all(np.isfinite(array).all() for array in new.values()):
            return ()
        if not call(self.session.limits, self._kept.lost_proof, new, weights.arrays):
            return ()
        held = tuple(name for name in self._kept.values if name in new)
        new.update({name: weights.arrays[name] for name in held})
        return held

    def _refusal(self, out: Arrays, verdict: Verdict, new: Arrays) -> str:
        """Why the new weights must not be used; empty if they may."""
        if verdict.broken:
            return f"{verdict.broken}; {verdict.remedy}"
        if not out["safe"].any():
            return self._judge.unsolved(moved=self.steps > 0)
        if not out["accepted"]:
            return "a new weight is not finite; lower the learning rate"
        if fault := self._kept.sign_fault(new):
            return f"f would no longer be known to be convex: {fault}; lower the learning rate"
        return ""

    def _commit(self, weights: Mapping[str, NDArray[Any]], stage: _Stage) -> tuple[WeightSet, _Stage]:
        """Give the session these weights, and note what is known beside them, in one operation."""
        now, _ = self._now()
        stage = stage._replace(state={name: without_denormals(array) for name, array in stage.state.items()})
        made = self._runner.update_weights(weights, made_with=now.id, note=stage)
        self._latest = stage
        return made, stage

    @_in_turn
    def _check(self, data: Arrays) -> tuple[bool, str]:
        """Whether the present weights are sound on a batch, and why the step before is undone, if it is as they are
        not."""
        weights, stage = now = self._now()
        out = self._run(data, 0.0, weights, stage.state, only=self._judge.outputs)
        verdict = self._judge.verdict(out, data, weights)
        if verdict.sound:
            self._settled = weights.id
        return verdict.sound, self._undo_if_guilty(now, verdict, data, only=self._judge.outputs)

    def _undo_if_guilty(
        self, now: tuple[WeightSet, _Stage], found: Verdict, data: Arrays, only: tuple[str, ...] | None = None
    ) -> str:
        """Go back to the proven weights and state if, on the same batch, they are sound where the present ones are not,
        and return why; empty if they stay.

        The proven ones are run only where that may be so.
        """
        trial = now[1].trial
        if trial is None or found.sound or not (found.broken or found.unsafe > trial.unsafe):
            return ""
        out = self._run(data, 0.0, trial.weights, trial.stage.state, only=only)
        then = self._judge.verdict(out, data, trial.weights)
        # A package whose samples are hard throughout is not judged by how many are unsolved, but by how many more.
        if then.broken or not (found.broken or then.sound or found.unsafe > then.unsafe + UNSAFE):
            return ""
        what = found.broken or f"{found.unsafe:.0%} of the batch is not solved to the tolerance any more"
        why = f"the step before did harm, so it is undone: {what}; lower the learning rate"
        proven = trial.stage._replace(undone=now[1].undone + 1, why_undone=why)
        self._commit(self._moved(trial.weights), proven)
        return why

    def _moved(self, weights: WeightSet) -> Arrays:
        """Those of the weights that steps change."""
        return {name: weights.arrays[name] for name in self._spec.weights}

    def _loss(self, data: Arrays) -> float:
        """By the part of the graph that the loss needs."""
        weights, stage = self._now()
        starts = range(0, len(data["x"]), LOSS_BATCH)
        parts = [{name: a[i : i + LOSS_BATCH] for name, a in data.items()} for i in starts]
        losses = [float(self._run(part, 0.0, weights, stage.state, only=("loss",))["loss"]) for part in parts]
        return mean(losses, [len(part["x"]) for part in parts])

    def _save(self, history: History, figures: Mapping[str, float | None]) -> Checkpoint:
        weights, stage = self._now()
        return saved(self.session, history, self.steps, weights, stage.state, figures)

    def _history(self, folder: StrPath, keep: int) -> History:
        """The history in a folder, to save to: of this network, as far as its last checkpoint tells."""
        history = History.to_write(folder, self.session.manifest, keep)
        if history.checkpoints:
            with contextlib.suppress(PackageError):  # a damaged one is no reason not to save another
                restored(self.session, self._spec, self._now()[1].state, history, history.checkpoints[-1])
        return history

    def _rate(self, given: float | None) -> float:
        return self.learning_rate if given is None else number(given, "learning_rate", least=0.0)

    def _samples(
        self, x: object, target: object, lower: object = None, upper: object = None, *, of: str = ""
    ) -> tuple[dict[str, NDArray[Any]], int]:
        manifest = self.session.manifest
        return samples(manifest, self._spec, x, target, lower, upper, strict=self.strict, of=of)
