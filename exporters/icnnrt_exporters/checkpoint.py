"""An energy from a factory named on the command line, and its trained weights from a file."""

import importlib
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from icnnrt.arguments import refused
from icnnrt.errors import ExportError, InputError
from icnnrt_exporters.checks.preconditions import SOLVER, Solver
from icnnrt_exporters.tracing.place import kind_and_line
from icnnrt_models import BregmanProximalGradient, BundleEntropyArgmin, PolyhedronArgmin

NAMED: Final = 5  # how many names a sentence lists
# Where training scripts keep the state dict within a larger dictionary.
NESTED: Final = ("state_dict", "model_state_dict", "model")


def make(factory: str) -> nn.Module:
    """Call FACTORY of "MODULE:FACTORY" without arguments; the working directory is searched first, as `python -m` does.

    FACTORY is a function or class that makes an energy or a solver around one, or such an object itself. Raises
    `InputError` naming what cannot be found or called.
    """
    module_name, colon, attribute = factory.partition(":") if isinstance(factory, str) else ("", "", "")
    if not (colon and module_name and attribute):
        raise refused("factory", "MODULE:FACTORY, such as icnnrt_models.digits:energy", repr(factory), "name it so")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise InputError(f"factory: {module_name} imports {error.name}, which is not installed.") from error
        raise InputError(
            f"factory: no module {error.name!r}; run this where it can be imported, such as the folder it lies in."
        ) from error
    except Exception as error:
        raise InputError(f"factory: importing {module_name} failed ({kind_and_line(error)}).") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            made = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise InputError(
                f"factory: {module_name} has no {attribute!r}; it can call {_listed(sorted(made)) or 'nothing'}."
            )
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise InputError(f"factory: {factory} is {type(found).__name__}, which cannot be called; name a function.")
        try:
            found = found()
        except Exception as error:
            raise InputError(
                f"factory: {factory}() failed ({kind_and_line(error)}); name a function that needs no arguments."
            ) from error
    if not isinstance(found, nn.Module):
        raise InputError(
            f"factory: expected {factory}() to return a torch.nn.Module, but got {type(found).__name__}; return the "
            "energy."
        )
    return found


def is_solver(module: nn.Module) -> bool:
    """It is a layer that `export` takes as its solver, and no energy."""
    if isinstance(module, PolyhedronArgmin):
        return True
    return all(hasattr(module, name) for name in SOLVER) and isinstance(module.energy, nn.Module)


def load(module: nn.Module, path: Path) -> None:
    """Load the state dict at `path`, a .safetensors, .pt or .pth, into `module`; names and shapes must agree exactly.

    Of a solver either the layer's or its energy's names will do. Nothing is unpickled but tensors and
    plain containers. Raises `InputError` with what differs and the remedy; the module is unchanged then.
    """
    state = read(path)
    if is_solver(module) and not any(name.startswith("energy.") for name in state):
        module = module.get_submodule("energy")
    own = module.state_dict()
    wrong = [
        (f"missing {_listed(sorted(own.keys() - state.keys()))}", own.keys() - state.keys()),
        (f"unexpected {_listed(sorted(state.keys() - own.keys()))}", state.keys() - own.keys()),
    ]
    shapes = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    wrong.append((f"of another shape {_listed(shapes)}", set(shapes)))
    differences = [text for text, names in wrong if names]
    if differences:
        raise InputError(
            f"{path}: the checkpoint is not of this model: {'; '.join(differences)}; "
            "let the factory build the model with the settings it was trained with, or rename the tensors."
        )
    module.load_state_dict(state)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors at `path` by name."""
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise InputError(
            f"{path}: expected a .safetensors, .pt or .pth, but got {suffix or 'no suffix'!r}; save model.state_dict()."
        )
    if not path.is_file():
        raise InputError(f"{path}: there is no such file.")
    found: Any
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors (a whole module, say), and loading that would run its code; "
            "save model.state_dict() instead."
        ) from error
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a checkpoint ({kind_and_line(error)}); save it again.") from error
    if isinstance(found, Mapping):
        for key in NESTED:
            if isinstance(found.get(key), Mapping):
                found = found[key]
                break
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise InputError(
            f"{path}: expected a dictionary of tensors, but got {type(found).__name__} of other things; "
            "save model.state_dict()."
        )
    return {str(name): tensor for name, tensor in found.items()}


def settings(
    made: nn.Module,
    *,
    n: int | None,
    iterations: int | None,
    steps: int | None,
    gap_tolerance: float | None,
    domain: str | None = None,
    mu: float | None = None,
) -> Solver | PolyhedronArgmin:
    """The layer to export: what is given here, else what the factory's solver was made with, else the defaults.

    The class is that of the factory's solver, the bundle method for an energy. Raises `InputError` for a setting that
    this solver does not have.
    """
    given: dict[str, Any] = {
        "y_dim": n,
        "iterations": iterations,
        "steps": steps,
        "gap_tolerance": gap_tolerance,
        "domain": domain,
        "mu": mu,
    }
    given = {key: value for key, value in given.items() if value is not None}
    kind: type[nn.Module] = BundleEntropyArgmin
    energy, kept = made, {}
    if is_solver(made):
        energy = made.get_submodule("energy")
        names = ["iterations", "gap_tolerance", "y_dim", "domain", "mu"]
        if isinstance(made, BregmanProximalGradient):
            kind = BregmanProximalGradient
            names.append("step_size")
        elif isinstance(made, BundleEntropyArgmin):
            names += ["steps", "residual_tolerance", "adjoint"]
        elif isinstance(made, PolyhedronArgmin):
            kind, names = PolyhedronArgmin, ["iterations", "mu", "y_dim", "tolerance", "adjoint", "on_unsafe"]
        else:
            names = []
        unknown = sorted(key for key in given.keys() - set(names) if given[key] != getattr(made, key, None))
        if unknown:
            option = unknown[0].replace("_", "-").replace("y-dim", "n")
            raise InputError(f"{option}: {type(made).__name__} has no such setting to change; leave --{option} out.")
        if not names:
            return cast(Solver, made)
        kept = {key: getattr(made, key) for key in names}
    try:
        return cast(Solver, kind(energy, **{key: v for key, v in {**kept, **given}.items() if v is not None}))
    except ValueError as error:
        raise ExportError(str(error).removesuffix(".")) from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
