"""torch.compile as a peer: whether it works here, found out within bounded time."""

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, Final

from benchmarks.interleaved import Missing, first_line

PATIENCE: Final = 240  # seconds for the first compilation, which also builds torch's own headers
TRIAL: Final = """
import functools, torch
from icnnrt.mathematics import cut_model, domains
from icnnrt_models.layers.namespace import TORCH
G, e = torch.rand(1, 3, 4).double(), torch.rand(1, 3).double()
torch.compile(functools.partial(cut_model.solved, TORCH, domains.UNIT_BOX), dynamic=False)(G, e)
"""


@functools.cache
def compiler() -> Missing | None:
    """Why torch.compile cannot compile the layer's solver, or None if it can; tried once, in a process of its own."""
    try:
        subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True, check=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Missing(f"torch.compile was not done after {PATIENCE} s")
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line and not line[0].isspace()]
        return Missing(f"torch.compile failed: {lines[-1][:200] if lines else error}")
    return None


def compiled(function: Callable[..., Any], *example: Any) -> Callable[..., Any] | Missing:
    """The function compiled for the sizes of these arguments and, as inductor does, for the threads torch has now."""
    import torch

    if (reason := compiler()) is not None:
        return reason
    torch._dynamo.reset()  # else it gives up after eight sizes
    fast = torch.compile(function, dynamic=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast(*example)
    except Exception as error:
        return Missing(f"torch.compile failed: {first_line(error)}")
    return fast
