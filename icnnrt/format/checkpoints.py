"""A bounded history of fine-tuning on the disk: weights and optimiser state, whole at every instant.

A history is a folder:

    history.json                    format "icnnrt-history", version 2; the network it belongs to; the checkpoints,
                                    oldest first, each with its file, SHA-256, size in bytes, step, figures and
                                    fingerprint
    step-<step>-<hash>.safetensors  one checkpoint: every weight as weight.<name> and every state tensor as state.<...>;
                                    <step> in 12 digits or more, <hash> the first 16 digits of its SHA-256

A checkpoint is written whole before history.json names it, and deleted only after history.json has ceased to, and
each file appears by a rename: whatever interrupts a save, the folder holds what it held before, or that and the new
checkpoint. The hash in its name keeps a step that is taken again, after going back, from replacing the file of the
first time. Files that history.json does not name are left over from an interruption and mean nothing; the next save
deletes them.

The network is what the manifest of its package says of it: dtype, shapes, kind, domain, solver, names, shapes and
dtypes of the weights, and the training spec (`architecture`). Bytes of graphs do not count, as another version of torch
or icnnrt writes others for the same network. What the manifest does not say, such as the units' activation, tells by
the fingerprint: f at four fixed points, with the weights of the checkpoint; graphs that give the same there, but for
rounding, are the same network. It is empty of a network of quadratic programs, whose answers need not be unique.

Version 1 is read too, and written on as it came: `icnnrt.format.upgrade` says what it lacks.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as safetensors_numpy

from icnnrt import arguments
from icnnrt.errors import InputError, PackageError
from icnnrt.format.fields import (
    AGAIN,
    SHA256,
    JsonObject,
    exactly,
    integer,
    listing,
    load_json,
    matching,
    maybe,
    plain,
    real,
    record,
    table,
    written,
    wrong,
)
from icnnrt.format.files import read_plain, scratch_of, sync_folder, write_atomically
from icnnrt.format.folder import StrPath, check_place, refuse_inside_a_package
from icnnrt.format.manifest import MANIFEST_FILE, Manifest
from icnnrt.format.upgrade import HISTORY_VERSION, history_as_version, upgraded_history
from icnnrt.printable import harmless, show

HISTORY_FILE: Final = "history.json"
FORMAT: Final = "icnnrt-history"
KEEP: Final = 5
MAX_BYTES: Final = 8 << 20  # of history.json; names of weights fill 4 MiB at most, as those of a manifest do
MAX_STEP: Final = 1 << 53
MAX_CHECKPOINTS: Final = 1000  # so that history.json stays within its bound
MAX_FIGURES: Final = 64
WEIGHT: Final = "weight."
STATE: Final = "state."
FINGERPRINT: Final = 4  # numbers in one

_FILE: Final = re.compile(r"step-[0-9]{12,16}-[0-9a-f]{16}\.safetensors")

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Checkpoint:
    """One entry of a history."""

    file: Annotated[str, matching(_FILE, "the name of a checkpoint")]
    sha256: Annotated[str, SHA256]
    bytes: Annotated[int, integer(1, 1 << 40)]
    step: Annotated[int, integer(0, MAX_STEP)]
    figures: Annotated[Mapping[str, float], table(real, MAX_FIGURES)]
    """What was measured at that step, such as loss and validation."""
    fingerprint: Annotated[tuple[float | None, ...], listing(maybe(real), FINGERPRINT)] = ()
    """What the network gave at `fingerprint_points` with these weights; None for what is not finite."""


def network_of(manifest: Manifest) -> str:
    """The identity of a package's network and optimiser in version 1, whatever its weights: SHA-256 in hexadecimal."""
    tensors = sorted((n, s.dtype, *s.shape) for n, s in manifest.weights.tensors.items())
    graphs = sorted((role, graph.sha256) for role, graph in manifest.graphs.items())
    return hashlib.sha256(json.dumps([graphs, tensors]).encode()).hexdigest()


def architecture(manifest: Manifest) -> dict[str, Any]:
    """What a package's network and training are, whatever its weights, as JSON."""
    content = manifest.content()
    parts = {key: content.get(key) for key in ("dtype", "x_shape", "y_shape", "kind", "domain", "solver", "train")}
    tensors = sorted(manifest.weights.tensors.items())
    return {**parts, "weights": {name: f"{spec.dtype}{list(spec.shape)}" for name, spec in tensors}}


def fingerprint_points(manifest: Manifest) -> dict[str, NDArray[Any]]:
    """x and y at which fingerprints are taken: four samples, as different as cosines are, y around ½."""

    def waves(shape: tuple[int, ...]) -> NDArray[Any]:
        return np.cos(np.arange(FINGERPRINT * math.prod(shape))).reshape(FINGERPRINT, *shape)

    x, y = waves(manifest.x_shape), 0.5 + 0.25 * waves(manifest.y_shape)
    return {"x": x.astype(manifest.dtype), "y": y.astype(manifest.dtype)}


def check_apart(history: StrPath, package: StrPath) -> None:
    """Refuse a folder for checkpoints that is, or lies in, the place where a package is to be written.

    Neither need be there yet. Links are followed. Names that differ in case alone, or in how an accent is encoded,
    count as the same, since there are file systems that hold them to be.
    """

    def parts(path: StrPath) -> list[str]:
        return [unicodedata.normalize("NFC", part).casefold() for part in Path(os.path.realpath(path)).parts]

    inner, outer = parts(history), parts(package)
    if inner[: len(outer)] == outer:
        raise InputError(
            f"history: expected a folder apart from the package that is to be written to {package}, but {history} "
            f"{'is the same place' if inner == outer else 'lies in it'}; choose another folder."
        )


class History:
    """The checkpoints of one network in one folder; not for several writers at a time."""

    def __init__(self, folder: StrPath, manifest: Manifest, keep: int = KEEP) -> None:
        how_many = f"how many checkpoints to keep, 1 to {MAX_CHECKPOINTS}"
        self._keep = arguments.integer(keep, "keep", 1, MAX_CHECKPOINTS, expected=how_many)
        self.folder = arguments.path(folder, "history")
        self._manifest = arguments.instance(manifest, "manifest", Manifest, "that of a package")
        self.checkpoints = self._read()

    @classmethod
    def to_write(cls, folder: StrPath, manifest: Manifest, keep: int = KEEP) -> "History":
        """The history in a folder that checkpoints are to be saved to; `InputError` where they would spoil a package.

        Told before the work, not after it. `save` asks again.
        """
        history = cls(folder, manifest, keep)
        history._check_place()
        return history

    def save(
        self,
        step: int,
        weights: Arrays,
        state: Arrays,
        figures: Mapping[str, float],
        fingerprint: Sequence[float | None] = (),
    ) -> Checkpoint:
        """Add a checkpoint, and drop the oldest beyond the bound; None in the fingerprint is a number that is none.

        Raises `OSError` if the disk refuses, and `InputError` where the folder is a package, or lies in one.
        """
        given: object = figures
        if isinstance(figures, Mapping):  # numpy's numbers are numbers too
            given = {n: v if (one := arguments.alone(v)) is None else one for n, v in figures.items()}
        try:
            figures = table(real, MAX_FIGURES)(given, "figures")
        except PackageError as error:
            raise InputError(f"{str(error).removesuffix(f'; {AGAIN}.')}; give numbers by name.") from error
        self._check_place()
        self.checkpoints = self._read()  # others may have been saved since, as by a callback in the middle of a fit
        if not self.folder.is_dir():
            check_place(self.folder, "history")
            self.folder.mkdir(exist_ok=True)
            sync_folder(self.folder.parent)
        tensors = {WEIGHT + name: np.array(a, order="C") for name, a in weights.items()}
        tensors |= {name: np.array(a, order="C") for name, a in state.items()}
        data = safetensors_numpy.save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        name = f"step-{step:012d}-{digest[:16]}.safetensors"
        entry = Checkpoint(name, digest, len(data), step, dict(figures), tuple(fingerprint))
        write_atomically(self.folder / entry.file, data)
        # A step that is there already is from before a rollback: the new one takes its place.
        kept = [*(c for c in self.checkpoints if c.step != step), entry][-self._keep :]
        self._write(kept)
        self._tidy({c.file for c in kept})
        return entry

    def load(self, checkpoint: Checkpoint) -> dict[str, NDArray[np.generic]]:
        """The tensors of a checkpoint, after checking that they are those that were saved."""
        arguments.instance(checkpoint, "checkpoint", Checkpoint, "one of History.checkpoints")
        path = self.folder / checkpoint.file
        try:
            data = read_plain(path, checkpoint.bytes)
        except OSError as error:
            raise PackageError(f"{path}: cannot be read ({error}); resume from another checkpoint.") from error
        if data is None or len(data) != checkpoint.bytes or hashlib.sha256(data).hexdigest() != checkpoint.sha256:
            raise PackageError(
                f"{path}: expected the {checkpoint.bytes} bytes that {HISTORY_FILE} has the hash of, but the file was "
                "changed or cut short; resume from another checkpoint."
            )
        try:
            return safetensors_numpy.load(data)
        except Exception as error:  # safetensors has an exception of its own, and raises others too
            raise PackageError(
                f"{path}: not a safetensors file ({error}); resume from another checkpoint."
            ) from harmless(error)

    def check(self, checkpoint: Checkpoint, fingerprint: Sequence[float | None]) -> None:
        """Refuse a network that gives other numbers than the checkpoint's did, with the weights of the checkpoint."""
        then, now = (np.array([math.nan if v is None else v for v in f]) for f in (checkpoint.fingerprint, fingerprint))
        if not (len(then) and len(now)):
            return
        same = np.zeros(1, bool)
        if len(then) == len(now):
            scale = np.abs([then, now])[np.isfinite([then, now])].max(initial=0.0)
            rounding = 10 * math.sqrt(np.finfo(self._manifest.dtype).eps) * scale
            same = np.isclose(then, now, rtol=0, atol=rounding, equal_nan=True)
        if not same.all():
            i = int(np.argmin(same))
            raise InputError(
                f"history: expected checkpoints of this package in {self.folder}, but they are of another network: "
                f"with the weights of step {checkpoint.step} it gave {then[i]:.6g} where this one gives {now[i]:.6g}; "
                "give another folder."
            )

    def _check_place(self) -> None:
        if os.path.lexists(self.folder / MANIFEST_FILE):
            raise InputError(
                f"history: expected a folder of checkpoints, but {self.folder} has a {MANIFEST_FILE}, so it is a "
                "package, which would not open with checkpoints in it; choose another folder."
            )
        refuse_inside_a_package(self.folder, "history")

    def _write(self, checkpoints: list[Checkpoint]) -> None:
        content = {
            "format": FORMAT,
            "version": HISTORY_VERSION,
            "network": self._network,
            "checkpoints": written(checkpoints),
        }
        text = json.dumps(history_as_version(content, self._version), indent=1, allow_nan=False, default=plain)
        write_atomically(self.folder / HISTORY_FILE, text.encode() + b"\n")
        self.checkpoints = checkpoints

    def _tidy(self, named: Collection[str]) -> None:
        """Delete checkpoints that history.json does not name, and what interrupted saves have left."""
        with contextlib.suppress(OSError):  # the save itself is done
            for name in os.listdir(self.folder):
                intended = scratch_of(name)
                if (_FILE.fullmatch(name) and name not in named) or (
                    intended and (intended == HISTORY_FILE or _FILE.fullmatch(intended))
                ):
                    (self.folder / name).unlink(missing_ok=True)

    def _read(self) -> list[Checkpoint]:
        path = self.folder / HISTORY_FILE
        try:
            if self.folder.exists() and not self.folder.is_dir():
                came = f"{self.folder}, which is a file"
                raise arguments.refused("history", "a folder of checkpoints", came, "give another")
            data = read_plain(path, MAX_BYTES)
        except FileNotFoundError:
            self._network, self._version = architecture(self._manifest), HISTORY_VERSION
            return []
        except InputError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            raise PackageError(f"{path}: cannot be read ({error}); check the path and its permissions.") from error
        if data is None:
            raise PackageError(f"{path}: expected at most {MAX_BYTES} bytes, but it has more; it is no history.")
        place = f"{path}: "
        fields = JsonObject(load_json(data, str(path)), place)
        fields.take("format", exactly(FORMAT))
        fields.left, self._version = upgraded_history(fields.left, place)
        network = fields.take("network", _network)
        checkpoints = fields.take("checkpoints", listing(record(Checkpoint), MAX_CHECKPOINTS))
        fields.close()
        if network.keys() == {"hash"}:  # of version 1, which knew no more of it
            same = network["hash"] == network_of(self._manifest)
            told = "" if same else "the very files of its package count for a history of version 1, and they differ"
        else:
            told = _difference(network, architecture(self._manifest))
        if told:
            raise InputError(
                f"history: expected checkpoints of this package in {self.folder}, but they are of another network, or "
                f"of another training: {told}; give another folder."
            )
        self._network = network
        return list(checkpoints)


def _network(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        wrong(place, "a JSON object", value)
    return value


def _difference(theirs: Any, ours: Any, at: str = "") -> str:
    """The first thing that two JSON values do not agree in, for a sentence; empty if they agree."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            place = f"{at}.{show(key)[1:-1]}".lstrip(".")
            if key not in theirs or key not in ours:
                return f"{place} is there, and not here" if key in theirs else f"{place} is not there, but here"
            if found := _difference(theirs[key], ours[key], place):
                return found
        return ""
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours) > 4:
        pairs = ((f"{at}[{i}]", *pair) for i, pair in enumerate(zip(theirs, ours, strict=True)))
        return next((found for place, one, other in pairs if (found := _difference(one, other, place))), "")
    same = type(theirs) is type(ours) or {type(theirs), type(ours)} <= {int, float}
    return "" if same and theirs == ours else f"{at} is {show(theirs)} there, and {show(ours)} here"
