"""Weights to and from a federation: many devices learn from data that stays with each, and a server averages.

    weights = icnnrt.federated.get_weights(tuner)         # what a device has learnt
    mean = weighted_average([weights, ...], [n, ...])     # what the server makes of it: θ = Σ nᵢ θᵢ / Σ nᵢ
    icnnrt.federated.set_weights(tuner, mean)             # the next round

Averages of convex networks are convex: what a package's convexity asks of its weights is that some of them are not
negative, and sums of such with positive factors are not negative either. `set_weights` holds whatever comes to it.

`client_app` makes a device a client of Flower (flwr), whose server, strategies, transport and privacy are its own.
flwr is imported there only: pip install 'icnnrt[federated]'.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from icnnrt.arguments import converted, instance, integer, refused
from icnnrt.errors import InputError, MissingDependencyError
from icnnrt.printable import named, show
from icnnrt.serving.session import Session
from icnnrt.serving.weight_sets import WeightSet
from icnnrt.tuning.finetune import BATCH_SIZE, FineTuner
from icnnrt.tuning.given import exchanged, new_weights

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message
    from flwr.clientapp import ClientApp

Weights: TypeAlias = Mapping[str, NDArray[Any]]
Arrays: TypeAlias = dict[str, NDArray[Any]]

# Keys of Flower's strategies, as they are unless a strategy is told otherwise.
ARRAYS, METRICS, CONFIG, SAMPLES = "arrays", "metrics", "config", "num-examples"
ROUND: Final = "server-round"


def get_weights(source: Session | FineTuner) -> Arrays:
    """name -> a copy of every weight that the package's training graph moves; without one, every trainable weight.

    All are of one instant, also while another thread tunes. The others are the same on every device, so they need not
    travel.
    """
    session = _session(source)
    weights = session.weights
    return {name: np.array(weights[name]) for name in exchanged(session.manifest)}


def set_weights(target: Session | FineTuner, weights: Weights) -> None:
    """Take new values for some weights or all, whole or not at all; later runs of the session use them.

    weights:  name -> array of the weight's shape; floats of another width are converted

    A tuner keeps its optimiser's state, and what was set is what `rollback` returns to. Set the weights of a session
    that has a tuner through the tuner.

    Raises `InputError`, and nothing has changed, for a weight that the package has not or does not train, for a wrong
    shape or dtype, for NaN or infinity, and for weights with which a proven energy would not be proven convex any more:
    of another sign than the proof needs, or of values with which it fails.
    """
    if isinstance(target, FineTuner):
        target.set_weights(weights)
        return
    session = _session(target)
    while not _followed(session, present := session.runner.weights, new_weights(session, weights, present)):
        pass  # somebody else has changed the rest of the weights, with which these were judged


def weighted_average(weights: Sequence[Weights], samples: Sequence[float]) -> Arrays:
    """θ = Σᵢ nᵢ θᵢ / Σᵢ nᵢ for every weight: federated averaging (McMahan et al., 2017).

    weights:  from several devices, all with the same names, shapes and dtypes
    samples:  nᵢ >= 0 for each, such as how many samples it learnt from; not all are zero

    Sums are formed in float64. Entries that are nowhere negative have an average that is not.
    Raises `InputError` for anything else, NaN and infinity included.
    """
    for given in instance(weights, "weights", Sequence, "a list with those of each device"):
        instance(given, "weights", Mapping, "arrays by name from every device")
    try:
        counts = np.asarray(samples, np.float64)
    except Exception as error:
        raise refused("samples", "numbers of at least 0", show(samples), "give one a device") from error
    if counts.ndim != 1 or len(weights) == 0 or len(weights) != len(counts):
        came = f"{len(weights)} devices and {counts.size} numbers"
        raise refused("weights, samples", "one number of samples for each of one device or more", came)
    if not np.isfinite(counts).all() or counts.min() < 0 or not counts.sum() > 0:
        raise refused("samples", "numbers of at least 0, not all 0", show(samples), "give one a device")
    parts = counts / counts.sum()
    first = {name: converted(array, "weights") for name, array in weights[0].items()}
    total = {name: np.zeros(array.shape, np.float64) for name, array in first.items()}
    for device, (given, part) in enumerate(zip(weights, parts, strict=True)):
        if given.keys() != first.keys():
            odd = min(given.keys() ^ first.keys())
            raise InputError(
                f"weights: expected the same names from every device, but {odd!r} is in only one of devices 0 and "
                f"{device}; average weights of one package."
            )
        for name, like in first.items():
            array = converted(given[name], "weights")
            if array.dtype.kind != "f" or array.dtype != like.dtype or array.shape != like.shape:
                expected = f"{named(name)} as {like.dtype}{list(like.shape)} of floats from every device"
                came = f"{array.dtype}{list(array.shape)} from device {device}"
                raise refused("weights", expected, came, "average weights of one package")
            if not np.isfinite(array).all():
                raise InputError(
                    f"weights: {named(name)} of device {device} holds NaN or infinity; leave that device out."
                )
            total[name] += part * array
    return {name: total[name].astype(like.dtype) for name, like in first.items()}


# --- Flower --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Local:
    """What a device brings to a federation."""

    tuner: FineTuner
    x: Any
    target: Any
    validation: tuple[Any, Any] | None = None
    """(x, target) that the server's weights are judged by; without it, by the data that is learnt from."""


def client_app(local: Callable[["Context"], Local], *, epochs: int = 1, batch_size: int = BATCH_SIZE) -> "ClientApp":
    """A client of Flower that tunes a package on the data of its device.

    local:       called with Flower's context for every message; it should return the same tuner each time, since to
                 make a session takes longer than a round
    epochs, batch_size:  of one round, unless the server's configuration has "epochs", "batch-size" or "lr"

    In a round of training the client takes the server's weights, fits, and answers with an ArrayRecord "arrays" of
    `get_weights` and a MetricRecord "metrics": "num-examples", "loss", "accepted" and "refused" steps. Steps that
    would harm are refused as ever, so a device of bad data sends back what it was sent. Evaluation answers with
    "num-examples" and "loss". The optimiser's state stays on the device.

    Use it as the app of a Flower project, with any strategy that averages:

        app = icnnrt.federated.client_app(local)                             # on the devices
        FedAvg().start(grid, initial_arrays=to_record(get_weights(session)))  # in the server's app

    Raises `MissingDependencyError` without flwr.
    """
    epochs, batch_size = integer(epochs, "epochs", 1), integer(batch_size, "batch_size", 1)
    app: ClientApp = _flwr().clientapp.ClientApp()

    @app.train()
    def train(message: "Message", context: "Context") -> "Message":
        mine = local(context)
        config = _config(message)
        set_weights(mine.tuner, from_record(message.content[ARRAYS]))
        rate = config.get("lr")
        report = mine.tuner.fit(
            mine.x,
            mine.target,
            epochs=int(config.get("epochs", epochs)),
            batch_size=int(config.get("batch-size", batch_size)),
            learning_rate=None if rate is None else float(rate),
            seed=int(config.get(ROUND, 0)),  # another order in every round
        )
        last = report.epochs[-1]
        metrics = {
            SAMPLES: len(mine.x) - last.skipped,
            "loss": last.loss,
            "accepted": sum(epoch.accepted for epoch in report.epochs),
            "refused": sum(epoch.refused for epoch in report.epochs),
        }
        return _answer(message, metrics, to_record(get_weights(mine.tuner)))

    @app.evaluate()
    def evaluate(message: "Message", context: "Context") -> "Message":
        mine = local(context)
        set_weights(mine.tuner, from_record(message.content[ARRAYS]))
        x, target = (mine.x, mine.target) if mine.validation is None else mine.validation
        return _answer(message, {SAMPLES: len(x), "loss": mine.tuner.loss(x, target)})

    return app


def to_record(weights: Weights) -> "ArrayRecord":
    """Weights as Flower sends them, under their names."""
    flwr = _flwr().app
    return flwr.ArrayRecord({name: flwr.Array(np.ascontiguousarray(array)) for name, array in weights.items()})


def from_record(record: "ArrayRecord") -> Arrays:
    """Weights as Flower brings them. What they are worth is for `set_weights` to say."""
    return {name: array.numpy() for name, array in record.items()}


def _answer(message: "Message", metrics: Mapping[str, float], arrays: "ArrayRecord | None" = None) -> Any:
    flwr = _flwr().app
    content: dict[str, Any] = {METRICS: flwr.MetricRecord(dict(metrics))}
    if arrays is not None:
        content[ARRAYS] = arrays
    return flwr.Message(content=flwr.RecordDict(content), reply_to=message)


def _config(message: "Message") -> "ConfigRecord | dict[str, Any]":
    return message.content.config_records.get(CONFIG, {})


def _flwr() -> Any:
    """flwr with its modules `app` and `clientapp`."""
    try:
        import flwr.app
        import flwr.clientapp

        return flwr
    except ImportError as error:
        raise MissingDependencyError(
            f"Flower is needed for this, but cannot be imported ({error}): pip install 'icnnrt[federated]'."
        ) from error


# --- Checks --------------------------------------------------------------------------------------


def _followed(session: Session, present: WeightSet, new: Arrays) -> bool:
    """Put these weights in the place of the present ones; False if others have come there meanwhile."""
    try:
        session.runner.update_weights(new, made_with=present.id)
    except InputError:
        if session.runner.weights is present:
            raise
        return False
    return True


def _session(value: object) -> Session:
    if isinstance(value, FineTuner):
        return value.session
    return instance(value, "session", Session, "a session or a FineTuner", "see icnnrt.load")
