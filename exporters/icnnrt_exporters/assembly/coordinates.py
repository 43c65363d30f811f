"""The change of variables y = shift + scale∘p of `icnnrt.mathematics.domains` in a graph, and what bounds it has."""

from icnnrt.format.manifest import Domain
from icnnrt.mathematics import domains
from icnnrt_exporters.operators.traced import Symbol, Traced
from icnnrt_exporters.surgery import value


class Coordinates:
    """The solver works in p, the energy in y. Where they are the same no node is added."""

    def __init__(self, xp: Traced, domain: Domain, like: Symbol) -> None:
        """For points as `like`, [batch, n]. `inputs` are the bounds of a box, [batch, n] each, or nothing."""
        self._xp, self.model = xp, domains.MODELS[domain.kind]
        self.box = bool(self.model.bounds)
        self.inputs = [value(name, like.dtype, like.shape) for name in self.model.bounds]
        self.bounds = [xp.of(v) for v in self.inputs]
        self.at = domains.Coordinates()
        if self.box:
            self.at = domains.box_coordinates(*self.bounds, xp=xp)
        elif domain.mu not in (None, 1.0):
            self.at = domains.Coordinates(0.0, xp.spread(domains.space_coordinates(domain.mu).scale, like))

    def p(self, y: Symbol) -> Symbol:
        """The p of a y in the domain."""
        p = self.at.p(y, self._xp)
        return self._xp.clip(p, 0.0, 1.0) if self.box else p

    def p_of_cuts(self, slopes: Symbol, lam: Symbol, y: Symbol) -> Symbol:
        """The p of the answer y. In a box σ(−G'λ), as (y − lower)/width loses the digits that y and lower share."""
        if not self.box:
            return self.p(y)
        xp = self._xp
        s = -(xp.row(xp.double(lam)) @ xp.double(slopes))
        return xp.like(xp.slot(self.model.point(xp, s), 0), y)

    def y(self, p: Symbol) -> Symbol:
        """The y of points p, [batch, n] or [batch, K, n], no more than upper, which rounding can exceed."""
        y = self._for(p).y(p)
        return self._xp.minimum(y, self.bounds[1] if p.rank == 2 else self._xp.row(self.bounds[1])) if self.box else y

    def scaled(self, v: Symbol) -> Symbol:
        """scale∘v: a slope in y as one in p, or a seed in p as one in y."""
        return self._for(v).scaled(v)

    def _for(self, v: Symbol) -> domains.Coordinates:
        return self.at if v.rank == 2 else self.at.of_slots(self._xp)
