"""What rounding leaves of a certificate: energies in float32 and float64 against themselves with more digits."""

import numpy as np
import pytest
from references import evaluate

import icnnrt
from icnnrt.mathematics import certificate, reference
from icnnrt.mathematics.certificate import Tolerances
from icnnrt.mathematics.domains import SIMPLEX, SPACE, UNIT_BOX, box_coordinates
from icnnrt.mathematics.namespace import NUMPY
from icnnrt.mathematics.reference import in_coordinates
from icnnrt.mathematics.status import Status

B, N, UNITS, K = 48, 5, 6, 8
TOLERANCES = {np.float32: Tolerances(1e-3, 3e-5), np.float64: Tolerances(1e-3, 1e-8)}
# One more digit than is judged: what float32 rounds is seen in float64, and what that rounds in extended precision.
MORE = {np.float32: np.float64, np.float64: np.longdouble}


class Energy:
    """f = s_0 max v + s_1 Σ softplus v + (s_2/2) ‖y − c‖² + b'y, v = Ay + a, a sample each; entries of usual size."""

    def __init__(self, rng, samples=B):
        self.A, self.a = rng.standard_normal((samples, UNITS, N)), rng.standard_normal((samples, UNITS))
        self.b, self.c = rng.standard_normal((samples, N)), rng.standard_normal((samples, N))
        self.s = np.abs(rng.standard_normal((samples, 3)))

    def __call__(self, y, T):
        """f [B] and ∇f [B, n], computed in T."""
        A, a, b, c, s, y = (v.astype(T) for v in (self.A, self.a, self.b, self.c, self.s, y))
        v = (A * y[:, None]).sum(2) + a
        soft = np.maximum(v, 0) + np.log1p(np.exp(-np.abs(v)))
        f = s[:, 0] * v.max(1) + s[:, 1] * soft.sum(1) + s[:, 2] * T(0.5) * ((y - c) ** 2).sum(1) + (b * y).sum(1)
        steepest = np.take_along_axis(A, v.argmax(1)[:, None, None], 1)[:, 0]
        slope = (np.exp(np.minimum(v, 0)) / (1 + np.exp(-np.abs(v))))[:, :, None] * A
        return f, s[:, :1] * steepest + s[:, 1:2] * slope.sum(1) + s[:, 2:] * (y - c) + b


def rounded(energy, T, at=None):
    """f and ∇f of float64 points as an energy in T gives them."""

    def value_and_gradient(y):
        if at is not None:
            y = (at[0].astype(T) + (at[1] - at[0]).astype(T) * y.astype(T)).astype(T)
        f, g = energy(y.astype(T), T)
        if at is not None:
            g = (at[1] - at[0]).astype(T) * g
        return f.astype(np.float64), g.astype(np.float64)

    return value_and_gradient


def solved(energy, T, domain, bounds=None, tolerances=None):
    """The answer of a graph in T, and what `judge` says of it."""
    lower, upper = bounds if bounds is not None else (None, None)
    start = np.full((len(energy.a), N), domain.centre(N))
    with np.errstate(all="ignore"):
        t = reference.bundle_entropy_argmin(rounded(energy, T, bounds), start, K, domain=domain)
        names = ("slopes", "offsets", "cut_points", "lam")
        answer = {name: getattr(t, name).astype(T) for name in names}
        answer |= {name: getattr(t, name) for name in ("y", "energy", "residual")}
        # As a graph has it: the bound of what is handed out.
        handed = evaluate(*(answer[name].astype(np.float64) for name in ("slopes", "offsets", "lam")), domain)
        answer |= {"lower_bound": handed.dual, "gap": t.energy - handed.dual}
        all_finite, limits = np.ones(len(t.y), bool), tolerances or TOLERANCES[T]
        status, doubt = certificate.judge(all_finite, answer, limits, domain, lower, upper)
    return answer, status, doubt


def least(energy, T, domain, answer):
    """The energy of the answer, and the least of many points around it, with more digits than T has."""
    L, p = MORE[T], answer["y"]

    def with_digits(q):
        q = q.astype(L)
        parts = (q, 1 - q) if domain is UNIT_BOX else (q,)
        with np.errstate(all="ignore"):
            own = sum((r * np.log(np.where(r > 0, r, 1))).sum(1) for r in parts)
            return energy(q, L)[0] + (L(0.5) * (q * q).sum(1) if domain is SPACE else own)

    own = best = with_digits(p)
    with np.errstate(all="ignore"):
        s, g = domain.logits(NUMPY, p), energy(p.astype(L), L)[1].astype(np.float64)
        others = [domain.point(NUMPY, (1 - t) * s - t * g) for t in 10.0 ** np.arange(-6, 0.5)]
    others += [answer["cut_points"][:, k].astype(np.float64) for k in range(K)]
    for q in others:
        for share in (1.0, 0.5, 0.01):
            found = with_digits(p + share * (q - p))
            best = np.where(np.isfinite(found), np.minimum(best, found), best)
    return own, best


DOMAINS = {"unit_box": UNIT_BOX, "simplex": SIMPLEX, "space": SPACE}


def with_one_huge_entry(rng, power):
    energy = Energy(rng)
    flat = np.concatenate([energy.A.reshape(B, -1), energy.a], 1)
    flat[np.arange(B), rng.integers(0, flat.shape[1], B)] *= 10.0**power
    energy.A, energy.a = flat[:, : UNITS * N].reshape(B, UNITS, N), flat[:, UNITS * N :]
    return energy


def check_converged(energy, T, domain, answer, status):
    """Gap, energy and lower bound of the samples that are CONVERGED are true to the tolerance."""
    own, best = least(energy, T, domain, answer)
    gap, small = answer["gap"], TOLERANCES[T].gap * certificate.unit(answer["lower_bound"])
    good = status == Status.CONVERGED
    assert (np.abs(gap[good]) <= small[good]).all()
    assert ((own - best)[good] <= (np.maximum(gap, 0) + small)[good]).all()
    assert (answer["lower_bound"][good] <= (best + 2 * small)[good]).all()
    assert not (status == Status.NOT_CONVEX).any()


@pytest.mark.parametrize("name", DOMAINS)
def test_no_answer_is_converged_whose_rounding_hides_its_gap(name):
    """One huge entry a sample: with 1e8 in float32 the bound was above true energies by 0.6."""
    rng, domain = np.random.default_rng(1), DOMAINS[name]
    hidden = 0
    for power in (1, 3, 5, 6, 7, 8):
        energy = with_one_huge_entry(rng, power)
        answer, status, _ = solved(energy, np.float32, domain)
        check_converged(energy, np.float32, domain, answer, status)
        hidden += int((status == Status.PRECISION).sum())
    assert hidden > 0


def test_nor_is_one_of_a_session(tmp_path):
    """In float64, where the kernels solve the models of slopes of 1e16: gaps of −0.43 were CONVERGED."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from exports import export

    from icnnrt_models import BundleEntropyArgmin

    class OfContext(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x, y):
            A, a, b, c, s = x.split([UNITS * N, UNITS, N, N, 3], 1)
            v, s = (A.reshape(-1, UNITS, N) * y[:, None]).sum(2) + a, (s * self.weight).abs()
            f = s[:, 0] * v.amax(1) + s[:, 1] * torch.nn.functional.softplus(v).sum(1)
            return f + s[:, 2] * 0.5 * ((y - c) ** 2).sum(1) + (b * y).sum(1)

    def context(energy):
        return np.concatenate([energy.A.reshape(B, -1), energy.a, energy.b, energy.c, energy.s], 1)

    rng, network = np.random.default_rng(1), OfContext()
    layer = BundleEntropyArgmin(network, iterations=K, y_dim=N)
    x, y = torch.from_numpy(context(Energy(rng))), torch.full((B, N), 0.5, dtype=torch.float64)
    export(network, layer, x, y, tmp_path / "of_context.icnn")
    session = icnnrt.load(tmp_path / "of_context.icnn")
    hidden = 0
    for power in (3, 9, 12, 14, 15, 16):
        energy = with_one_huge_entry(rng, power)
        found = session.argmin(context(energy))
        answer = {key: getattr(found, key) for key in ("y", "gap", "lower_bound", "cut_points")}
        check_converged(energy, np.float64, UNIT_BOX, answer, found.status)
        for i in np.flatnonzero(found.status == Status.PRECISION):
            hidden += 1
            assert found.uncertainty[i] > 1e-3 * max(1.0, abs(found.lower_bound[i]))
            assert found.advice(i).startswith(f"sample {i}: rounding in float64 leaves the energy open by ")
            with pytest.raises(icnnrt.CertificateError, match="rounding in float64"):
                session.vjp(found[i : i + 1], np.ones((1, N)))
    assert hidden > 0
    bars = session.vjp(found, np.ones((B, N)), on_unsafe="skip")
    assert bars.skipped[found.status == Status.PRECISION].all()
    assert not bars.skipped.all()


@pytest.mark.parametrize("T", [np.float32, np.float64])
@pytest.mark.parametrize("name", [*DOMAINS, "box"])
def test_usual_answers_keep_their_status(name, T):
    """At a tolerance of 1e-4, ten times smaller than usual, which float32 has the digits for where y is bounded."""
    rng, tolerance = np.random.default_rng(2), 3e-4 if name == "space" else 1e-4
    for scale in (0.1, 1.0, 3.0):
        energy = Energy(rng)
        energy.A *= scale
        energy.b *= scale
        bounds = None
        if name == "box":
            lower = rng.standard_normal((B, N)).astype(T)
            bounds = lower, lower + (0.1 + rng.random((B, N))).astype(T)
        answer, status, doubt = solved(
            energy, T, DOMAINS.get(name, UNIT_BOX), bounds, Tolerances(tolerance, TOLERANCES[T].residual)
        )
        assert (doubt <= tolerance * certificate.unit(answer["lower_bound"])).all()
        assert not np.isin(status, (Status.PRECISION, Status.NOT_CONVEX)).any()
        assert certificate.differentiable(status, doubt, answer["lower_bound"])[status <= Status.GAP].all()


@pytest.mark.parametrize("T", [np.float32, np.float64])
def test_a_convex_energy_in_a_far_box_is_never_not_convex(T):
    """y = l + (u − l)∘p is rounded to a number beside it, which the cuts, functions of p, do not show."""
    rng, far = np.random.default_rng(3), 0
    for kind in range(12):
        energy = Energy(rng)
        energy.s[:, rng.integers(0, 3)] = 0.0
        energy.b *= 10.0 ** rng.uniform(0, 3, (B, 1))
        lower = (rng.standard_normal((B, N)) * 10.0 ** rng.uniform(-2, 8, (B, 1))).astype(T)
        upper = lower + (np.abs(rng.standard_normal((B, N))) * 10.0 ** rng.uniform(-8, 4, (B, 1))).astype(T)
        upper[:, kind % N] = np.where(rng.random(B) < 0.3, lower[:, kind % N], upper[:, kind % N])
        if kind % 2:  # b'y cancels, so that offsets and slopes of the cuts are small beside what f is summed from
            energy.s[:] = 0.0
            middle = (0.5 * lower + 0.5 * upper).astype(np.float64)
            energy.b -= middle * ((energy.b * middle).sum(1) / (middle * middle).sum(1))[:, None]
        answer, status, _ = solved(energy, T, UNIT_BOX, (lower, upper))
        assert not (status == Status.NOT_CONVEX).any()
        slopes, offsets, points = answer["slopes"], answer["offsets"], answer["cut_points"]
        violation = certificate.convexity_violation(slopes, offsets, points)
        far += int((violation > certificate.rounding(answer["energy"], slopes, offsets)).sum())
    assert far > 0, "the box matters in none of these"


def test_what_is_not_convex_is_still_found_out():
    rng = np.random.default_rng(4)

    def concave(y):
        return -3.0 * (y * y).sum(1), -6.0 * y

    for lower, width in ((0.0, 1.0), (-5.0, 2.0), (100.0, 30.0)):
        low, high = np.full((B, N), lower), np.full((B, N), lower + width)
        f = in_coordinates(concave, box_coordinates(low, high))
        t = reference.bundle_entropy_argmin(f, rng.uniform(0.2, 0.8, (B, N)), K)
        status, _ = certificate.judge(np.ones(B, bool), t._asdict(), TOLERANCES[np.float64], UNIT_BOX, low, high)
        assert (status == Status.NOT_CONVEX).all()
        # A proof knows better than numbers; what it makes rounding of is then as uncertain as it is large.
        status, _ = certificate.judge(
            np.ones(B, bool), t._asdict(), TOLERANCES[np.float64], UNIT_BOX, low, high, proven=True
        )
        assert (status == Status.PRECISION).all()


@pytest.mark.parametrize(("steep", "off", "box"), [(2.0**36, 4e-3, False), (2.0**34, 1.1e-3, True)])
def test_a_sample_is_judged_as_it_would_be_alone(steep, off, box):
    """A figure that is no number hides nothing of its neighbours."""
    samples, tolerances = 4, TOLERANCES[np.float64]
    # Two cuts, 0 both at the centre and at the corner where the steep one touches f. It has no part in the bound, but
    # rounding may be 64 eps of it: −off is no sign of an f that is not convex.
    slopes, cut_points = np.zeros((samples, 2, N)), np.full((samples, 2, N), 0.5)
    slopes[:, 1], cut_points[:, 1] = steep, 1.0
    answer = {"slopes": slopes, "cut_points": cut_points, "offsets": np.array([[0.0, -0.5 * N * steep]] * samples)}
    answer |= {"lam": np.array([[1.0, 0.0]] * samples), "residual": np.zeros((samples, 3)), "energy": np.zeros(samples)}
    answer |= {"lower_bound": np.array([np.nan, 0, 0, 0]), "gap": np.array([np.nan, -off, off, 0.0])}
    answer["y"] = np.full((samples, N), 0.5)
    bounds = (np.zeros((samples, N)), np.ones((samples, N))) if box else (None, None)
    status, _ = certificate.judge(np.ones(samples, bool), answer, tolerances, UNIT_BOX, *bounds)
    assert status.tolist() == [Status.NOT_FINITE, Status.PRECISION, Status.GAP, Status.CONVERGED]
    for i in range(samples):
        one = {name: a[i : i + 1] for name, a in answer.items()}
        within = [a[i : i + 1] for a in bounds] if box else []
        assert certificate.judge(np.ones(1, bool), one, tolerances, UNIT_BOX, *within)[0] == status[i]


def test_a_gradient_needs_an_energy_that_is_known():
    status = np.array([0, 1, 8, 8, 0, 2, 7, 0], np.int8)
    doubt = np.array([1e-9, 1e-9, 1e-3, 1.1e-3, 2e-3, 0.0, 0.0, np.nan])
    known = certificate.differentiable(status, doubt, np.full(8, 0.5))
    assert known.tolist() == [True, True, True, False, False, False, False, False]
    assert certificate.differentiable(status, doubt, np.full(8, -10.0)).tolist()[3:5] == [True, True]


def test_magnification():
    lower, upper = np.array([[0.0, 1e6, 2.0, -4.0, 1e8]]), np.array([[1.0, 1e6 + 1, 2.0, 4.0, 1e8 + 1e-9]])
    np.testing.assert_allclose(certificate.magnification(lower, upper), [[1.0, 1e6 + 1, 0.0, 0.5, 0.0]], rtol=1e-9)
    low = lower.astype(np.float32)
    assert certificate.magnification(low, np.nextafter(low, np.float32(np.inf))).max() <= 2**23
