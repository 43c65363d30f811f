"""The domains of `icnnrt.mathematics.domains` on tensors, with its symbols: what the bundle method has to know of each.

s, u, y, z [B, m, n] throughout: rows over y. Nothing here is recorded by autograd but where it says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from icnnrt.mathematics import domains
from icnnrt.mathematics.reference import LOGIT_BOUND, LOGIT_STEP

__all__ = ["MODELS", "SIMPLEX", "SPACE", "UNIT_BOX", "Domain"]


@dataclass(frozen=True)
class Domain:
    """One domain with its regulariser R."""

    name: str
    centre: Callable[[int], float]  # c of R^n
    point: Callable[[Tensor], Tensor]  # y(s)
    centred: Callable[[Tensor, Tensor | None], Tensor]  # (s, out) -> y(s) − c
    conjugate: Callable[[Tensor], Tensor]  # C(s), [B, m]
    curvature: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (s, a, out) -> D a
    root: Callable[[Tensor, Tensor], Tensor]  # (s, z) -> F z, D = F F'
    root_transposed: Callable[[Tensor, Tensor], Tensor]  # (s, a) -> F'a
    regulariser: Callable[[Tensor], Tensor]  # R(y), [..., n] -> [...]
    reach: Callable[[Tensor], Tensor]  # slopes [B, k, n] -> [B, k, 1]: about the most that G(y − c) can be
    plain: Callable[[Tensor], Tensor]  # slopes that say the same with less rounding
    scaled: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # G, e [B, k, 1] -> cuts with the same λ
    first_logits: Callable[[Tensor, float], Tensor]  # (s, bound) -> u
    next_logits: Callable[[Tensor, Tensor], Tensor]  # (u, du) -> u; du is overwritten

    @property
    def role(self) -> str:
        """What its operators are called in `icnnrt.serving.operators`, less "_solve" and "_adjoint"."""
        return "bundle_" + domains.MODELS[self.name].operators.removeprefix("Bundle").lower()


def _same(a: Tensor) -> Tensor:
    return a


def _same_cuts(G: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    return G, e


# ---------------------------------------------------------------- [0, 1]^n


def _box_centred(s: Tensor, out: Tensor | None) -> Tensor:
    return torch.sigmoid(s, out=out).sub_(0.5)


def _box_conjugate(s: Tensor) -> Tensor:
    # softplus(s) − ½ s in the form that does not cancel for large |s|.
    return (0.5 * s.abs() + torch.log1p(torch.exp(-s.abs()))).sum(-1)


def _box_curvature(s: Tensor, a: Tensor, out: Tensor | None) -> Tensor:
    return torch.mul(a, torch.sigmoid(s) * torch.sigmoid(-s), out=out)  # never a/(1/y + 1/(1−y)): that overflows


def _box_root(s: Tensor, z: Tensor) -> Tensor:
    return (torch.sigmoid(s) * torch.sigmoid(-s)).sqrt() * z


def _negative_entropy(y: Tensor) -> Tensor:
    return -(torch.special.entr(y) + torch.special.entr(1.0 - y)).sum(-1)


def _box_first_logits(s: Tensor, bound: float) -> Tensor:
    return s.clamp(-bound, bound)


def _box_next_logits(u: Tensor, du: Tensor) -> Tensor:
    return (u + du.clamp_(-LOGIT_STEP, LOGIT_STEP)).clamp_(-LOGIT_BOUND, LOGIT_BOUND)


UNIT_BOX: Final = Domain(
    name=domains.UNIT_BOX.name,
    centre=domains.UNIT_BOX.centre,
    point=torch.sigmoid,
    centred=_box_centred,
    conjugate=_box_conjugate,
    curvature=_box_curvature,
    root=_box_root,
    root_transposed=_box_root,
    regulariser=_negative_entropy,
    reach=lambda G: 0.5 * G.abs().sum(2, keepdim=True),
    plain=_same,
    scaled=_same_cuts,
    first_logits=_box_first_logits,
    next_logits=_box_next_logits,
)


# ---------------------------------------------------------------- the simplex


def _softmax(s: Tensor) -> Tensor:
    return torch.softmax(s, dim=-1)


def _simplex_centred(s: Tensor, out: Tensor | None) -> Tensor:
    return torch.softmax(s, dim=-1, out=out).sub_(1.0 / s.shape[-1])


def _simplex_root_transposed(s: Tensor, a: Tensor) -> Tensor:
    y = _softmax(s)
    return y.sqrt() * (a - (y * a).sum(-1, keepdim=True))


def _simplex_root(s: Tensor, z: Tensor) -> Tensor:
    y = _softmax(s)
    q = y.sqrt()
    return q * z - y * (q * z).sum(-1, keepdim=True)


def _simplex_curvature(s: Tensor, a: Tensor, out: Tensor | None) -> Tensor:
    """y∘b − y Σ y∘b with b = a − y'a: the second term is rounding, which a saturated y needs taken off."""
    y = _softmax(s)
    b = y * (a - (y * a).sum(-1, keepdim=True))
    return torch.sub(b, y * b.sum(-1, keepdim=True), out=out)


def _simplex_first_logits(s: Tensor, bound: float) -> Tensor:
    return (s - s.amax(-1, keepdim=True)).clamp_(min=-2 * bound)


def _simplex_next_logits(u: Tensor, du: Tensor) -> Tensor:
    """u counts up to a constant; y'du = 0 is the choice under which the bounds cut off least, see the reference."""
    du = du - (_softmax(u) * du).sum(-1, keepdim=True)
    u = u + du.clamp_(-LOGIT_STEP, LOGIT_STEP)
    return (u - u.amax(-1, keepdim=True)).clamp_(min=-LOGIT_BOUND)


SIMPLEX: Final = Domain(
    name=domains.SIMPLEX.name,
    centre=domains.SIMPLEX.centre,
    point=_softmax,
    centred=_simplex_centred,
    conjugate=lambda s: torch.logsumexp(s, -1) - s.mean(-1),
    curvature=_simplex_curvature,
    root=_simplex_root,
    root_transposed=_simplex_root_transposed,
    regulariser=lambda y: -torch.special.entr(y).sum(-1),
    reach=lambda G: G.abs().amax(2, keepdim=True),
    plain=lambda G: G - G.mean(2, keepdim=True),  # where 1'y = 1 a constant in a slope changes nothing
    scaled=_same_cuts,
    first_logits=_simplex_first_logits,
    next_logits=_simplex_next_logits,
)


# ---------------------------------------------------------------- R^n


def _space_centred(s: Tensor, out: Tensor | None) -> Tensor:
    return s


def _space_curvature(s: Tensor, a: Tensor, out: Tensor | None) -> Tensor:
    return a


def _space_scaled(G: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """G/r and (e − max e)/r², the cuts of y/r: slopes no longer than 1."""
    r = torch.linalg.vector_norm(G, dim=2, keepdim=True).amax(1, keepdim=True).clamp(min=1.0)
    return G / r, (e - e.amax(1, keepdim=True)) / (r * r)


def _space_reach(G: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(G, dim=2, keepdim=True)
    return length * length.amax(1, keepdim=True)


SPACE: Final = Domain(
    name=domains.SPACE.name,
    centre=domains.SPACE.centre,
    point=_same,
    centred=_space_centred,
    conjugate=lambda s: 0.5 * (s * s).sum(-1),
    curvature=_space_curvature,
    root=lambda s, z: z + 0.0 * s,  # NaN of s is handed on
    root_transposed=lambda s, a: a + 0.0 * s,
    regulariser=lambda y: 0.5 * (y * y).sum(-1),
    reach=_space_reach,
    plain=_same,
    scaled=_space_scaled,
    first_logits=lambda s, bound: s,
    next_logits=lambda u, du: u + du,
)

MODELS: Final = {
    name: {domains.UNIT_BOX: UNIT_BOX, domains.SIMPLEX: SIMPLEX, domains.SPACE: SPACE}[model]
    for name, model in domains.MODELS.items()
}
