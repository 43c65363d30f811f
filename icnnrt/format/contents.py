"""The bytes of a package's files, each checked against the manifest: hashes, weights, graphs, golden data.

Nothing here touches the disk. What has been checked is handed on as read-only arrays over the same bytes.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from safetensors import numpy as safetensors_numpy

from icnnrt.arguments import instance, refused
from icnnrt.errors import PackageError
from icnnrt.format import wire
from icnnrt.format.fields import AGAIN, JsonObject, exactly, listing, load_json, surrogate, table, wrong
from icnnrt.format.manifest import (
    FILE_SIZE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MAX_HEADER_BYTES,
    OP_DOMAIN,
    RESERVED_NAME,
    SAFETENSORS_DTYPES,
    WEIGHTS_FILE,
    File,
    GraphFile,
    Manifest,
    WeightsFile,
    WeightSpec,
    scalar,
    shape_of,
)
from icnnrt.format.signatures import declared, fits, listed, shown
from icnnrt.limits import check
from icnnrt.printable import harmless, show


class Contents(NamedTuple):
    """What has been checked: the manifest, with what each graph takes and gives, and the bytes of the files."""

    manifest: Manifest
    graphs: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray]
    golden: Mapping[str, np.ndarray]


def checked_contents(manifest: Manifest, files: Mapping[str, bytes]) -> Contents:
    """Check the bytes of every listed file, by its name, against the manifest; raises `PackageError`."""
    everything: list[File | WeightsFile] = [*manifest.graphs.values(), manifest.weights]
    if manifest.golden:
        everything.append(manifest.golden)
    for entry in everything:
        check(f"{entry.file}: the check of it")
        found = hashlib.sha256(files[entry.file]).hexdigest()
        if found != entry.sha256:
            raise PackageError(
                f"{entry.file}: its SHA-256 should be {entry.sha256}, but is {found}; "
                f"the file was changed or damaged, so copy the package again or {AGAIN}."
            )
    extents = _read_header(manifest, files[WEIGHTS_FILE])
    weights: dict[str, np.ndarray] = {}
    for name, spec in manifest.weights.tensors.items():
        # A view of bytes is read-only, and shares their memory.
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        weights[name] = np.ndarray(spec.shape, dtype, buffer=files[WEIGHTS_FILE], offset=extents[name][0])
        _check_values(name, spec, weights[name])
    steps, there = wire.MAX_STEPS, frozenset(extents.values())
    for graph in manifest.graphs.values():
        steps -= _check_graph(manifest, graph.file, files[graph.file], there, steps)
    graphs = {role: files[graph.file] for role, graph in manifest.graphs.items()}
    manifest = replace(manifest, graphs={role: _with_signature(manifest, role, data) for role, data in graphs.items()})
    golden = _read_golden(files[GOLDEN_FILE]) if manifest.golden else {}
    return Contents(manifest, MappingProxyType(graphs), MappingProxyType(weights), MappingProxyType(golden))


def _with_signature(manifest: Manifest, role: str, data: bytes) -> GraphFile:
    """The entry of a graph, with what it takes and gives: what the manifest lists, if that is what the file declares;
    where nothing is listed, what the file declares."""
    graph = manifest.graphs[role]
    if graph.signature is None:
        return replace(graph, signature=listed(manifest, role, data))
    found = declared(data, graph.file, manifest.weights.tensors)
    for what, told, came in (
        ("inputs", graph.signature.inputs, found.inputs),
        ("outputs", graph.signature.outputs, found.outputs),
    ):
        place = f"{MANIFEST_FILE}: graphs.{role}.{what}"
        for name in sorted(told.keys() ^ came.keys()):
            there = "the graph does not have" if name in told else "lacks what the graph has"
            raise PackageError(f"{place} {there}: {show(name)}; {AGAIN}.")
        for name, tensor in told.items():
            other = came[name]
            if other.dtype not in ("", tensor.dtype) or not fits(other.shape, tensor.shape):
                raise PackageError(
                    f"{place}.{show(name)[1:-1]} is {tensor.dtype} {shown(tensor.shape)}, but {graph.file} declares "
                    f"{other.dtype or 'another dtype'} {show(shown(other.shape))}; {AGAIN}."
                )
            if other.default != tensor.default:
                wrong(f"{place}.{show(name)[1:-1]}.default", f"{show(other.default)}, as in the graph", tensor.default)
    return graph


def _read_golden(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of golden.safetensors; the size of the file bounds theirs."""
    try:
        arrays = safetensors_numpy.load(data)
    except Exception as error:
        raise PackageError(f"{GOLDEN_FILE}: is no safetensors file ({error}); {AGAIN}.") from harmless(error)
    for array in arrays.values():
        array.flags.writeable = False
    return dict(arrays)


def _read_header(manifest: Manifest, data: bytes) -> dict[str, tuple[int, int]]:
    """Check the safetensors header against the manifest; return (offset, length) of each tensor."""
    file = WEIGHTS_FILE
    size = int.from_bytes(data[:8], "little")
    most = min(MAX_HEADER_BYTES, len(data) - 8)
    if size > most:
        raise PackageError(
            f"{file}: its header should have at most {max(most, 0)} bytes, but claims {size}; "
            f"the file is damaged, so {AGAIN}."
        )
    start = 8 + size
    header = JsonObject(load_json(data[8:start], f"{file} header"), f"{file} header: ")
    if "__metadata__" in header.left:
        header.take("__metadata__", table(scalar, 1024))
    tensors = manifest.weights.tensors
    for name in sorted(header.left.keys() ^ tensors.keys()):
        here, there = (file, MANIFEST_FILE) if name in header.left else (MANIFEST_FILE, file)
        raise PackageError(f"{file}: the weight {show(name)} is in {here} but not in {there}; {AGAIN}.")

    extents: dict[str, tuple[int, int]] = {}
    for name, spec in tensors.items():
        place = f"{file} header: {show(name)[1:-1]}."
        entry = JsonObject(header.left[name], place)
        entry.take("dtype", exactly(SAFETENSORS_DTYPES[spec.dtype]))
        shape = entry.take("shape", shape_of)
        if shape != spec.shape:
            wrong(f"{place}shape", f"{list(spec.shape)} as in {MANIFEST_FILE}", list(shape))
        offsets = entry.take("data_offsets", listing(FILE_SIZE, 2))
        entry.close()
        item = np.dtype(spec.dtype).itemsize
        length = item * math.prod(shape)
        if len(offsets) != 2 or offsets[1] - offsets[0] != length:
            wrong(f"{place}data_offsets", f"two offsets {length} bytes apart", list(offsets))
        if (start + offsets[0]) % item:
            wrong(f"{place}data_offsets", f"aligned to {item} bytes in the file", list(offsets))
        extents[name] = (start + offsets[0], length)

    expected = start
    for name, (offset, length) in sorted(extents.items(), key=lambda pair: pair[1]):
        if offset != expected:
            fault = "overlaps the weight before it" if offset < expected else "leaves a gap before it"
            raise PackageError(
                f"{file}: the weight {show(name)} should start at byte {expected}, but starts at {offset} and "
                f"{fault}; {AGAIN}."
            )
        expected += length
    if expected != len(data):
        raise PackageError(
            f"{file}: its weights should end with the file at byte {len(data)}, but end at {expected}; "
            f"the file is truncated or padded, so {AGAIN}."
        )
    return extents


def _check_values(name: str, spec: WeightSpec, array: np.ndarray) -> None:
    # Written so that NaN fails both.
    if spec.sign and (fault := spec.sign.fault(array)):
        raise PackageError(
            f"{WEIGHTS_FILE}: {show(name)} should be {fault}; project it onto its constraint, or do not declare it."
        )
    if spec.trainable and not np.isfinite(array).all():
        raise PackageError(
            f"{WEIGHTS_FILE}: {show(name)} should be finite, but holds NaN or infinity; "
            "the training diverged, so go back to earlier weights."
        )


def _check_graph(manifest: Manifest, file: str, data: bytes, extents: Collection[tuple[int, int]], steps: int) -> int:
    """Refuse a graph that reads other files, or uses operators from elsewhere; of `steps`, how many that took."""
    found = wire.survey(data, file, steps)
    if not found.graphs:
        raise PackageError(f"{file}: expected an ONNX model, but it holds no graph; {AGAIN}.")
    for tensor in found.external:
        if tensor.location != WEIGHTS_FILE:
            raise PackageError(
                f"{file}: tensor {show(tensor.tensor)} should keep its external data in {WEIGHTS_FILE}, but names "
                f"{show(tensor.location)}; do not use this package unless you trust its source, and {AGAIN}."
            )
        if (tensor.offset, tensor.length) not in extents:
            raise PackageError(
                f"{file}: the external data of tensor {show(tensor.tensor)} should be one whole weight of "
                f"{WEIGHTS_FILE}, but bytes {tensor.offset} to {tensor.offset + tensor.length} are none; {AGAIN}."
            )
    named = {op for ops in manifest.ops.values() for op in ops.names}
    for domain, op in sorted(found.operators):
        if op == "EPContext":
            raise PackageError(
                f"{file}: EPContext runs precompiled code and is refused; export the package again without it."
            )
        if domain not in ("", "ai.onnx", OP_DOMAIN):
            raise PackageError(
                f"{file}: operators should come from ONNX itself or {OP_DOMAIN}, but {show(op)} comes from "
                f"{show(domain)}; {AGAIN} with standard operators."
            )
        if domain == OP_DOMAIN and op not in named:
            raise PackageError(
                f"{file}: {MANIFEST_FILE} should name every operator of {OP_DOMAIN}, but {show(op)} is used and not "
                f"in ops; {AGAIN}."
            )
    for domain, function in sorted(found.functions):
        if domain != OP_DOMAIN:
            raise PackageError(
                f"{file}: functions should be defined in {OP_DOMAIN}, but {show(function)} is defined in "
                f"{show(domain)}; {AGAIN}."
            )
    if found.ir_version != manifest.ir_version:
        wrong(f"{file}: ir_version", f"{manifest.ir_version} as in {MANIFEST_FILE}", found.ir_version)
    versions = {"": manifest.opset, "ai.onnx": manifest.opset, OP_DOMAIN: 1}
    for domain, version in sorted(found.opset_imports):
        # Imports from other domains are harmless, as none of their operators is used.
        if version != versions.get(domain, version):
            wrong(f"{file}: the imported opset of {show(domain)}", f"{versions[domain]}", version)
    return found.steps


# --- Arrays as safetensors -----------------------------------------------------------------------


def weight_layout(weights: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the bytes of weights.safetensors and where each weight lies in them.

    The second value maps a name to (offset, length) in bytes from the start of the file, as ONNX
    external data wants them. Equal names, shapes and dtypes give equal offsets, whatever the order
    of the mapping and the values of the weights.
    """
    data = safetensors_bytes(weights)
    header = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + header])
    offsets = {key: entries[key]["data_offsets"] for key in weights}
    return data, {key: (8 + header + begin, end - begin) for key, (begin, end) in offsets.items()}


def safetensors_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    check_arrays(tensors)
    # safetensors copies memory as it lies: give it little-endian arrays in C order.
    arrays = {
        key: np.asarray(tensors[key], dtype=tensors[key].dtype.newbyteorder("<"), order="C") for key in sorted(tensors)
    }
    return bytes(safetensors_numpy.save(arrays))


def check_table(argument: str, table: object, needed: bool = False) -> None:
    if needed or table is not None:
        instance(table, argument, Mapping, "a dict")


def check_arrays(weights: Mapping[str, object]) -> None:
    check_table("weights", weights, needed=True)
    for key, array in weights.items():
        if not isinstance(key, str) or key == RESERVED_NAME or not key or surrogate(key):
            raise refused("weights", "names like those of a state dict", show(key), "rename it")
        if not isinstance(array, np.ndarray) or array.dtype.name not in SAFETENSORS_DTYPES:
            came = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            expected = f"numpy arrays of dtype {', '.join(SAFETENSORS_DTYPES)}"
            raise refused("weights", expected, f"{came} for {show(key)}", "convert it first")
