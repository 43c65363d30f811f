"""Input-convex networks in torch: energies f(x, y; θ) -> [batch], convex in y; and quadratic programs as layers."""

from icnnrt.mathematics.bundle import Trajectory as ArgminResult
from icnnrt_models.layers.argmin import BundleEntropyArgmin
from icnnrt_models.layers.bregman import BregmanProximalGradient, BregmanResult
from icnnrt_models.layers.polyhedron import PolyhedronArgmin
from icnnrt_models.layers.polyhedron_result import PolyhedronResult
from icnnrt_models.layers.quadratic_program import QPLayer, QPResult
from icnnrt_models.networks.activations import CELU, ConvexActivation, LeakyReLU, ReLU, Softplus
from icnnrt_models.networks.energy import ContextEnergy, Energy
from icnnrt_models.networks.ficnn import FICNN
from icnnrt_models.networks.nonnegative import NonNegativeLinear
from icnnrt_models.networks.picnn import PICNN

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
