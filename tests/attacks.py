"""Good packages and hostile ones, built byte by byte: the fixtures of test_package.py."""

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from icnnrt.errors import PackageError
from icnnrt.format import package, signatures
from icnnrt.format.contents import weight_layout

ROLES = ("value", "argmin", "adjoint")


def weights() -> dict[str, np.ndarray]:
    """Weights named as a torch state dict names them, of several dtypes and ranks."""
    return {
        "z_layers.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 8,
        "y_layers.0.bias": np.array([-1.0, 0.5, 2.0], dtype=np.float32),
        "bn.num_batches_tracked": np.array(7, dtype=np.int64),
    }


def external_tensor(name: str = "z_layers.0.weight", **entries: str) -> onnx.TensorProto:
    """A tensor of `name` in weights.safetensors, with external_data entries overridden."""
    offset, length = weight_layout(weights())[1][name]
    array = weights()[name]
    tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
    tensor.data_location = TensorProto.EXTERNAL
    given = {"location": "weights.safetensors", "offset": str(offset), "length": str(length), **entries}
    for key, value in given.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(change: Callable[[onnx.ModelProto], None] | None = None) -> bytes:
    """A small graph with external weights, a custom op and its portable body; `change` edits it."""
    vector = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in ("y", "out")]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("ai.icnnrt", 1)]
    body = helper.make_function(
        "ai.icnnrt", "BundleEntropySolve", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], imports
    )
    nodes = [
        helper.make_node("Add", ["y", "y_layers.0.bias"], ["s"]),
        helper.make_node("BundleEntropySolve", ["s"], ["out"], domain="ai.icnnrt"),
    ]
    tensors = [external_tensor("z_layers.0.weight"), external_tensor("y_layers.0.bias")]
    graph = helper.make_graph(nodes, "g", vector[:1], vector[1:], tensors)
    result = helper.make_model(graph, opset_imports=imports, functions=[body], ir_version=10)
    if change:
        change(result)
    return result.SerializeToString()


def fields(**changes: Any) -> dict[str, Any]:
    """The arguments of `package.write` for a good package."""
    return {
        "name": "tiny",
        "dtype": "float32",
        "x_shape": (4,),
        "y_shape": (3,),
        "solver": package.SolverSpec(iterations=10, steps=12, gap_tolerance=1e-4, residual_tolerance=1e-3),
        "graphs": dict.fromkeys(ROLES, model()),
        "weights": weights(),
        "nonnegative": ["z_layers.0.weight"],
        "trainable": ["z_layers.0.weight", "y_layers.0.bias"],
        "producer": {"icnnrt": "0.1.0"},
        "parity": {"value": 1e-7, "argmin": {"max": 2e-6, "mean": 1e-7}},
        "metadata": {"dataset": "digits", "epochs": 3, "note": None, "clamped": True},
        **changes,
    }


def good(path: Path, **changes: Any) -> Path:
    """Write a good package."""
    package.write(path, **fields(**changes))
    return path


def training(**changes: Any) -> package.TrainingSpec:
    """What a package says of train.onnx."""
    given: dict[str, Any] = {
        "loss": "squared_error",
        "optimizer": "Adam",
        "settings": {"betas[0]": 0.9, "betas[1]": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        "slots": ("exp_avg", "exp_avg_sq"),
        "weights": ("z_layers.0.weight", "y_layers.0.bias"),
        "adjoint": "exact",
        "clip_norm": 1.0,
        "target_shape": (3,),
        "target_dtype": "float32",
        **changes,
    }
    return package.TrainingSpec(**given)


def tunable(path: Path, **changes: Any) -> Path:
    """Write a good package with a train.onnx, though one that could not run."""
    return good(path, graphs=dict.fromkeys((*ROLES, "train"), model()), train=training(), **changes)


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change manifest.json and nothing else."""
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def reseal(path: Path) -> None:
    """Make sizes, hashes and what graphs take and give true again in the manifest, as an attacker would."""

    def change(content: dict[str, Any]) -> None:
        for role, entry in content["graphs"].items():
            if "inputs" in entry:  # not in format 1
                data = (path / entry["file"]).read_bytes()
                with contextlib.suppress(PackageError):
                    found = signatures.declared(data, f"{role}.onnx", content["weights"]["tensors"])
                    entry.update(inputs=told(found.inputs), outputs=told(found.outputs))
        for entry in (*content["graphs"].values(), content["weights"]):
            data = (path / entry["file"]).read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit_manifest(path, change)


def told(tensors: Mapping[str, signatures.Tensor]) -> dict[str, Any]:
    """As a manifest tells them."""
    return {
        name: {"dtype": dtype, "shape": list(shape)} | ({} if default is None else {"default": default})
        for name, (dtype, shape, default) in tensors.items()
    }


def plant(path: Path, file: str, data: bytes) -> None:
    """Put other bytes into a file of the package, with a manifest that agrees."""
    (path / file).write_bytes(data)
    reseal(path)


def safetensors(header: object, data: bytes, *, claim: int | None = None) -> bytes:
    """A safetensors file with any header at all; `claim` is the header length it states."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if claim is None else claim) + text + data


# Protobuf by hand, for what onnx cannot be made to write.


def varint(value: int) -> bytes:
    """An unsigned integer, seven bits a byte."""
    head = b""
    while value > 0x7F:
        head, value = head + bytes([value & 0x7F | 0x80]), value >> 7
    return head + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    """One field: bytes are length-prefixed, an integer is a varint."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(key: str, value: str) -> bytes:
    """One external_data entry, as a field of TensorProto."""
    return field(13, field(1, key.encode()) + field(2, value.encode()))


def evil_tensor(location: str = "../../secret") -> onnx.TensorProto:
    """A tensor that reads another file."""
    return external_tensor(location=location)


def evil_subgraph(location: str = "../../secret") -> onnx.GraphProto:
    """A graph whose only content is a tensor that reads another file."""
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 3])
    return helper.make_graph([], "sub", [], [out], [evil_tensor(location)])
