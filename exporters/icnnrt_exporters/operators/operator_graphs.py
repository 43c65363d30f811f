"""The ONNX models of one node each, in icnnrt/graphs, by which Python calls the operators of ai.icnnrt.

QuadraticProgram, QPAdjoint, QPSensitivity and the two for sparse data come with the bodies that make them portable:
`icnnrt.qp` needs neither torch nor onnx. The operators of the bundle method come without, for torch's layers, which
have the same method in torch where there are no kernels. After a change of a body or a signature, `python -m
icnnrt_exporters.operators.operator_graphs` writes them anew.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import onnx
from onnx import TensorProto, helper

import icnnrt
from icnnrt.format.manifest import OP_DOMAIN
from icnnrt.mathematics.cut_model import STEPS as BUNDLE_STEPS
from icnnrt.mathematics.qp_reference import STEPS, QPCotangents, QPReference, QPSensitivity
from icnnrt.serving.operators import OPERATORS
from icnnrt_exporters.operators.bodies import functions_qp
from icnnrt_exporters.versions import IR_VERSION, OP_VERSION, OPSET

Shapes: TypeAlias = dict[str, list[str | int]]

TYPES: Final = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
# Each input has a leading axis of its own, B or 1, and those that may be absent have columns of their own, all or none.
DATA: Final[Shapes] = {
    "Q": ["B_Q", "n", "n"],
    "p": ["B_p", "n"],
    "G": ["B_G", "m", "n"],
    "h_lower": ["B_h_lower", "m_h_lower"],
    "h": ["B_h", "m"],
    "A": ["B_A", "q", "n"],
    "b": ["B_b", "q"],
    "lower": ["B_lower", "n_lower"],
    "upper": ["B_upper", "n_upper"],
    "start": ["B_start", "all_start"],
}
SOLUTION: Final[Shapes] = {
    "z": ["B", "n"],
    "lam": ["B", "m"],
    "nu": ["B", "q"],
    "mu": ["B", "n"],
    "slack": ["B", "m"],
    "box_slack": ["B", "n"],
    "residual": ["B", 3],
    "status": ["B"],
    "ray": ["B", "all"],
    "steps": ["B"],
}
# Inputs with a default, which need not be fed: of bounds and a start, no columns; of settings, one number each.
ABSENT: Final = ("h_lower", "lower", "upper", "start")
SETTINGS: Final[dict[str, int | float]] = {"tolerance": 0.0, "most_steps": STEPS, "seconds": 0.0}
BARS: Final[Shapes] = {
    "z_bar": ["B", "n"],
    "lam_bar": ["B_lam", "m_lam"],
    "nu_bar": ["B_nu", "q_nu"],
    "mu_bar": ["B_mu", "n_mu"],
}
ADJOINT: Final[Shapes] = {"d_z": ["B", "n"], "d_lam": ["B", "m"], "d_nu": ["B", "q"], "d_mu": ["B", "n"]}
SENSITIVITY: Final[Shapes] = ADJOINT | {"share": ["B"], "weak": ["B"]}
OF_ADJOINT: Final[Shapes] = {
    name: {**DATA, **SOLUTION}[name] for name in ("Q", "G", "A", "lam", "mu", "slack", "box_slack", "status")
} | BARS
PLAN: Final[Shapes] = {"plan": ["numbers"]}
assert tuple(SOLUTION) == QPReference._fields
assert tuple(ADJOINT) == QPCotangents._fields
assert tuple(SENSITIVITY) == QPSensitivity._fields
SIGNATURES: Final[dict[str, tuple[Shapes, Shapes]]] = {
    "QPSolve": (DATA, {name: shape for name, shape in SOLUTION.items() if name != "steps"}),
    "QuadraticProgram": (DATA | {name: [] for name in SETTINGS}, SOLUTION),
    "QPAdjoint": (OF_ADJOINT, ADJOINT),
    "QPSensitivity": (OF_ADJOINT, SENSITIVITY),
    "SparseQuadraticProgram": (DATA | {name: [] for name in SETTINGS} | PLAN, SOLUTION),
    "SparseQPSensitivity": (OF_ADJOINT | PLAN, SENSITIVITY),
}
KINDS: Final = {
    **dict.fromkeys(("residual", "share", "tolerance", "seconds"), TensorProto.DOUBLE),
    **dict.fromkeys(("status", "weak", "steps", "plan"), TensorProto.INT32),
    "most_steps": TensorProto.INT64,
}
CUTS: Final[Shapes] = {"slopes": ["B", "k", "n"], "offsets": ["B", "k"]}
BUNDLE: Final[dict[str, tuple[Shapes, Shapes]]] = {
    "Solve": (
        CUTS | {"lam_start": ["B", "k_start"]},
        {"y": ["B", "n"], "lam": ["B", "k"], "lower_bound": ["B"], "residual": ["B", 3]},
    ),
    "Adjoint": (CUTS | {"lam": ["B", "k"], "y_bar": ["B", "n"]}, {"c_y": ["B", "n"], "c_lam": ["B", "k"]}),
}


def qp_model(operator: str, dtype: str, **attributes: Any) -> onnx.ModelProto:
    """One node of an operator of `SIGNATURES` (QPSolve has an attribute steps), with its bodies; float32 or float64."""
    return _model(operator, SIGNATURES[operator], dtype, functions_qp(operator), **attributes)


def bundle_model(operators: str, suffix: str) -> onnx.ModelProto:
    """One node of an operator of the bundle method, `Domain.operators` + "Solve" or "Adjoint", for float64."""
    attributes = {"steps": BUNDLE_STEPS} if suffix == "Solve" else {}
    return _model(operators + suffix, BUNDLE[suffix], "float64", [], **attributes)


def _model(
    operator: str, signature: tuple[Shapes, Shapes], dtype: str, bodies: Sequence[onnx.FunctionProto], **attributes: Any
) -> onnx.ModelProto:
    inputs, outputs = signature

    def declared(name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
        T = KINDS.get(name, TYPES[dtype])
        return helper.make_tensor_value_info(name, T, shape)

    defaults = [helper.make_tensor(name, KINDS[name], [], [number]) for name, number in SETTINGS.items()]
    defaults += [helper.make_tensor(name, TYPES[dtype], [1, 0], []) for name in ABSENT]
    graph = helper.make_graph(
        [helper.make_node(operator, list(inputs), list(outputs), domain=OP_DOMAIN, **attributes)],
        operator,
        [declared(name, shape) for name, shape in inputs.items()],
        [declared(name, shape) for name, shape in outputs.items()],
        defaults if SETTINGS.keys() <= inputs.keys() else [],
    )
    return helper.make_model(
        graph,
        functions=bodies,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(OP_DOMAIN, OP_VERSION)],
        ir_version=IR_VERSION,
        producer_name="icnnrt",
    )


def operator_graphs() -> dict[str, bytes]:
    """File name in icnnrt/graphs -> what it holds."""
    models = {}
    for dtype in TYPES:
        models[f"qp_solve_{dtype}"] = qp_model("QuadraticProgram", dtype)
        models[f"qp_adjoint_{dtype}"] = qp_model("QPAdjoint", dtype)
        models[f"qp_sensitivity_{dtype}"] = qp_model("QPSensitivity", dtype)
        models[f"sparse_qp_solve_{dtype}"] = qp_model("SparseQuadraticProgram", dtype)
        models[f"sparse_qp_sensitivity_{dtype}"] = qp_model("SparseQPSensitivity", dtype)
    for role, operator in OPERATORS.items():
        if role.startswith("bundle_"):
            suffix = role.rpartition("_")[2].capitalize()
            models[f"{role}_float64"] = bundle_model(operator.removesuffix(suffix), suffix)
    return {f"{name}.onnx": model.SerializeToString(deterministic=True) for name, model in models.items()}


def main() -> None:
    """Write them where icnnrt is."""
    folder = Path(icnnrt.__file__).parent / "graphs"
    folder.mkdir(exist_ok=True)
    for name, data in operator_graphs().items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
