"""The cache of exports: what changes a package changes its key, and nobody meets half of an export."""

import copy
import math
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from exports import NotHashable, export, fingerprint, once
from torch import nn

from icnnrt_exporters import SGD, Adam, TrainSpec
from icnnrt_models import FICNN, PICNN, BundleEntropyArgmin


def network(seed: int = 0, kind: Any = FICNN, **options: Any) -> Any:
    return kind(2, 3, (4,), generator=torch.Generator().manual_seed(seed), **options)


def scaled(by: float) -> Any:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return by * (x.sum(1) + y.square().sum(1))

    return Scaled()


def tied(together: bool) -> nn.Module:
    both = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    both.load_state_dict({name: torch.ones_like(t) for name, t in both.state_dict().items()})
    if together:
        both[1].weight = both[0].weight
    return both


def changed() -> nn.Module:
    energy = network()
    with torch.no_grad():
        next(energy.parameters()).view(-1)[0] += 1e-7
    return energy


MADE: dict[str, Any] = {
    "as it is": network,
    "another draw": lambda: network(1),
    "one bit": changed,
    "another class": lambda: network(kind=PICNN),
    "another dtype": lambda: network(dtype=torch.float64),
    "another activation": lambda: network(activation="relu"),
    "frozen": lambda: network().requires_grad_(False),
    "closed over 1": lambda: scaled(1.0),
    "closed over 2": lambda: scaled(2.0),
    "tied": lambda: tied(True),
    "equal": lambda: tied(False),
    "4 cuts": lambda: BundleEntropyArgmin(network(), 4),
    "5 cuts": lambda: BundleEntropyArgmin(network(), 5),
    "a domain": lambda: BundleEntropyArgmin(network(), 4, domain="simplex"),
    "SGD": lambda: TrainSpec(optimizer=SGD()),
    "Adam": lambda: TrainSpec(optimizer=Adam()),
    "a loss": lambda: TrainSpec(lambda y, target: (y - target).abs().sum()),
    "another loss": lambda: TrainSpec(lambda y, target: (y - target).square().sum()),
    "an array": lambda: np.arange(4.0),
    "its shape": lambda: np.arange(4.0).reshape(2, 2),
    "of Python": lambda: [0.0, 1.0, 2.0, 3.0],
    "one": lambda: 1,
    "true": lambda: True,
}


def test_what_differs_has_another_key() -> None:
    keys = {name: fingerprint(make()) for name, make in MADE.items()}
    assert len(set(keys.values())) == len(keys), keys


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_alike_has_the_same_key(name: str) -> None:
    first, second = MADE[name](), MADE[name]()
    assert fingerprint(first) == fingerprint(second)


def test_a_module_and_its_copy_are_alike_in_any_order_of_use() -> None:
    energy = network()
    other = copy.deepcopy(energy)
    assert fingerprint((energy, energy)) != fingerprint((energy, other))  # of one module, or of two
    assert fingerprint((energy, 1)) == fingerprint((other, 1))


@pytest.mark.parametrize("value", [iter([1]), object(), np.array([None]), torch.ones(2, requires_grad=True) * 2])
def test_what_cannot_be_hashed_is_told(value: object) -> None:
    with pytest.raises(NotHashable):
        fingerprint([value])


def test_the_sources_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = exports.sources()
    exports.sources.cache_clear()
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "SSE4_2 as never before")
    try:
        assert exports.sources() != before
    finally:
        monkeypatch.undo()
        exports.sources.cache_clear()
    assert exports.sources() == before


def test_a_folder_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "FOLDER", tmp_path)
    calls = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "half").touch()
        if len(calls) == 1:
            raise RuntimeError("no more space")
        (folder / "whole").touch()

    with pytest.raises(RuntimeError):
        once("key", make)
    for _ in range(2):
        assert sorted(path.name for path in once("key", make).iterdir()) == ["half", "whole"]
    assert len(calls) == 2
    for age in range(exports.KEPT):
        (tmp_path / f"state {age}").mkdir()
    exports.prune()
    assert len(list(tmp_path.iterdir())) == exports.KEPT


def test_an_export_is_given_again_with_its_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "FOLDER", tmp_path / "cache")
    energy = scaled(-1.0).eval()
    x, y = torch.zeros(2, 1), torch.full((2, 2), 0.5)
    written = []
    for name in ("a", "b"):
        with pytest.warns(UserWarning, match="not convex in y"):
            package = export(energy, None, x, y, tmp_path / f"{name}.icnn", name="p", allow_not_convex=True)
        written.append({file.name: file.read_bytes() for file in package.path.iterdir()})
    assert written[0] == written[1]
    assert len(list((tmp_path / "cache").glob("*/*/made.icnn"))) == 1
    assert math.isfinite(package.manifest.parity["value"])
