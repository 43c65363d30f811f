"""A bounded history of fine-tuning on the disk: weights and optimiser state, whole at every instant.

A history is a folder:

    history.json                    format "icnnrt-history", version 1; the network it belongs to; the checkpoints,
                                    oldest first, each with its file, SHA-256, size in bytes, step and figures
    step-<step>-<hash>.safetensors  one checkpoint: every weight as weight.<name> and every state tensor as state.<...>;
                                    <step> in 12 digits or more, <hash> the first 16 digits of its SHA-256

A checkpoint is written whole before history.json names it, and deleted only after history.json has ceased to, and
each file appears by a rename: whatever interrupts a save, the folder holds what it held before, or that and the new
checkpoint. The hash in its name keeps a step that is taken again, after going back, from replacing the file of the
first time. Files that history.json does not name are left over from an interruption and mean nothing; the next save
deletes them.
"""

import contextlib
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as safetensors_numpy

from icnnrt import _arguments
from icnnrt._fields import JsonObject, exactly, integer, listing, load_json, matching, plain, real, table
from icnnrt._files import read_plain, scratch_of, sync_folder, write_atomically
from icnnrt.errors import InputError, PackageError
from icnnrt.manifest import MANIFEST_FILE, Manifest
from icnnrt.package import StrPath, check_outside

HISTORY_FILE: Final = "history.json"
FORMAT: Final = "icnnrt-history"
KEEP: Final = 5
MAX_BYTES: Final = 1 << 20  # of history.json
MAX_STEP: Final = 1 << 53
MAX_CHECKPOINTS: Final = 1000  # so that history.json stays within its bound
WEIGHT: Final = "weight."
STATE: Final = "state."

_FILE: Final = re.compile(r"step-[0-9]{12,16}-[0-9a-f]{16}\.safetensors")
_HEX: Final = matching(re.compile(r"[0-9a-f]{64}"), "64 lower-case hexadecimal digits")

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Checkpoint:
    """One entry of a history."""

    file: str
    sha256: str
    bytes: int
    step: int
    figures: Mapping[str, float]
    """What was measured at that step, such as loss and validation."""


def network_of(manifest: Manifest) -> str:
    """The identity of a package's network and optimiser, whatever its weights: SHA-256 in hexadecimal."""
    tensors = sorted((n, s.dtype, *s.shape) for n, s in manifest.weights.tensors.items())
    graphs = sorted((role, graph.sha256) for role, graph in manifest.graphs.items())
    return hashlib.sha256(json.dumps([graphs, tensors]).encode()).hexdigest()


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
        self.folder = Path(folder)
        self._network = network_of(manifest)
        how_many = f"how many checkpoints to keep, 1 to {MAX_CHECKPOINTS}"
        self._keep = _arguments.integer(keep, "keep", 1, MAX_CHECKPOINTS, expected=how_many)
        self.checkpoints = self._read()

    @classmethod
    def to_write(cls, folder: StrPath, manifest: Manifest, keep: int = KEEP) -> "History":
        """The history in a folder that checkpoints are to be saved to; `InputError` where they would spoil a package.

        Told before the work, not after it. `save` asks again.
        """
        history = cls(folder, manifest, keep)
        history._check_place()
        return history

    def save(self, step: int, weights: Arrays, state: Arrays, figures: Mapping[str, float]) -> Checkpoint:
        """Add a checkpoint, and drop the oldest beyond the bound.

        Raises `OSError` if the disk refuses, and `InputError` where the folder is a package, or lies in one.
        """
        self._check_place()
        self.checkpoints = self._read()  # others may have been saved since, as by a callback in the middle of a fit
        if not self.folder.is_dir():
            self.folder.mkdir(exist_ok=True)
            sync_folder(self.folder.parent)
        tensors = {WEIGHT + name: np.array(a, order="C") for name, a in weights.items()}
        tensors |= {name: np.array(a, order="C") for name, a in state.items()}
        data = safetensors_numpy.save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        entry = Checkpoint(f"step-{step:012d}-{digest[:16]}.safetensors", digest, len(data), step, dict(figures))
        write_atomically(self.folder / entry.file, data)
        # A step that is there already is from before a rollback: the new one takes its place.
        kept = [*(c for c in self.checkpoints if c.step != step), entry][-self._keep :]
        self._write(kept)
        self._tidy({c.file for c in kept})
        return entry

    def load(self, checkpoint: Checkpoint) -> dict[str, NDArray[np.generic]]:
        """The tensors of a checkpoint, after checking that they are those that were saved."""
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
            raise PackageError(f"{path}: not a safetensors file ({error}); resume from another checkpoint.") from error

    def _check_place(self) -> None:
        if os.path.lexists(self.folder / MANIFEST_FILE):
            raise InputError(
                f"history: expected a folder of checkpoints, but {self.folder} has a {MANIFEST_FILE}, so it is a "
                "package, which would not open with checkpoints in it; choose another folder."
            )
        check_outside(self.folder, "history")

    def _write(self, checkpoints: list[Checkpoint]) -> None:
        content = {
            "format": FORMAT,
            "version": 1,
            "network": self._network,
            "checkpoints": [{**vars(c), "figures": dict(c.figures)} for c in checkpoints],
        }
        text = json.dumps(content, indent=1, allow_nan=False, default=plain)
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
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"history: expected a folder of checkpoints, but {self.folder} is a file; give another.")
        try:
            data = read_plain(path, MAX_BYTES)
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            raise PackageError(f"{path}: cannot be read ({error}); check the path and its permissions.") from error
        if data is None:
            raise PackageError(f"{path}: expected at most {MAX_BYTES} bytes, but it has more; it is no history.")
        place = f"{path}: "
        fields = JsonObject(load_json(data, str(path)), place)
        fields.take("format", exactly(FORMAT))
        fields.take("version", integer(1, 1))
        network = fields.take("network", _HEX)
        checkpoints = fields.take("checkpoints", listing(_checkpoint, MAX_CHECKPOINTS))
        fields.close()
        if network != self._network:
            raise InputError(
                f"history: expected checkpoints of this package in {self.folder}, but they are of another network, or "
                "of another optimiser; give another folder."
            )
        return list(checkpoints)


def _checkpoint(value: object, place: str) -> Checkpoint:
    fields = JsonObject(value, f"{place}.")
    entry = Checkpoint(
        file=fields.take("file", matching(_FILE, "the name of a checkpoint")),
        sha256=fields.take("sha256", _HEX),
        bytes=fields.take("bytes", integer(1, 1 << 40)),
        step=fields.take("step", integer(0, MAX_STEP)),
        figures=fields.take("figures", table(real, 64)),
    )
    fields.close()
    return entry
