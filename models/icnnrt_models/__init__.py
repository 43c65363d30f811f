"""Input-convex networks in torch: energies f(x, y; θ) -> [batch], convex in y; and quadratic programs as layers."""

from icnnrt_models.activations import CELU, ConvexActivation, LeakyReLU, ReLU, Softplus
from icnnrt_models.argmin import ArgminResult, BundleEntropyArgmin
from icnnrt_models.bregman import BregmanProximalGradient, BregmanResult
from icnnrt_models.energy import ContextEnergy, Energy
from icnnrt_models.ficnn import FICNN
from icnnrt_models.nonnegative import NonNegativeLinear
from icnnrt_models.picnn import PICNN
from icnnrt_models.polyhedron import PolyhedronArgmin, PolyhedronResult
from icnnrt_models.quadratic_program import QPLayer, QPResult

__all__ = [
    "CELU",
    "FICNN",
    "PICNN",
    "ArgminResult",
    "BregmanProximalGradient",
    "BregmanResult",
    "BundleEntropyArgmin",
    "ContextEnergy",
    "ConvexActivation",
    "Energy",
    "LeakyReLU",
    "NonNegativeLinear",
    "PolyhedronArgmin",
    "PolyhedronResult",
    "QPLayer",
    "QPResult",
    "ReLU",
    "Softplus",
]
