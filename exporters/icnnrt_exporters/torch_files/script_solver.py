"""The bundle entropy method and its exact adjoint as TorchScript: the statements of `icnnrt.mathematics`, traced, in
scripted loops.

`cut_model.first`, `unfinished`, `step` and `certified`, and `kkt_adjoint`, are traced over torch's namespace for the
unit box. What is scripted is what a trace cannot hold: loops, and autograd around the energy. Those lines say once more
what `icnnrt.mathematics.bundle` and `recursive_adjoint` say; a test holds both to the same numbers. TorchScript is a
small part of Python: its compiler reads no Greek letters, no jaxtyping and no constants of a module.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icnnrt.mathematics import cut_model
from icnnrt.mathematics.domains import UNIT_BOX
from icnnrt.mathematics.kkt_adjoint import kkt_adjoint
from icnnrt_models.layers.namespace import TORCH

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
    """Solution of the k-cut model; as `icnnrt.mathematics.cut_model.InnerSolution`."""

    y: Tensor
    lam: Tensor
    lower_bound: Tensor
    residual: Tensor


class Points(NamedTuple):
    """The energy at the cut points, still attached to its graph."""

    y: list[Tensor]  # each a leaf [B, n]
    f: list[Tensor]  # [B]
    g: list[Tensor]  # ∇_y f [B, n]


def _first(G: Tensor, e: Tensor, lam_start: Tensor) -> tuple[Tensor, ...]:
    cuts = cut_model.prepared(TORCH, UNIT_BOX, G, e)
    return (*cuts, *cut_model.first(TORCH, UNIT_BOX, cuts, lam_start))


def _unfinished(*cuts_and_iterate: Tensor) -> Tensor:
    cuts, iterate = cut_model.Cuts(*cuts_and_iterate[:5]), cut_model.Iterate(*cuts_and_iterate[5:])
    unfinished: Tensor = cut_model.unfinished(TORCH, cuts, iterate)
    return unfinished


def _step(*cuts_and_iterate: Tensor) -> tuple[Tensor, ...]:
    cuts, iterate = cut_model.Cuts(*cuts_and_iterate[:5]), cut_model.Iterate(*cuts_and_iterate[5:])
    return cut_model.step(TORCH, UNIT_BOX, cuts, iterate)


def _certified(G: Tensor, e: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
    return cut_model.certified(TORCH, UNIT_BOX, G, e, lam)


def _kkt_adjoint(G: Tensor, e: Tensor, lam: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
    c_y, c_lam = kkt_adjoint(TORCH, UNIT_BOX, G, e, lam, y_bar)
    return c_y, c_lam


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

    def __init__(self, energy: Any, y_dim: int, iterations: int, steps: int) -> None:
        super().__init__()
        self.energy = energy
        # Attributes, not constants: whoever loads the file can read them.
        self.y_dim = y_dim
        self.iterations = iterations
        self.steps = steps
        # Functions, not modules: they add no names to the weights'.
        G, e = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 1, 3, dtype=torch.float64)
        state = _first(G, e, e[:, :, :2])
        self.first = _traced(_first, G, e, e[:, :, :2])
        self.unfinished = _traced(_unfinished, *state)
        self.step = _traced(_step, *state)
        self.certified = _traced(_certified, G, e, e)
        self.kkt = _traced(_kkt_adjoint, G, e, e, G[:, :1])

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
        """Solve the k-cut model, G [B, k, n], e [B, k], `icnnrt.mathematics.cut_model.solve`.

        lam_start [B, k_prev]: multipliers of the first cuts.
        """
        row = e.unsqueeze(1)
        before = row[:, :, :0] if lam_start is None else lam_start.unsqueeze(1)
        G_, N, e_, eye, enough, lam, u, w, s, best_lam, best_gap = self.first(G, row, before)
        for _ in range(steps):
            if not bool(self.unfinished(G_, N, e_, eye, enough, lam, u, w, s, best_lam, best_gap)):
                break
            lam, u, w, s, best_lam, best_gap = self.step(G_, N, e_, eye, enough, lam, u, w, s, best_lam, best_gap)
        y, lam, lower_bound, feasibility, gap = self.certified(G, row, best_lam)
        residual = torch.cat([0.0 * gap, feasibility, gap], dim=2)
        return Model(y[:, 0], lam[:, 0], lower_bound[:, 0, 0], residual[:, 0])

    @torch.jit.export
    def kkt_adjoint(self, G: Tensor, e: Tensor, lam: Tensor, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Proposition 3: c_y [B, n] and c_λ [B, k] for ∂ℓ/∂y = ȳ [B, n]."""
        c_y, c_lam = self.kkt(G, e.unsqueeze(1), lam.unsqueeze(1), y_bar.unsqueeze(1))
        return c_y[:, 0], c_lam[:, 0]

    def adjoint(self, solution: Solution, points: Points, y_bar: Tensor) -> tuple[Tensor, Tensor]:
        """ē [B, K] and ḡ_i + ē_i (½ − y_i) [B, K, n], as `icnnrt.mathematics.recursive_adjoint` at full depth."""
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


def _traced(statement: Callable[..., Any], *examples: Tensor) -> Any:
    """A function for any batch, number of cuts and dimension."""
    return torch.jit.trace(statement, examples, check_trace=False)
