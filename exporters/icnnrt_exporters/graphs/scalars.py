"""Exact float64 scalars.

torch.onnx writes a Python float as a float32 constant even into a float64 graph: 0.1 becomes 0.10000000149. So every
float that float32 cannot hold is lifted out of its node into a float64 tensor before conversion.
"""

from typing import Any

import torch
from torch import fx

from icnnrt.errors import ExportError

aten = torch.ops.aten

# Overloads that take a number, and their twins that take a tensor in the same place.
TENSOR_TWIN = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.pow.Scalar: aten.pow.Tensor_Tensor,
    aten.eq.Scalar: aten.eq.Tensor,
    aten.ne.Scalar: aten.ne.Tensor,
    aten.lt.Scalar: aten.lt.Tensor,
    aten.le.Scalar: aten.le.Tensor,
    aten.gt.Scalar: aten.gt.Tensor,
    aten.ge.Scalar: aten.ge.Tensor,
    aten.fmod.Scalar: aten.fmod.Tensor,
    aten.remainder.Scalar: aten.remainder.Tensor,
    aten.clamp_min.default: aten.clamp_min.Tensor,
    aten.clamp_max.default: aten.clamp_max.Tensor,
    aten.clamp.default: aten.clamp.Tensor,
    aten.where.ScalarSelf: aten.where.self,
    aten.where.ScalarOther: aten.where.self,
    aten.where.Scalar: aten.where.self,
}


def lift_float64_scalars(module: fx.GraphModule) -> None:
    """Replace, in place, every Python float that float32 rounds. For graphs of float64 tensors."""
    lifted: dict[float, str] = {}

    def tensor_of(value: float, before: fx.Node) -> fx.Node:
        if value not in lifted:
            lifted[value] = f"_scalar_{len(lifted)}"
            module.register_buffer(lifted[value], torch.tensor(value, dtype=torch.float64))
        with module.graph.inserting_before(before):
            node = module.graph.get_attr(lifted[value])
            node.meta["val"] = torch.tensor(value, dtype=torch.float64)
            return node

    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        target, args = node.target, list(node.args)
        if target is torch.ops.icnnrt.qp_solve.default:  # whose translation writes its tolerance in float64
            continue
        if target in (aten.full.default, aten.scalar_tensor.default, aten.full_like.default):
            position = 0 if target is aten.scalar_tensor.default else 1
            if _rounds(args[position]) and node.kwargs.get("dtype", torch.float64) is torch.float64:
                tensor = tensor_of(args[position], node)
                args[position] = 1.0
                with module.graph.inserting_after(node):
                    ones = node
                    product = module.graph.call_function(aten.mul.Tensor, (ones, tensor))
                    product.meta = dict(node.meta)
                node.replace_all_uses_with(product, delete_user_cb=lambda user, p=product: user is not p)
                node.args = tuple(args)
            continue
        if target is aten.rsub.Scalar and _rounds(args[1]):
            node.target, node.args = aten.sub.Tensor, (tensor_of(args[1], node), args[0])
            continue
        found = [i for i, a in enumerate(args) if _rounds(a)]
        if not found or any(_rounds(v) for v in node.kwargs.values()):
            if any(_rounds(v) for v in node.kwargs.values()):
                raise _refusal(node)
            continue
        if target in TENSOR_TWIN:
            node.target = target = TENSOR_TWIN[target]
            # The twin takes tensors in every one of these places, also for numbers that need no lifting.
            found = [i for i, a in enumerate(args) if isinstance(a, float | int) and not isinstance(a, bool)]
        for i in found:
            if not isinstance(target._schema.arguments[i].type, torch.TensorType | torch.OptionalType):
                raise _refusal(node)
            args[i] = tensor_of(float(args[i]), node)
        node.args = tuple(args)
    module.graph.lint()
    module.recompile()


def _rounds(value: Any) -> bool:
    return isinstance(value, float) and float(torch.tensor(value, dtype=torch.float32)) != value and value == value


def _refusal(node: fx.Node) -> ExportError:
    return ExportError(
        f"energy: {node.target} takes the constant {[a for a in node.args if isinstance(a, float)]}, which ONNX would "
        "round to float32 in a float64 graph; write the operation with a float64 tensor instead"
    )
