"""Tries the installed icnnrt, its native library and packages as they are written now in the installed onnxruntime.

Called by onnxruntime_versions.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

import icnnrt
from icnnrt.checking.verify import verify
from icnnrt.mathematics import reference

models, packages, written = map(Path, sys.argv[1:])
version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}


def session(name: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(icnnrt.ops_library())
    return onnxruntime.InferenceSession(str(models / name), options, providers=["CPUExecutionProvider"])


def error_of(call: object) -> str:
    try:
        call()  # type: ignore[operator]
    except Exception as error:
        return str(error)
    raise AssertionError("expected an error")


if version < (1, 17):
    message = error_of(lambda: session("BundleEntropySolve.float32.onnx"))
    wanted = "expected an onnxruntime that offers version 17 of its C interface, as 1.17 and later do, but this is"
    assert f"{wanted} {onnxruntime.__version__}; install another" in message, message
    print(f"onnxruntime {onnxruntime.__version__}: refused in one sentence")
    sys.exit()

rng = np.random.default_rng(0)
G, e, y_bar = 3 * rng.standard_normal((40, 6, 30)), rng.standard_normal((40, 6)), rng.standard_normal((40, 30))
for dtype, tolerance in TOLERANCE.items():
    slopes, offsets, cotangent = (a.astype(dtype) for a in (G, e, y_bar))
    solver, back = session(f"BundleEntropySolve.{dtype}.onnx"), session(f"BundleEntropyAdjoint.{dtype}.onnx")
    feeds = {"slopes": slopes, "offsets": offsets, "lam_start": np.zeros((40, 0), dtype)}
    y, lam, lower_bound, residual = solver.run(None, feeds)
    assert (y.dtype, lam.dtype, lower_bound.dtype, residual.dtype) == (dtype, dtype, "float64", "float64")
    exact = [a.astype(np.float64) for a in (slopes, offsets)]
    expected = reference.bundle_entropy_solve(*exact)
    np.testing.assert_allclose(y, expected.y, atol=tolerance)
    np.testing.assert_allclose(lower_bound, expected.lower_bound, rtol=1e-10)
    c_y, c_lam = back.run(None, {"slopes": slopes, "offsets": offsets, "lam": lam, "y_bar": cotangent})
    expected_y, expected_lam = reference.kkt_adjoint(*exact, lam.astype(np.float64), cotangent.astype(np.float64))
    np.testing.assert_allclose(c_y, expected_y, atol=10 * tolerance)
    np.testing.assert_allclose(c_lam, expected_lam, atol=10 * tolerance)
    message = error_of(lambda: solver.run(None, {**feeds, "offsets": np.zeros((40, 7), dtype)}))  # noqa: B023
    assert "BundleEntropySolve: offsets: expected [B, k] = [40, 6]" in message, message
tried = "both operators"
if version >= (1, 18):
    package = packages / "digits_completion" / "digits_completion.icnn"
    x = rng.uniform(size=(5, 32)).astype(np.float32)
    native, portable = (icnnrt.load(package, native=flag) for flag in (True, False))
    a, b = native.argmin(x), portable.argmin(x)
    assert a.info["native"]
    assert not b.info["native"]
    np.testing.assert_allclose(a.y, b.y, atol=1e-4)
    np.testing.assert_allclose(native.vjp(a, a.y).x, portable.vjp(b, b.y).x, atol=1e-2, rtol=1e-2)
    for package in sorted(written.iterdir()):
        for flag in (True, False):
            for x_seed in range(2):  # calls after the first one too, of which onnxruntime knows the sizes
                report = verify(package, native=flag, seed=x_seed)
                assert report.passed, (
                    package.name,
                    flag,
                    [check for check in report.checks if check.verdict == "fail"],
                )
    tried += f", a package of old and {len(list(written.iterdir()))} written now"
print(f"onnxruntime {onnxruntime.__version__}: {tried}")
