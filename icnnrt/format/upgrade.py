"""Manifests and histories of older versions, made into today's and back: the one place that asks for the version.

Version 2 of a package differs from version 1 in what it says besides:

    graphs       `inputs` and `outputs` of each graph; of version 1 the graph itself tells
    weights      `sign` in place of `nonnegative`, which was true or false of a whole weight
    convexity    `rests_on`: the weights whose very values the proof needs; of version 1 nobody knows

Version 2 of a history differs from version 1 likewise:

    network      what the manifest says of the network; of version 1 a hash of all graphs and of the weights' shapes
    checkpoints  `fingerprint` of each; of version 1 none

The contents here are JSON from anybody: what is not as it should be is left for those who check every field.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from icnnrt.errors import InputError, PackageError
from icnnrt.format.fields import AGAIN, SHA256, integer, wrong
from icnnrt.printable import show

CURRENT: Final = 2
HISTORY_VERSION: Final = 2
# In place of a graph's inputs and outputs, which version 1 did not list. No JSON holds it.
UNTOLD: Final = object()


def upgraded(content: dict[str, Any], place: str) -> tuple[dict[str, Any], int]:
    """The content of a manifest.json as the current version has it, and the version that it came in.

    Raises `PackageError` for a version that is none, or newer, or for keys that its version does not have.
    """
    if "format_version" not in content:
        raise PackageError(f"{place}format_version is missing; {AGAIN}.")
    version = content["format_version"]
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version < 1 << 31:
        wrong(f"{place}format_version", f"an integer from 1 to {(1 << 31) - 1}", version)
    if version > CURRENT:
        raise PackageError(
            f"{place}format_version is {version}, newer than the {CURRENT} that this icnnrt reads; upgrade icnnrt."
        )
    if version == CURRENT:
        return content, version
    new = {**content, "format_version": CURRENT}
    if isinstance(content.get("graphs"), dict):
        new["graphs"] = dict(content["graphs"])
        for role, graph in _objects(content["graphs"]):
            _absent(graph, ("inputs", "outputs"), f"{place}graphs.{show(role)[1:-1]}.")
            new["graphs"][role] = {**graph, "inputs": UNTOLD, "outputs": UNTOLD}
    weights = content.get("weights")
    if isinstance(weights, dict) and isinstance(weights.get("tensors"), dict):
        tensors = dict(weights["tensors"])
        for name, tensor in _objects(weights["tensors"]):
            inside = f"{place}weights.tensors.{show(name)[1:-1]}."
            _absent(tensor, ("sign",), inside)
            held = tensor.get("nonnegative")
            if not isinstance(held, bool):
                wrong(f"{inside}nonnegative", "true or false", held)
            tensors[name] = {key: value for key, value in tensor.items() if key != "nonnegative"}
            tensors[name]["sign"] = "nonnegative" if held else None
        new["weights"] = {**weights, "tensors": tensors}
    if isinstance(content.get("convexity"), dict):
        _absent(content["convexity"], ("rests_on",), f"{place}convexity.")
        new["convexity"] = {**content["convexity"], "rests_on": None}
    return new, version


def as_version(content: dict[str, Any], version: int) -> dict[str, Any]:
    """The content of a checked manifest of today as an older version has it, for a package that was of that version.

    Raises `InputError` for what that version cannot say.
    """
    if version == CURRENT:
        return content
    old: dict[str, Any] = {**content, "format_version": version}
    old["graphs"] = {
        role: {key: value for key, value in graph.items() if key not in ("inputs", "outputs")}
        for role, graph in content["graphs"].items()
    }
    tensors = {}
    for name, tensor in content["weights"]["tensors"].items():
        if tensor["sign"] not in (None, "nonnegative"):
            raise InputError(
                f"weights: the sign of {show(name)}, {show(tensor['sign'])}, cannot be noted in a package of "
                f"format_version {version}, which knows nonnegative weights only; export the model again."
            )
        order = ("shape", "dtype", "nonnegative", "trainable")
        whole = {**tensor, "nonnegative": tensor["sign"] is not None}
        tensors[name] = {key: whole[key] for key in order}
    old["weights"] = {**content["weights"], "tensors": tensors}
    if "convexity" in content:
        old["convexity"] = {key: value for key, value in content["convexity"].items() if key != "rests_on"}
    return old


def upgraded_history(content: dict[str, Any], place: str) -> tuple[dict[str, Any], int]:
    """The content of a history.json, the key "version" taken out, as the current version has it, and its own version.

    Raises `PackageError` for a version that is none, or newer, or for keys that its version does not have.
    """
    version = integer(1, (1 << 31) - 1)(content.get("version"), f"{place}version")
    if version > HISTORY_VERSION:
        raise PackageError(
            f"{place}version is {version}, newer than the {HISTORY_VERSION} that this icnnrt reads; upgrade icnnrt."
        )
    new = {key: value for key, value in content.items() if key != "version"}
    if version == 1:
        new["network"] = {"hash": SHA256(new.get("network"), f"{place}network")}
        checkpoints = new.get("checkpoints")
        for checkpoint in checkpoints if isinstance(checkpoints, list) else ():
            if isinstance(checkpoint, dict):
                _absent(checkpoint, ("fingerprint",), f"{place}checkpoints.")
                checkpoint["fingerprint"] = []
    return new, version


def history_as_version(content: dict[str, Any], version: int) -> dict[str, Any]:
    """The content of a history.json of today as an older version has it, for a history that is of that version."""
    if version == HISTORY_VERSION:
        return content
    entries = ({key: value for key, value in c.items() if key != "fingerprint"} for c in content["checkpoints"])
    return {**content, "version": version, "network": content["network"]["hash"], "checkpoints": list(entries)}


def _objects(table: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((key, value) for key, value in table.items() if isinstance(value, dict))


def _absent(entry: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in keys:
        if key in entry:
            raise PackageError(f"{place}{key} is not a key of format_version 1; remove it, or {AGAIN}.")
