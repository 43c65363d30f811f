"""The quadratic programs of the bundle method over a polyhedron, for energies in torch.

They are small, have statuses that are asked one by one, and are solved where that is done: on the CPU, in float64, by
the native kernels where there are any, else as stated in numpy. Nothing here is recorded by autograd.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icnnrt.mathematics import qp_reference
from icnnrt.mathematics.bundle_qp import qp_existing
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.qp_reference import QP, QPCotangents, QPReference
from icnnrt.mathematics.qp_reliability import existing
from icnnrt.mathematics.qp_settings import Settings
from icnnrt_models.layers import qp_operators

Array = NDArray[np.float64]


def solve(qp: QP, start: tuple[Array, Array, Array, Array] | None, steps: int = qp_reference.STEPS) -> QPReference:
    """As `qp_reference.qp_solve`."""
    found = qp_operators.kernels(torch.float64)
    if found is None:
        return qp_reference.qp_solve(qp, start, steps)
    row = np.empty((1, 0)) if start is None else np.concatenate(start, axis=1)
    return QPReference(*found.solve((*qp, row), **Settings(steps=steps).feeds()))


def differentiate(Q: Array, G: Array, A: Array, solution: QPReference, z_bar: Array) -> QPCotangents:
    """As `icnnrt.mathematics.bundle_qp.qp_existing`."""
    found = qp_operators.kernels(torch.float64)
    if found is None:
        return qp_existing(Q, G, A, solution, z_bar)
    s, none = solution, np.empty((1, 0))
    given = (Q, G, A, s.lam, s.mu, s.slack, s.box_slack, s.status, z_bar, none, none, none)
    *d, share, _ = found.sensitivity(given)
    return QPCotangents(*existing(NUMPY, d, share))


def on(like: Tensor, a: NDArray[np.generic]) -> Tensor:
    """An array on the device of a tensor."""
    return torch.from_numpy(np.ascontiguousarray(a)).to(like.device)


def array(t: Tensor) -> Array:
    """A tensor's numbers in float64."""
    return t.detach().double().numpy(force=True)
