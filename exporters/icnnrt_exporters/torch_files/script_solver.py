"""The bundle entropy method and its exact adjoint as TorchScript code: the statement of `icnnrt.mathematics.reference`
once more.

Problem (Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4)::

    y* = argmin over y in [0,1]^n of  f(y) − H(y),      H(y) = −Σ y log y + (1−y) log(1−y)

    primal   min over y, t of  t − H(y)   s.t.  v = e + G(y − ½) <= t·1,   e_i = f(y_i) + g_i'(½ − y_i)
    dual     max over λ in the simplex of  e'λ + ½ 1's − Σ softplus(s),   s = −G'λ
    link     y = σ(s),   D = ∂y/∂s = diag(σ(s) σ(−s))

TorchScript is a small part of Python: its compiler reads no Greek letters, no jaxtyping and no constants of a module,
so this cannot be the code of `icnnrt_models.layers.bundle_entropy`. A test holds both to the same numbers. As there,
all but the energy is float64, a vector over cuts is a column [B, k, 1] and a vector over y a row [B, 1, n].
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from icnnrt.mathematics.reference import (
    BACKTRACK,
    EPS,
    LAM_FLOOR,
    LOGIT_BOUND,
    LOGIT_STEP,
    RELUCTANCE,
    SLACK_FLOOR,
)

# Methods that the exporter adds to the traced energy; long names, since they stand beside the names of its weights.
CONTEXT = "icnnrt_context"  # (x) -> List[Tensor], everything that depends on x alone
VALUE = "icnnrt_value"  # (context, y) -> f [B]
WEIGHTS = "icnnrt_weights"  # () -> Dict[str, Tensor], every parameter by its state_dict name


class Solution(NamedTuple):
    """What `argmin` returns. y, lam and cut_points have the energy's dtype, the others are float64."""

    y: Tensor  # [B, n] the answer
    lam: Tensor  # [B, K] multipliers of the cuts
    energy: Tensor  # [B] f(y) − H(y)
    lower_bound: Tensor  # [B] no energy is below it, if f is convex
    gap: Tensor  # [B] energy − lower_bound
    residual: Tensor  # [B, 3] stationarity, feasibility, complementarity of the last model
    slopes: Tensor  # [B, K, n] g_i = ∇f(y_i)
    offsets: Tensor  # [B, K] centred: e_i = f(y_i) + g_i'(½ − y_i)
    cut_points: Tensor  # [B, K, n] y_i
    lam_history: Tensor  # [B, K, K] row k−1: the multipliers after k cuts, zero beyond the k-th
    complementarity_history: Tensor  # [B, K] of every model; an exact gradient needs all of them small


class Model(NamedTuple):
    """Solution of the k-cut model; as `icnnrt_models.layers.bundle_entropy.InnerSolution`."""

    y: Tensor
    lam: Tensor
    lower_bound: Tensor
    residual: Tensor


class State(NamedTuple):
    """An iterate of the interior point method; columns over cuts [B, k, 1], rows over y [B, 1, n]."""

    lam: Tensor
    u: Tensor  # logits
    s: Tensor  # −G'λ
    w: Tensor  # slack
    t: Tensor  # height [B, 1, 1]
    best_lam: Tensor
    best_gap: Tensor  # [B, 1, 1]


class Points(NamedTuple):
    """The energy at the cut points, still attached to its graph."""

    y: list[Tensor]  # each a leaf [B, n]
    f: list[Tensor]  # [B]
    g: list[Tensor]  # ∇_y f [B, n]


class Factors(NamedTuple):
    """LU factors of a matrix that was scaled to unit diagonal."""

    LU: Tensor
    pivots: Tensor
    scale: Tensor


class EnableGrad:
    """torch.enable_grad for TorchScript, which knows torch.no_grad alone."""

    def __init__(self) -> None:
        self.before = False

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(True)

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        torch.set_grad_enabled(self.before)


class ScriptSolver(nn.Module):
    """The energy with its K-step argmin, to be compiled by torch.jit.script.

    Methods of the compiled module, x [B, ...], y [B, n], any B, with gradients enabled or not (torch.inference_mode
    excepted: nothing can be differentiated there):

        forward(x, y_init=None) -> y [B, n]             y of argmin
        value(x, y) -> f [B]
        gradient(x, y) -> ∇_y f [B, n]
        argmin(x, y_init=None) -> Solution              y_init is ½ where not given
        vjp(x, y_bar, y_init=None) -> (theta_bar, x_bar)
            of Σ y_bar·y, y the K-step argmin: exact, by recursion through every cut point. theta_bar holds, by
            state_dict name, the gradient of every parameter that requires one, summed over the batch.
    """

    BACKTRACK: Final[tuple[float, ...]] = tuple(BACKTRACK.tolist())
    RELUCTANCE: Final[tuple[float, ...]] = tuple(RELUCTANCE.tolist())
    EPS: Final[float] = EPS
    LAM_FLOOR: Final[float] = LAM_FLOOR
    LOGIT_BOUND: Final[float] = LOGIT_BOUND
    LOGIT_STEP: Final[float] = LOGIT_STEP
    SLACK_FLOOR: Final[float] = SLACK_FLOOR
    TINY: Final[float] = torch.finfo(torch.float64).tiny

    def __init__(self, energy: Any, y_dim: int, iterations: int, steps: int) -> None:
        super().__init__()
        self.energy = energy
        # Attributes, not constants: whoever loads the file can read them.
        self.y_dim = y_dim
        self.iterations = iterations
        self.steps = steps

    def forward(self, x: Tensor, y_init: Tensor | None = None) -> Tensor:
        return self.argmin(x, y_init).y

    @torch.jit.export
    def value(self, x: Tensor, y: Tensor) -> Tensor:
        f: Tensor = self.energy(x, y)
        return f

    @torch.jit.export
    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        context: list[Tensor] = self.energy.icnnrt_context(x)
        return self.point(context, y, False)[2].detach()

    @torch.jit.export
    def argmin(self, x: Tensor, y_init: Tensor | None = None) -> Solution:
        start = self.start(x, y_init)
        with torch.no_grad():
            context: list[Tensor] = self.energy.icnnrt_context(x)
            solution = self.solve(context, start, False)[0]
        return solution

    @torch.jit.export
    def vjp(self, x: Tensor, y_bar: Tensor, y_init: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        start = self.start(x, y_init)
        assert y_bar.shape == start.shape, "y_bar must have the shape of y, [B, n], one row for each row of x"
        with EnableGrad():
            leaf = x.detach().requires_grad_()
            context: list[Tensor] = self.energy.icnnrt_context(leaf)
        with torch.no_grad():
            solution, points = self.solve(context, start, True)
            offset_bar, seed = self.adjoint(solution, points, y_bar)
        # θ̄ = Σ_i ∇θ [ē_i f(x, y_i) + (ḡ_i + ē_i (½ − y_i))' ∇_y f(x, y_i)], and x̄ likewise
        outputs: list[Tensor] = []
        seeds: list[Tensor | None] = []
        for i, f in enumerate(points.f):
            outputs.append(f)
            seeds.append(offset_bar[:, i].to(f.dtype))
            g = points.g[i]
            if g.requires_grad:
                outputs.append(g)
                seeds.append(seed[:, i].to(g.dtype))
        weights: dict[str, Tensor] = self.energy.icnnrt_weights()
        names: list[str] = []
        wanted = [leaf]
        for name, weight in weights.items():
            if weight.requires_grad:
                names.append(name)
                wanted.append(weight)
        found = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
        theta_bar: dict[str, Tensor] = {}
        for i, name in enumerate(names):
            bar = found[i + 1]
            theta_bar[name] = torch.zeros_like(wanted[i + 1]) if bar is None else bar
        x_bar = found[0]
        return theta_bar, torch.zeros_like(leaf) if x_bar is None else x_bar

    def start(self, x: Tensor, y_init: Tensor | None) -> Tensor:
        """y_init or ½, [B, n]."""
        shape = [x.size(0), self.y_dim]
        if y_init is None:
            return torch.full(shape, 0.5, dtype=x.dtype, device=x.device)
        assert y_init.shape == shape, (
            "y_init must have shape [B, n], one row for each row of x; leave it out to start from 0.5"
        )
        assert y_init.dtype == x.dtype, "y_init must have the dtype of x; convert it"
        assert bool(((y_init >= 0.0) & (y_init <= 1.0)).all()), (
            "y_init must lie in [0, 1]; clamp it, or leave it out to start from 0.5"
        )
        return y_init.detach()

    def point(self, context: list[Tensor], y: Tensor, create_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y as a leaf, f and ∇_y f."""
        with EnableGrad():
            leaf = y.detach().requires_grad_()
            f: Tensor = self.energy.icnnrt_value(context, leaf)
            assert f.requires_grad, "the energy cannot be differentiated here; leave torch.inference_mode"
            found = torch.autograd.grad([f.sum()], [leaf], create_graph=create_graph, allow_unused=True)[0]
            g = torch.zeros_like(leaf) if found is None else found
        return leaf, f, g

    def solve(self, context: list[Tensor], start: Tensor, record: bool) -> tuple[Solution, Points]:
        """K cuts from `start`: cut, solve the model, move to its solution, repeat. Algorithm 1 of the paper."""
        B, n = start.size(0), start.size(1)
        K = self.iterations
        double = torch.float64
        slopes = torch.empty([B, K, n], dtype=double, device=start.device)
        cut_points = torch.empty([B, K, n], dtype=start.dtype, device=start.device)
        offsets = torch.empty([B, K], dtype=double, device=start.device)
        complementarity_history = torch.empty([B, K], dtype=double, device=start.device)
        lam_history = torch.zeros([B, K, K], dtype=double, device=start.device)
        leaves: list[Tensor] = []
        values: list[Tensor] = []
        gradients: list[Tensor] = []
        y = start
        warm: Tensor | None = None
        solution = Model(y, y, y, y)
        for k in range(1, K + 1):
            leaf, f, g = self.point(context, y, record)
            if record:
                leaves.append(leaf)
                values.append(f)
                gradients.append(g)
            cut_points[:, k - 1] = y
            slopes[:, k - 1] = g.detach().to(double)
            offsets[:, k - 1] = f.detach().to(double) + (slopes[:, k - 1] * (0.5 - y.to(double))).sum(1)
            solution = self.inner(slopes[:, :k], offsets[:, :k], warm, self.steps)
            warm = solution.lam
            y = solution.y.to(start.dtype)
            lam_history[:, k - 1, :k] = solution.lam
            complementarity_history[:, k - 1] = solution.residual[:, 2]
        rounding = (y.to(double) - solution.y).abs().amax(1)  # NaN where y is
        residual = torch.cat([rounding.unsqueeze(1), solution.residual[:, 1:]], dim=1)
        answer = y.to(double)
        entropy = (torch.special.entr(answer) + torch.special.entr(1.0 - answer)).sum(1)
        value: Tensor = self.energy.icnnrt_value(context, y)
        energy = value.detach().to(double) - entropy
        lower_bound = solution.lower_bound
        result = Solution(
            y,
            solution.lam.to(start.dtype),
            energy,
            lower_bound,
            energy - lower_bound,
            residual,
            slopes,
            offsets,
            cut_points,
            lam_history,
            complementarity_history,
        )
        return result, Points(leaves, values, gradients)

    @torch.jit.export
    def inner(self, G: Tensor, e: Tensor, lam_start: Tensor | None, steps: int) -> Model:
        """Solve the k-cut model, G [B, k, n], e [B, k], by a predictor-corrector interior point method on (λ, w, t).

        lam_start: multipliers of the first k−1 cuts. As `icnnrt.mathematics.reference.bundle_entropy_solve`.
        """
        enough = self.enough(G, e)
        state = self.first(G, e, lam_start)
        for _ in range(steps):
            if not bool((state.best_gap > enough).any()):
                break
            state = self.step(G, e, enough, state)
        return self.certified(G, e, state.best_lam)

    def enough(self, G: Tensor, e: Tensor) -> Tensor:
        """Rounding of the cut values, [B, 1, 1]: a gap that small is zero."""
        largest = (e.abs() + 0.5 * G.abs().sum(2)).amax(1)
        return 2.0 * self.EPS * (1.0 + largest).view(-1, 1, 1)

    def first(self, G: Tensor, e: Tensor, lam_start: Tensor | None) -> State:
        """The iterate to begin with."""
        k = G.size(1)
        e = e.unsqueeze(2)
        if lam_start is None:
            lam = torch.full_like(e, 1.0 / k)
            bound = 2.0
        else:
            lam = torch.cat([0.9 * lam_start, torch.zeros_like(e[:, lam_start.size(1) :, 0])], dim=1) + 0.1 / k
            lam = (lam / lam.sum(1, keepdim=True)).unsqueeze(2)
            bound = 4.0
        s = -torch.bmm(lam.transpose(1, 2), G)
        v = self.cut_values(G, e, s)
        gap = v.amax(1, keepdim=True) - (lam * v).sum(1, keepdim=True)
        u = s.clamp(-bound, bound)
        v = self.cut_values(G, e, u)
        M = v.amax(1, keepdim=True)
        delta = (lam * (M - v)).sum(1, keepdim=True) + 10.0 * self.EPS * (1.0 + M.abs())
        return State(lam, u, s, M - v + delta, M + delta, lam, gap)

    def step(self, G: Tensor, e: Tensor, enough: Tensor, state: State) -> State:
        """One predictor-corrector step; the best iterate of a sample whose gap is `enough` stays."""
        lam, u, s, w, t, best_lam, best_gap = state
        k, n = G.size(1), G.size(2)
        Gt = G.transpose(1, 2)
        e = e.unsqueeze(2)
        b, r = self.BACKTRACK, self.RELUCTANCE
        backtrack = torch.cat([torch.full_like(t, b[0]), torch.full_like(t, b[1]), torch.full_like(t, b[2])], dim=1)
        reluctance = torch.cat([torch.full_like(t, r[0]), torch.full_like(t, r[1]), torch.full_like(t, r[2])], dim=1)

        unfinished = best_gap > enough  # False for NaN
        y = torch.sigmoid(u)
        D = y * torch.sigmoid(-u)
        v = torch.baddbmm(e, G, (y - 0.5).transpose(1, 2))
        r_u = u - s  # u + G'λ
        r_t = 1.0 - lam.sum(1, keepdim=True)
        GD = G * D
        r_d = v + w - t - torch.bmm(GD, r_u.transpose(1, 2))
        lam_w = lam * w
        mu = lam_w.mean(1, keepdim=True)
        factors = self.factorise(torch.bmm(GD, Gt), (w / lam).squeeze(2))

        # predictor: r_c = −λw, so r_c/λ = −w and dw = −w (1 + dλ/λ)
        x = self.substitute(factors, torch.cat([r_d - w, torch.ones_like(lam)], dim=2))
        x_0, x_1 = x[:, :, :1], x[:, :, 1:]
        x_1_sum = x_1.sum(1, keepdim=True)
        d_lam = x_0 - x_1 * ((x_0.sum(1, keepdim=True) - r_t) / x_1_sum)
        rho = d_lam / lam
        dw = -w * (1.0 + rho)
        # a = the most, up to 1, that keeps λ + a dλ and w + a dw >= 0; the larger of −ρ and 1 + ρ is ½ + |ρ + ½|
        a = ((rho + 0.5).abs().amax(1, keepdim=True) + 0.5).clamp(min=1.0).reciprocal()
        affine = ((lam + a * d_lam) * (w + a * dw)).mean(1, keepdim=True)
        centring = (affine / mu).clamp(0.0, 1.0) ** 3
        # corrector
        r_c = centring * mu - lam_w - (a * a) * (d_lam * dw)
        x_0 = self.substitute(factors, r_d + r_c / lam)
        dt = (x_0.sum(1, keepdim=True) - r_t) / x_1_sum
        d_lam = x_0 - x_1 * dt
        dw = (r_c - w * d_lam) / lam
        # α = 0.99 of the way to the boundary, at most 1
        approach = torch.maximum((-d_lam / lam).amax(1, keepdim=True), (-dw / w).amax(1, keepdim=True))
        alpha = 0.99 / approach.clamp(min=0.99)

        trial = lam.transpose(1, 2) + (alpha * backtrack) * d_lam.transpose(1, 2)  # [B, 3, k]
        trial = trial.clamp(min=self.LAM_FLOOR)  # off zero, where w/λ would overflow
        trial = trial / trial.sum(2, keepdim=True)
        trial_s = -torch.bmm(trial, G)
        trial_v = torch.baddbmm(e.transpose(1, 2), torch.sigmoid(trial_s) - 0.5, Gt)
        trial_gap = trial_v.amax(2, keepdim=True) - (trial * trial_v).sum(2, keepdim=True)  # [B, 3, 1]
        chosen = (trial_gap * reluctance).argmin(1, keepdim=True)  # [B, 1, 1]
        gap = trial_gap.gather(1, chosen)

        du = -(r_u + torch.bmm(d_lam.transpose(1, 2), G))  # one whole step
        alpha = alpha * backtrack.gather(1, chosen)
        u = u + (alpha * du).clamp(-self.LOGIT_STEP, self.LOGIT_STEP)
        u = u.clamp(-self.LOGIT_BOUND, self.LOGIT_BOUND)
        lam = trial.gather(1, chosen.expand(-1, -1, k)).transpose(1, 2)
        s = trial_s.gather(1, chosen.expand(-1, -1, n))
        w = (w + alpha * dw).clamp(min=self.SLACK_FLOOR)
        t = t + alpha * dt

        better = (gap < best_gap) & unfinished
        return State(lam, u, s, w, t, torch.where(better, lam, best_lam), torch.where(better, gap, best_gap))

    def certified(self, G: Tensor, e: Tensor, lam: Tensor) -> Model:
        """The point of the multipliers lam [B, k, 1], with its bound and residuals."""
        e = e.unsqueeze(2)
        s = -torch.bmm(lam.transpose(1, 2), G)
        v = self.cut_values(G, e, s)
        gap = v.amax(1, keepdim=True) - (lam * v).sum(1, keepdim=True)
        # ½ s − softplus(s), summed in the form that does not cancel for large |s|.
        dual = (lam * e).sum([1, 2]) - (0.5 * s.abs() + torch.log1p(torch.exp(-s.abs()))).sum([1, 2])
        poison = 0.0 * gap[:, 0]  # [B, 1]: NaN where any cut is NaN or infinite, else 0
        residual = torch.cat([poison, (lam.sum(1) - 1.0).abs(), gap[:, 0]], dim=1)
        return Model(torch.sigmoid(s)[:, 0] + poison, lam[:, :, 0], dual + poison[:, 0], residual)

    def cut_values(self, G: Tensor, e: Tensor, s: Tensor) -> Tensor:
        """v = e + G(σ(s) − ½), [B, k, 1]."""
        return torch.baddbmm(e, G, (torch.sigmoid(s) - 0.5).transpose(1, 2))

    def factorise(self, A: Tensor, diagonal: Tensor) -> Factors:
        """LU of A + diag(diagonal), scaled to unit diagonal; duplicate cuts make it singular, hence the ridge."""
        A = A + torch.diag_embed(diagonal)
        scale = A.diagonal(dim1=1, dim2=2).clamp(min=self.TINY).rsqrt().unsqueeze(2)
        A = A * scale * scale.transpose(1, 2)
        ridge = torch.full_like(diagonal, 4.0 * self.EPS)
        LU, pivots, _ = torch.linalg.lu_factor_ex(A + torch.diag_embed(ridge))
        return Factors(LU, pivots, scale)

    def substitute(self, factors: Factors, R: Tensor) -> Tensor:
        """The solution X of A X = R, R [B, k, r]."""
        return torch.linalg.lu_solve(factors.LU, factors.pivots, R * factors.scale) * factors.scale

    @torch.jit.export
    def kkt_adjoint(self, G: Tensor, e: Tensor, lam: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Proposition 3: c_y [B, n] and c_λ [B, k] for ∂ℓ/∂y = ȳ [B, n]; as
        `icnnrt.mathematics.reference.kkt_adjoint`."""
        bar = y_bar.unsqueeze(1)
        s = -torch.bmm(lam.unsqueeze(1), G)
        y = torch.sigmoid(s)
        D = y * torch.sigmoid(-s)
        v = torch.baddbmm(e.unsqueeze(2), G, (y - 0.5).transpose(1, 2))
        w = (v.amax(1, keepdim=True) - v).squeeze(2)
        q = lam.sqrt().unsqueeze(2)
        qG = q * G
        qSq = torch.bmm(qG * D, qG.transpose(1, 2))
        delta = 1e-13 * qSq.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) + 1e-30
        r = -torch.bmm(G, (D * bar).transpose(1, 2))
        X = self.substitute(self.factorise(qSq, w + delta), torch.cat([q * r, q], dim=2))
        qX = (q * X).sum(1, keepdim=True)
        c_lam = q * (X[:, :, :1] - X[:, :, 1:] * (qX[:, :, :1] / qX[:, :, 1:]))
        c_y = -D * (bar + torch.bmm(c_lam.transpose(1, 2), G))
        return c_y[:, 0], c_lam[:, :, 0]

    def adjoint(self, solution: Solution, points: Points, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        """ē [B, K] and ḡ_i + ē_i (½ − y_i) [B, K, n]; as `icnnrt.mathematics.reference.argmin_adjoint` at full
        depth."""
        Y = solution.cut_points.to(torch.float64)
        K = self.iterations
        offset_bar = torch.zeros_like(solution.offsets)
        seed = torch.zeros_like(Y)
        bar = y_bar.to(torch.float64)
        y_k = solution.y.to(torch.float64)
        for j in range(K):
            k = K - j
            if j > 0:
                # The answer of solve k is the point of cut k+1: ȳ_k = ∇²f(y_k) (ḡ + ē (½ − y_k)).
                bar = self.hessian_product(points, k, seed[:, k]).to(torch.float64)
                y_k = Y[:, k]
            lam = solution.lam_history[:, k - 1, :k]
            c_y, c_lam = self.kkt_adjoint(solution.slopes[:, :k], solution.offsets[:, :k], lam, bar)
            offset_bar[:, :k] += c_lam
            # ḡ_i + ē_i (½ − y_i) with ḡ_i = λ_i c_y + c_λi (y − ½)
            toward = y_k.unsqueeze(1) - Y[:, :k]
            seed[:, :k] += lam.unsqueeze(2) * c_y.unsqueeze(1) + c_lam.unsqueeze(2) * toward
        return offset_bar, seed

    def hessian_product(self, points: Points, i: int, s: Tensor) -> Tensor:
        """∇²f(y_i) s; zero where ∇f does not depend on y, as for a piecewise-linear f."""
        g, y = points.g[i], points.y[i]
        product = torch.zeros_like(y)
        if g.requires_grad:
            seeds: list[Tensor | None] = [s.to(g.dtype)]
            found = torch.autograd.grad([g], [y], seeds, retain_graph=True, allow_unused=True)[0]
            if found is not None:
                product = found
        return product
