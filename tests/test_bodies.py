"""What the portable bodies of ai.icnnrt's operators are made of; test_cut_models.py tells that they answer rightly."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from cut_models import TYPES, model
from onnx_functions import all_nodes, check_portable

from icnnrt.mathematics.cut_model import LAM_FLOOR, SLACK_FLOOR
from icnnrt.mathematics.domains import MODELS, NAMES, SIMPLEX, SPACE, UNIT_BOX
from icnnrt.mathematics.namespace import EPS
from icnnrt_exporters.operators.bodies import functions

# Nodes in each Loop's body, constants aside.
STEP_NODES, SWEEP_NODES, ELIMINATION_NODES = 112, 11, 11


@pytest.mark.parametrize("domain", [UNIT_BOX, SIMPLEX, SPACE], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("op", "attributes"), [("Solve", {"steps": 5}), ("Adjoint", {})])
def test_the_models_pass_onnx_checker(op, attributes, dtype, domain):
    onnx.checker.check_model(model(op, dtype, domain, **attributes), full_check=True)


@pytest.mark.parametrize("name", NAMES)
def test_bodies_come_with_all_they_call(name):
    bodies = functions(name)
    known = {body.name for body in bodies}
    assert {MODELS[name].operators + suffix for suffix in ("Solve", "Adjoint")} <= known

    for body in bodies:
        for node in all_nodes(body.node):
            assert node.domain == "" or node.op_type in known
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                assert onnx.numpy_helper.to_array(node.attribute[0].t).dtype in (np.float64, np.int64, np.bool_)


def loop_bodies(function):
    loops = (node for node in all_nodes(function.node) if node.op_type == "Loop")
    return [attribute.g for loop in loops for attribute in loop.attribute if attribute.name == "body"]


def test_functions_are_portable():
    assert {"BundleEntropySolve", "BundleEntropyAdjoint"} <= {f.name for f in functions()}
    # ONNX Runtime's float64 Sigmoid loses the lower tail; the others have no float64 kernel for CPUs.
    check_portable(functions(), banned=("Sigmoid", "Softplus", "Mean"))


def test_no_constant_was_rounded_to_float32():
    """Float constants are float64 tensors, and come from nowhere but the tables of the reference."""
    known = {0.0, 0.5, 1.0, 2.0, 4.0, 45.0, 0.25, 3.0, 0.1, 0.9, 0.99, 1e-13, 1e-30}
    known |= {m * EPS for m in (2, 4, 10)} | {LAM_FLOOR, SLACK_FLOOR}
    for function in functions():
        for node in all_nodes(function.node):
            if node.op_type != "Constant":
                continue
            (attribute,) = node.attribute
            assert attribute.name in ("value", "value_int", "value_ints")
            if attribute.name == "value":
                array = onnx.numpy_helper.to_array(attribute.t)
                assert array.dtype in (np.float64, np.int64, np.bool_)
                if array.dtype == np.float64:
                    assert set(np.abs(array).ravel().tolist()) <= known


def test_loops_stay_small():
    """About half a microsecond a node, for every step of every solve: growth should be noticed."""

    def count(graph):
        return sum(node.op_type != "Constant" for node in graph.node)

    by_name = {f.name: f for f in functions()}
    assert count(loop_bodies(by_name["BundleEntropySolve"])[0]) <= STEP_NODES
    assert count(loop_bodies(by_name["InverseSPD"])[0]) <= SWEEP_NODES
    assert count(loop_bodies(by_name["SolveSPD"])[0]) <= ELIMINATION_NODES
    assert count(by_name["InverseSPD"]) <= 15
    assert not loop_bodies(by_name["BundleEntropyAdjoint"])


def test_functions_are_the_same_in_every_process():
    """Python's hash seed decides the order of sets, and translators iterate over sets."""
    program = (
        "import hashlib; from icnnrt_exporters.operators.bodies import functions;"
        "print(hashlib.sha256(b''.join(f.SerializeToString(deterministic=True) for f in functions())).hexdigest())"
    )
    here = hashlib.sha256(b"".join(f.SerializeToString(deterministic=True) for f in functions())).hexdigest()
    path = os.pathsep.join(p for p in sys.path if p)
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        there = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
        assert there.strip() == here
