"""Energies whose context goes through a quadratic program, and such a network in float32, from torch to packages."""

import numpy as np
import pytest
import torch
from exports import export
from torch import nn

import icnnrt
from icnnrt.errors import InputError
from icnnrt.tuning.finetune import FineTuner
from icnnrt_exporters import SGD, TrainSpec
from icnnrt_models import BundleEntropyArgmin, QPLayer


class Planned(nn.Module):
    """f(x, y) = ½ ‖y − z(x)‖², z the projection of Wx on a simplex."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
        self.qp = QPLayer()
        self.y_dim = 5

    def forward(self, x, y):
        eye = torch.eye(5, dtype=x.dtype)
        z = self.qp(eye, -x @ self.W.T, A=torch.ones_like(eye[:1]), b=torch.ones_like(eye[0, :1]), lower=0.0)
        return 0.5 * (y - z).square().sum(1)


def test_an_energy_with_a_program_on_its_x_path(tmp_path):
    energy = Planned().double().eval()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.rand(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer = BundleEntropyArgmin(energy, iterations=4)
    export(energy, layer, x, y, tmp_path / "energy.icnn")
    x.requires_grad_()
    found = layer(x)
    found.sin().sum().backward()
    with icnnrt.load(tmp_path / "energy.icnn") as session:
        assert "QuadraticProgram" in session.manifest.ops["ai.icnnrt"].names
        solution = session.argmin(x.detach().numpy())
        np.testing.assert_allclose(solution.y, found.detach().numpy(), atol=1e-6)
        with pytest.raises(
            InputError, match="solve_qp: expected a package of kind 'qp', but got energy of kind 'energy'; use argmin"
        ):
            session.solve_qp(x.detach().numpy())
        bars = session.vjp(solution, np.cos(solution.y), on_unsafe="skip")
        kept = ~bars.skipped
        assert kept.any()
        np.testing.assert_allclose(bars.x[kept], x.grad.numpy()[kept], rtol=1e-4, atol=1e-6)
        if kept.all():
            np.testing.assert_allclose(bars.weights["W"], energy.W.grad.numpy(), rtol=1e-4, atol=1e-6)


class Projected(nn.Module):
    """z(x), the projection of Wx on a simplex."""

    def __init__(self):
        super().__init__()
        self.energy = Planned()

    def forward(self, x):
        eye = torch.eye(5, dtype=x.dtype)
        return self.energy.qp(
            eye, -x @ self.energy.W.T, A=torch.ones_like(eye[:1]), b=torch.ones_like(eye[0, :1]), lower=0.0
        )


def test_float32(tmp_path):
    net = Projected().eval()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    target = torch.full((8, 5), 0.2)
    export(net, None, x, target, tmp_path / "net.icnn", kind="qp", train=TrainSpec(optimizer=SGD()))
    stepper, wanted = torch.optim.SGD(net.parameters(), 0.5), []
    with icnnrt.load(tmp_path / "net.icnn") as session:
        answer = session.solve_qp(x.numpy())
        assert answer.ok.all()
        np.testing.assert_allclose(answer.z, net(x).detach().numpy(), atol=1e-5)
        tuner = FineTuner(session, learning_rate=0.5)
        losses = [tuner.step(x.numpy(), target.numpy()).loss for _ in range(10)]
    for _ in range(10):
        stepper.zero_grad()
        loss = nn.functional.mse_loss(net(x), target)
        loss.backward()
        stepper.step()
        wanted.append(loss.item())
    # In float32 an entry of z within 1e-3 of its bound may count as held or not, which is a hundredth of a step or so.
    np.testing.assert_allclose(losses, wanted, rtol=2e-2)
    assert losses[-1] < losses[0]
