"""Whether TorchScript and torch.export files compute what a package computes: the checks of `icnnrt verify`.

Both sides run in the package's dtype, on its golden inputs and on samples as `verify` draws them; y lies in [0, 1]^n.
A figure is max |file − package| / max(1, max |package|), its bound that of a fresh export (`parity.TOLERANCE`).
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

import icnnrt
from icnnrt.checking.report import Check
from icnnrt.checking.trial import contexts
from icnnrt.errors import InputError
from icnnrt.format.package import Package, opened
from icnnrt.serving.load import AnySession
from icnnrt_exporters.checks import parity
from icnnrt_exporters.graphs.onnx_head import quiet
from icnnrt_exporters.torch_files.program import ANSWERS
from icnnrt_exporters.torch_files.torchscript import check_torchscript
from icnnrt_exporters.tracing.place import first_line

T = TypeVar("T")
HEADS: Final = {len(names): names for names in ANSWERS.values()}  # what a program returns, by how many
NAMES: Final = {"exact": "adjoint"}  # of a figure, where it is called otherwise here


def compare(
    package: str | os.PathLike[str] | Package,
    torchscript: Path | None,
    programs: Sequence[Path],
    x: object = None,
    *,
    samples: int = 64,
    seed: int = 0,
    native: bool | None = None,
) -> list[Check]:
    """Compare files of torch with the package: value, gradient, y*, energy and, of TorchScript, the exact adjoint.

    torch.jit.load and torch.export.load run what a file holds, so these must be files you trust. x, samples, seed and
    native are those of `icnnrt.checking.verify.verify`.

    Raises `InputError` for a file that cannot be loaded, or does not take the package's inputs.
    """
    there = opened(package)
    manifest = there.manifest
    for option, path in (("torchscript", torchscript), *(("program", path) for path in programs)):
        if path is not None and not path.is_file():
            raise InputError(f"{option}: {path}: there is no such file.")
    if manifest.kind == "gradient":
        raise InputError("package: it holds a gradient alone, and files of torch hold an energy; export the energy.")
    rng = np.random.default_rng(seed)
    X = contexts(manifest, x, samples, rng)
    Y = rng.random((len(X), *manifest.y_shape)).astype(manifest.dtype)
    if {"x", "y"} <= there.golden.keys():
        X, Y = (np.concatenate([there.golden[name], array]) for name, array in (("x", X), ("y", Y)))
    checks: list[Check] = []
    with icnnrt.load(there, native=native) as session:
        if torchscript is not None:
            figures = _torchscript(torchscript, session, X, Y)
            checks += _judged("torchscript", torchscript, figures, manifest.dtype)
        for path in programs:
            checks += _judged("program", path, _program(path, session, X, Y), manifest.dtype)
    return checks


def _torchscript(path: Path, session: AnySession, X: NDArray[Any], Y: NDArray[Any]) -> Mapping[str, float]:
    _demand_argmin(session, path)
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    return _run(path, lambda: check_torchscript(path, session, x, y), "icnnrt_exporters.export_torchscript")


def _program(path: Path, session: AnySession, X: NDArray[Any], Y: NDArray[Any]) -> Mapping[str, float]:
    """Of (x, y) -> (f, ∇_y f), or of (x, y_init) -> the argmin from there, which y serves as well as any start."""

    def outputs() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            found = torch.export.load(path).module()(torch.from_numpy(X), torch.from_numpy(Y))
        if not isinstance(found, tuple | list) or len(found) not in HEADS:
            raise TypeError(f"expected {' or '.join(map(str, HEADS))} outputs")
        return found

    found = _run(path, outputs, "icnnrt_exporters.export_program")
    true: Mapping[str, NDArray[Any]]
    if len(found) == 2:
        true = dict(zip(HEADS[2], session.value_and_gradient(X, Y), strict=True))
    else:
        _demand_argmin(session, path)
        solution = session.argmin(X, y_init=Y)
        true = {"y": solution.y, "energy": solution.energy}
    return {
        name: parity.error(tensor.detach().numpy(), true[name])
        for name, tensor in zip(HEADS[len(found)], found, strict=True)
        if name in true
    }


def _run(path: Path, what: Callable[[], T], writer: str) -> T:
    try:
        with quiet():
            return what()
    except InputError:
        raise
    except Exception as error:  # of a file that is none, or another network's: torch raises many kinds
        raise InputError(
            f"{path}: torch cannot load it, or run it on this package's inputs ({first_line(error)}); write it anew "
            f"with {writer}."
        ) from error


def _demand_argmin(session: AnySession, path: Path) -> None:
    solver, domain = session.manifest.solver, session.manifest.domain
    if solver is None or domain is None:
        raise InputError(f"{path}: it has an argmin, but the package has no solver to compare it with; export one.")
    if domain.kind != "unit_box" or solver.step_size is not None:
        raise InputError(
            f"{path}: its argmin is the bundle method over 'unit_box', but the package's is {solver.name} over "
            f"{domain.kind!r}; give files of the same solver."
        )


def _judged(kind: str, path: Path, figures: Mapping[str, float], dtype: str) -> Iterator[Check]:
    for name, figure in figures.items():
        bound = parity.TOLERANCE[dtype][name]
        what = f"{path.name} against the package, relative to the largest entry or 1"
        yield Check(f"{kind}: {NAMES.get(name, name)}", figure, bound, "pass" if figure <= bound else "fail", what)
