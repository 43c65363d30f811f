"""FICNN and PICNN: their equations, convexity in y, initial values, and what exporters rely on."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from amounts import amount
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icnnrt_models import CELU, FICNN, PICNN, ContextEnergy, Energy, LeakyReLU, NonNegativeLinear
from icnnrt_models.networks.activations import SOFTPLUS_THRESHOLD, convex_activation, free_activation
from icnnrt_models.networks.convex_network import check_input
from icnnrt_models.networks.initialisation import draw_nonnegative, gaussian_moments, nonnegative_law
from icnnrt_models.networks.nonnegative import inverse_softplus

ACTIVATIONS = ("relu", "softplus", "leaky_relu", "celu")
POSITIVITIES = ("projection", "softplus")
ENERGIES = (FICNN, PICNN)
EXACT = 1e-12  # float64 against float64: rounding of a few hundred operations on numbers near 1

each_energy = pytest.mark.parametrize("kind", ENERGIES)
each_positivity = pytest.mark.parametrize("positivity", POSITIVITIES)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
# torch announces the end of TorchScript; icnnrt writes it all the same, as long as torch does.
torchscript = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(kind: type, seed: int = 0, x_dim: int = 4, y_dim: int = 3, hidden: tuple[int, ...] = (7, 5), **options):
    return kind(x_dim, y_dim, hidden, generator=seeded(seed), **{"dtype": torch.float64, **options})


def inputs(energy: Energy, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    x = torch.randn(batch, energy.x_dim, generator=generator, dtype=torch.float64)
    y = torch.randn(batch, energy.y_dim, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def train(energy, seed: int, steps: int = 5) -> None:
    """A few large optimiser steps on random targets, as far from the initial values as possible; then project."""
    x, y = inputs(energy, 16, seed)
    target = 3 * torch.randn(16, generator=seeded(seed + 1), dtype=x.dtype)
    optimiser = torch.optim.Adam(energy.parameters(), lr=0.2)
    for _ in range(steps):
        optimiser.zero_grad()
        (energy(x, y) - target).pow(2).mean().backward()
        optimiser.step()
    energy.project_()


@torch.no_grad()
def convexity_violation(energy, seed: int, segments: int = 128) -> float:
    """max over random segments of f(x, (1−t)a + t b) − (1−t) f(x, a) − t f(x, b), relative to the values of f."""
    x, a = inputs(energy, segments, seed)
    _, direction = inputs(energy, segments, seed + 1)
    length = 10 ** torch.linspace(-2, 1, segments, dtype=x.dtype)[:, None]  # short segments find bends, long ones kinks
    b = a + length * direction
    t = torch.rand(segments, 1, generator=seeded(seed), dtype=x.dtype)
    fa, fb, f = energy(x, a), energy(x, b), energy(x, (1 - t) * a + t * b)
    t = t[:, 0]
    gap = f - (1 - t) * fa - t * fb
    return (gap / (1 + f.abs() + fa.abs() + fb.abs())).max().item()


# The equations -------------------------------------------------------------------------------------------------------


def numpy_activation(name: str, s: np.ndarray) -> np.ndarray:
    return {
        "relu": np.maximum(s, 0),
        "softplus": np.logaddexp(0, s),
        "leaky_relu": np.maximum(s, 0.01 * s),
        "celu": np.maximum(s, 0) + np.minimum(0, np.expm1(np.minimum(s, 0))),
        "tanh": np.tanh(s),
    }[name]


def parameters(energy) -> dict[str, np.ndarray]:
    """The state_dict in numpy, with W^(z) itself under positivity="softplus"."""
    state = {name: value.numpy() for name, value in energy.state_dict().items()}
    return {
        name.replace("raw_weight", "weight"): np.logaddexp(0, value) if "raw_weight" in name else value
        for name, value in state.items()
    }


@each_positivity
@each_activation
def test_ficnn_is_equation_2(activation: str, positivity: str):
    energy = build(FICNN, activation=activation, positivity=positivity)
    train(energy, 3)
    x, y = inputs(energy, 6)
    p = parameters(energy)
    xy = np.concatenate([x, y], axis=1)
    z, k = np.zeros((6, 0)), 3
    for i in range(k):
        W_z = p[f"layers.{i}.W_z.weight"] if i else np.zeros((7, 0))
        W_y = np.concatenate([p[f"layers.{i}.W_x"], p[f"layers.{i}.W_y"]], axis=1)
        z = z @ W_z.T + xy @ W_y.T + p[f"layers.{i}.b"]
        z = numpy_activation(activation, z) if i < k - 1 else z
    np.testing.assert_allclose(energy(x, y).detach().numpy(), z[:, 0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("linear_context_output", [False, True])
@pytest.mark.parametrize(("activation", "context"), [("relu", "relu"), ("softplus", "tanh"), ("celu", "leaky_relu")])
@each_positivity
def test_picnn_is_equation_3(
    activation: str, context: str, positivity: str, batch_norm: bool, linear_context_output: bool
):
    energy = build(
        PICNN,
        context_hidden=(6, 8),
        activation=activation,
        context_activation=context,
        positivity=positivity,
        batch_norm=batch_norm,
        linear_context_output=linear_context_output,
    )
    train(energy, 3)  # gives the batch norm statistics of its own
    energy.eval()
    x, y = (tensor.numpy() for tensor in inputs(energy, 6))
    p = parameters(energy)
    u, z, k = x, np.zeros((6, 0)), 3
    for i in range(k):
        q = {name.removeprefix(f"layers.{i}."): value for name, value in p.items() if name.startswith(f"layers.{i}.")}
        s = (y * (u @ q["W_yu"].T + q["b_y"])) @ q["W_y"].T + u @ q["W_u"].T + q["b"]
        if i:
            s += (z * np.maximum(u @ q["W_zu"].T + q["b_z"], 0)) @ q["W_z.weight"].T
        z = numpy_activation(activation, s) if i < k - 1 else s
        if i < k - 1:
            c = f"context_layers.{i}."
            u = u @ p[c + "W"].T + p[c + "b"]
            if not (linear_context_output and i == k - 2):
                u = numpy_activation(context, u)
                if batch_norm:
                    scale = p[c + "norm.weight"] / np.sqrt(p[c + "norm.running_var"] + 1e-5)
                    u = (u - p[c + "norm.running_mean"]) * scale + p[c + "norm.bias"]
    actual = energy(torch.from_numpy(x), torch.from_numpy(y)).detach().numpy()
    np.testing.assert_allclose(actual, z[:, 0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [(), (5,), (7, 5, 6)])
@each_energy
def test_forward_is_value_of_context(kind: type, hidden: tuple[int, ...], dtype: torch.dtype):
    energy = build(kind, hidden=hidden, dtype=dtype)
    assert isinstance(energy, Energy)
    assert isinstance(energy, ContextEnergy)
    x, y = inputs(energy, 5, dtype=dtype)
    context = energy.context(x)
    assert all(tensor.shape[0] == 5 for tensor in context)
    f = energy(x, y)
    assert f.shape == (5,)
    assert f.dtype == dtype
    torch.testing.assert_close(energy.value(context, y), f, rtol=0, atol=0)


def test_ficnn_without_context():
    energy = build(FICNN, x_dim=0)
    x, y = inputs(energy, 4)
    assert not any("W_x" in name for name in energy.state_dict())
    torch.testing.assert_close(energy(x, y)[:1], energy(x[:1], y[:1]))
    assert convexity_violation(energy, 0) < EXACT


def test_one_seed_is_one_network():
    for kind, positivity in product(ENERGIES, POSITIVITIES):
        double, again, single, other = (
            build(kind, seed, dtype=dtype, positivity=positivity).state_dict()
            for seed, dtype in ((1, torch.float64), (1, torch.float64), (1, torch.float32), (2, torch.float64))
        )
        for name, value in double.items():
            assert torch.equal(value, again[name])
            assert torch.equal(value.float(), single[name])
        assert not torch.equal(double["layers.0.W_y"], other["layers.0.W_y"])


def test_batch_norm_in_eval_mode_separates_the_rows():
    energy = build(PICNN, batch_norm=True)
    train(energy, 0)
    energy.eval()
    x, y = inputs(energy, 5)
    torch.testing.assert_close(energy(x, y)[2:3], energy(x[2:3], y[2:3]))
    assert convexity_violation(energy, 0) < EXACT


# Convexity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "positivity", "activation"), [*product(ENERGIES, POSITIVITIES, ACTIVATIONS)])
@settings(max_examples=amount(8), deadline=None)
@given(seed=st.integers(0, 2**31))
def test_convex_in_y_after_training(kind: type, positivity: str, activation: str, seed: int):
    energy = build(kind, seed, positivity=positivity, activation=activation)
    train(energy, seed)
    assert convexity_violation(energy, seed) < EXACT


def test_softplus_stays_convex_where_it_turns_linear():
    s = torch.linspace(10, 60, 2001, dtype=torch.float64)
    g = convex_activation("softplus")(s)
    assert (2 * g[1:-1] - g[:-2] - g[2:]).max() < 1e-13  # torch's default threshold leaves 2e-9 here
    torch.testing.assert_close(g, torch.logaddexp(s, torch.zeros_like(s)), rtol=1e-15, atol=0)


@each_energy
def test_the_checker_sees_a_negative_weight(kind: type):
    energy = build(kind)
    x, y = inputs(energy, 1)
    with torch.no_grad():
        energy.layers[-1].W_z.weight.mul_(-1)
    assert energy(x, y).isfinite().all()
    assert convexity_violation(energy, 0) > 1e-3
    energy.project_()
    assert convexity_violation(energy, 0) < EXACT


@each_energy
def test_nonnegative_weights_name_what_project_clamps(kind: type):
    energy = build(kind)
    assert energy.nonnegative_weights() == ("layers.1.W_z.weight", "layers.2.W_z.weight")
    for value in energy.parameters():
        value.data.fill_(-1.0)
    energy.project_()
    state = energy.state_dict()
    assert {name for name, value in state.items() if (value >= 0).all()} == set(energy.nonnegative_weights())

    free = build(kind, positivity="softplus")
    before = {name: value.clone() for name, value in free.state_dict().items()}
    free.project_()
    assert free.nonnegative_weights() == ()
    assert all(torch.equal(value, before[name]) for name, value in free.state_dict().items())


def test_softplus_positivity_starts_from_the_same_function():
    for kind in ENERGIES:
        projected, softplus = (build(kind, positivity=positivity) for positivity in POSITIVITIES)
        x, y = inputs(projected, 5)
        torch.testing.assert_close(projected(x, y), softplus(x, y), rtol=EXACT, atol=EXACT)


def test_inverse_softplus_is_stable():
    # An error eps·|r| in r is a relative error eps·|r| in w = exp(r), and |r| <= 69 here: allow twice that.
    for dtype in (torch.float32, torch.float64):
        tolerance = 2 * 69 * torch.finfo(dtype).eps
        w = torch.logspace(-30, 3, 200, dtype=dtype)
        r = inverse_softplus(w)
        back = torch.nn.functional.softplus(r, threshold=SOFTPLUS_THRESHOLD)
        torch.testing.assert_close(back, w, rtol=tolerance, atol=0)
        assert inverse_softplus(torch.zeros(1, dtype=dtype)).isfinite()


@each_activation
@each_energy
def test_gradient_in_y_against_finite_differences(kind: type, activation: str):
    energy = build(kind, activation=activation)
    x, y = inputs(energy, 3)
    context = tuple(tensor.detach() for tensor in energy.context(x))
    assert torch.autograd.gradcheck(lambda y: energy.value(context, y), y.requires_grad_())
    if activation == "softplus":
        assert torch.autograd.gradgradcheck(lambda y: energy.value(context, y), y)


# Initial values ------------------------------------------------------------------------------------------------------


def test_relu_moments_and_law_have_the_closed_form():
    mean, square, cross = gaussian_moments(convex_activation("relu"))
    assert mean == pytest.approx(1 / math.sqrt(2 * math.pi), abs=EXACT)
    assert square == pytest.approx(1 / 2, abs=EXACT)
    assert cross == pytest.approx((math.sqrt(3) / 2 + math.pi / 3) / (2 * math.pi), abs=EXACT)
    for n in (1, 64, 1000):
        law = nonnegative_law(n, gaussian_moments(convex_activation("relu")))
        root3 = math.sqrt(3)
        square_mean = 6 * math.pi / (n * (6 * (math.pi - 1) + (n - 1) * (3 * root3 + 2 * math.pi - 6)))
        assert law.mean == pytest.approx(math.sqrt(square_mean), rel=1e-10)
        assert law.variance == pytest.approx(1 / n, rel=1e-10)


@each_activation
def test_moments_against_sampling(activation: str):
    g = convex_activation(activation)
    shared, s, t = torch.randn(3, 400_000, generator=seeded(0), dtype=torch.float64)
    a, b = g((shared + s) / math.sqrt(2)), g((shared + t) / math.sqrt(2))
    sampled = (a.mean(), (a**2).mean(), (a * b).mean())
    assert gaussian_moments(g) == pytest.approx([value.item() for value in sampled], abs=0.01)


@each_activation
def test_one_layer_keeps_variance_and_correlation(activation: str):
    """The fixed point of the derivation, by sampling inputs and weights.

    The weights are normal here: the derivation uses two moments only, and log-normal ones would need far more samples.
    """
    n, samples, g = 64, 40_000, convex_activation(activation)
    law = nonnegative_law(n, gaussian_moments(g))
    shared, own = torch.randn(samples, 1, generator=seeded(0)), torch.randn(samples, n, generator=seeded(1))
    a = g((shared + own).double() / math.sqrt(2))
    noise = torch.randn(2, samples, n, generator=seeded(2))  # two units, new weights for each sample
    w = law.mean + math.sqrt(law.variance) * noise.double()
    s = (w * a).sum(dim=2) + law.bias
    assert s.mean().item() == pytest.approx(0, abs=0.05)
    assert s.var().item() == pytest.approx(1, abs=0.1)
    assert torch.cov(s)[0, 1].item() == pytest.approx(0.5, abs=0.05)


def test_weights_are_drawn_from_the_law():
    law = nonnegative_law(64, gaussian_moments(convex_activation("relu")))
    w = draw_nonnegative((400, 1000), law, seeded(0))
    assert w.min() > 0
    location, scale2 = w.log().mean().item(), w.log().var().item()  # of a log-normal: they converge, its moments hardly
    assert math.exp(location + scale2 / 2) == pytest.approx(law.mean, rel=0.02)
    assert math.exp(2 * location + scale2) * math.expm1(scale2) == pytest.approx(law.variance, rel=0.05)


def layer_statistics(energy) -> tuple[list[float], list[float]]:
    """Standard deviations of the pre-activations of every layer, and gradient norms of every W^(y)."""
    x, y = inputs(energy, 256, seed=9)
    stages: list[Tensor] = []
    hook = energy.activation.register_forward_pre_hook(lambda _, args: stages.append(args[0]))
    f = energy.value(energy.context(x), y)
    hook.remove()
    f.pow(2).mean().backward()
    return [s.std().item() for s in (*stages, f)], [layer.W_y.grad.norm().item() for layer in energy.layers]


@pytest.mark.parametrize("depth", [2, 6, 12])
@each_activation
@each_energy
def test_initial_signals_neither_explode_nor_vanish(kind: type, activation: str, depth: int):
    spreads, ratios = [], []
    for seed in range(4):
        energy = build(kind, seed, x_dim=20, y_dim=10, hidden=(64,) * depth, activation=activation)
        spread, gradient = layer_statistics(energy)
        spreads.append(np.log(spread))
        ratios.append(math.log(gradient[0] / gradient[-1]))
    # Log-normal weights have heavy tails, so single networks stray: the bounds are on the geometric mean of four.
    typical = np.exp(np.mean(spreads, axis=0))
    assert typical.min() > 0.3
    assert typical.max() < 3
    assert np.exp(np.max(spreads)) < 10
    assert 1e-5 < math.exp(np.mean(ratios)) < 1e2


# What exporters rely on ----------------------------------------------------------------------------------------------


def exportable() -> list:
    return [
        build(FICNN, dtype=torch.float32),
        build(FICNN, dtype=torch.float32, x_dim=0),
        build(FICNN, dtype=torch.float64, positivity="softplus", activation="celu"),
        build(PICNN, dtype=torch.float32, positivity="softplus"),
        build(PICNN, dtype=torch.float64, activation="relu"),
        build(PICNN, dtype=torch.float32, batch_norm=True).eval(),
    ]


@pytest.mark.parametrize("energy", exportable())
def test_torch_export_keeps_the_batch_dynamic(energy):
    dtype = energy.layers[0].b.dtype
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        energy, inputs(energy, 3, dtype=dtype), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    for size in (1, 8):
        x, y = inputs(energy, size, dtype=dtype)
        torch.testing.assert_close(program.module()(x, y), energy(x, y))
    assert set(energy.nonnegative_weights()) <= set(program.state_dict)


@torchscript
@pytest.mark.parametrize("energy", exportable())
def test_torchscript_trace_keeps_batch_and_names(energy):
    dtype = energy.layers[0].b.dtype
    traced = torch.jit.trace(energy, inputs(energy, 3, dtype=dtype))
    for size in (1, 8):
        x, y = inputs(energy, size, dtype=dtype)
        torch.testing.assert_close(traced(x, y), energy(x, y))
    assert list(traced.state_dict()) == list(energy.state_dict())


@torchscript
@each_positivity
def test_nonnegative_linear_scripts(positivity):
    layer = NonNegativeLinear(3, 2, positivity)
    layer.set_weight_(torch.tensor([[1.0, 2.0, 0.5], [0.1, 3.0, 30.0]]))
    z = torch.randn(4, 3, generator=seeded(0))
    torch.testing.assert_close(torch.jit.script(layer)(z), z @ layer.nonnegative_weight().T)


@torchscript
@each_activation
def test_activations_script(activation: str):
    g = convex_activation(activation)
    s = torch.linspace(-3, 50, 54)
    torch.testing.assert_close(torch.jit.script(g)(s), g(s))


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: FICNN(2, 2, activation="gelu"),
            r"activation: expected 'relu', .*ConvexActivation, but got 'gelu'; only convex",
        ),
        (lambda: FICNN(2, 2, activation=torch.nn.ReLU()), r"activation: expected 'relu', .* but got ReLU; "),
        (lambda: PICNN(2, 2, context_activation="gelu"), r"context_activation: expected 'relu', .*'gelu'; .*module"),
        (lambda: PICNN(2, 2, positivity="abs"), r"positivity: expected 'projection' or 'softplus', but got 'abs'; "),
        (lambda: FICNN(-1, 2), r"x_dim: expected an integer of at least 0, but got -1; give"),
        (lambda: PICNN(0, 2), r"x_dim: expected an integer of at least 1, but got 0; .*FICNN"),
        (lambda: FICNN(2, 0), r"y_dim: expected an integer of at least 1, but got 0; give"),
        (lambda: FICNN(2, 2, 5), r"hidden: expected a sequence of layer widths, but got 5; write hidden="),
        (lambda: FICNN(2, 2, (5, 0)), r"hidden\[1\]: expected an integer of at least 1, but got 0; "),
        (lambda: PICNN(2, 2, (5, 4), (5,)), r"context_hidden: expected as many widths as hidden has, 2, but got 1; "),
        (lambda: LeakyReLU(1.5), r"slope: expected a finite number of at least 0 and below 1, but got 1.5; "),
        (lambda: CELU(0.0), r"alpha: expected a finite number above 0, but got 0.0; "),
    ],
)
def test_arguments_are_refused_with_a_sentence(make, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make()


@each_energy
def test_inputs_are_refused_with_a_sentence(kind: type):
    energy = build(kind, dtype=torch.float32)
    x, y = torch.zeros(2, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"x: expected a tensor of shape \[batch, 4\], but got shape \[2, 3\]; "):
        energy(y, y)
    with pytest.raises(ValueError, match=r"y: expected a tensor of shape \[batch, 3\], but got shape \[2, 4\]; "):
        energy(x, x)
    with pytest.raises(
        ValueError, match=r"y: expected the dtype of the weights, torch.float32, but got torch.float64; .*"
    ):
        energy(x, y.double())
    with pytest.raises(ValueError, match=r"context: expected the \d tensors .*, but got 0 of them; "):
        energy.value((), y)
    with pytest.raises(
        ValueError, match=r"y: expected a tensor of shape \[batch, 3\], but got shape \[3\]; .*unsqueeze"
    ):
        check_input("y", y[0], 3, y)


def test_own_activations_and_modules_are_taken():
    energy = build(PICNN, activation=LeakyReLU(0.2), context_activation=torch.nn.ELU())
    assert convexity_violation(energy, 0) < EXACT
    assert isinstance(free_activation("silu"), torch.nn.SiLU)
    assert build(FICNN, activation=CELU(2.0)).activation.alpha == 2.0
