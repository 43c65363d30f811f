"""Factories and checkpoints: what is found, what is loaded, and one sentence for everything else."""

import pickle
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from icnnrt.errors import ExportError, InputError  # noqa: E402
from icnnrt_exporters import checkpoint  # noqa: E402
from icnnrt_models import FICNN, BregmanProximalGradient, BundleEntropyArgmin  # noqa: E402


def energy(seed: int = 0, hidden: tuple[int, ...] = (3,)) -> FICNN:
    return FICNN(2, 3, hidden=hidden, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with modules of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # so that what `make` adds is taken away again
    return tmp_path


# --- Factories -----------------------------------------------------------------------------------


def test_a_factory_in_the_working_directory(here: Path) -> None:
    (here / "my_factory.py").write_text(
        "from icnnrt_models import FICNN, BundleEntropyArgmin\n"
        "class Nets:\n"
        "    make = staticmethod(lambda: FICNN(2, 3, hidden=(3,)))\n"
        "def layer(): return BundleEntropyArgmin(FICNN(2, 3, hidden=(3,)), iterations=4)\n"
        "ready = FICNN(2, 3, hidden=(3,))\n"
        "def needs(width): pass\n"
        "def returns_none(): pass\n"
        "number = 3\n"
    )
    assert isinstance(checkpoint.make("my_factory:Nets.make"), FICNN)
    assert isinstance(checkpoint.make("my_factory:ready"), FICNN)
    made = checkpoint.make("my_factory:layer")
    assert isinstance(made, BundleEntropyArgmin)
    assert made.iterations == 4
    for name, message in {
        "needs": "needs no arguments",
        "returns_none": "got NoneType",
        "number": "int, which cannot be called",
        "nothing": "has no 'nothing'; it can call BundleEntropyArgmin, FICNN, Nets",
    }.items():
        with pytest.raises(InputError, match=message):
            checkpoint.make(f"my_factory:{name}")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("icnnrt_models", "expected MODULE:FACTORY"),
        (":energy", "expected MODULE:FACTORY"),
        ("no_such_module_here:energy", "no module 'no_such_module_here'"),
        ("icnnrt_models.nothing:energy", r"no module 'icnnrt_models\.nothing'"),
    ],
)
def test_bad_factories(here: Path, factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checkpoint.make(factory)


def test_a_module_that_fails_to_import(here: Path) -> None:
    (here / "needs_more.py").write_text("import a_package_nobody_has\n")
    (here / "breaks.py").write_text("1 / 0\n")
    with pytest.raises(InputError, match="imports a_package_nobody_has, which is not installed"):
        checkpoint.make("needs_more:energy")
    with pytest.raises(InputError, match=r"importing breaks failed \(ZeroDivisionError"):
        checkpoint.make("breaks:energy")


# --- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("nested", [None, "state_dict", "model_state_dict"])
def test_state_dicts_are_loaded(tmp_path: Path, suffix: str, nested: str | None) -> None:
    trained, path = energy(1), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        if nested:
            pytest.skip("safetensors files are flat")
        save_file(trained.state_dict(), path)
    else:
        torch.save({nested: trained.state_dict(), "epoch": 3} if nested else trained.state_dict(), path)
    fresh = energy(2)
    checkpoint.load(fresh, path)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_a_layer_takes_its_own_names_or_those_of_its_energy(tmp_path: Path) -> None:
    trained = BundleEntropyArgmin(energy(1))
    for state in (trained.state_dict(), trained.energy.state_dict()):
        torch.save(state, tmp_path / "weights.pt")
        fresh = BundleEntropyArgmin(energy(2))
        checkpoint.load(fresh, tmp_path / "weights.pt")
        assert torch.equal(next(fresh.parameters()), next(trained.parameters()))


def test_what_differs_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = energy(1, hidden=(4,)).state_dict()
    state["extra"] = torch.zeros(1)
    del state["layers.0.b"]
    torch.save(state, tmp_path / "weights.pt")
    fresh = energy(2)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(InputError) as caught:
        checkpoint.load(fresh, tmp_path / "weights.pt")
    sentence = str(caught.value)
    assert "missing layers.0.b;" in sentence
    assert "unexpected extra;" in sentence
    assert "of another shape layers.0.W_x [4, 2] for [3, 2]" in sentence
    assert "let the factory build the model" in sentence
    assert "\n" not in sentence
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_at_most_five_names_are_listed(tmp_path: Path) -> None:
    torch.save({f"t{i}": torch.zeros(1) for i in range(9)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="unexpected t0, t1, t2, t3, t4 and 4 more"):
        checkpoint.load(energy(), tmp_path / "weights.pt")


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def test_a_pickled_module_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "whole.pt"
    torch.save(energy(), path)
    with pytest.raises(InputError, match=r"more than tensors.*save model.state_dict\(\)"):
        checkpoint.read(path)
    torch.save({"weight": Evil()}, path)
    with pytest.raises(InputError, match="more than tensors"):
        checkpoint.read(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError):
        checkpoint.read(path)


def test_other_bad_checkpoints(tmp_path: Path) -> None:
    for name, data, message in [
        ("a.bin", b"", r"expected a \.safetensors, \.pt or \.pth, but got '\.bin'"),
        ("a.safetensors", b"nonsense", "cannot be read as a checkpoint"),
        ("a.pt", b"PK\x03\x04nonsense", "cannot be read as a checkpoint"),
        ("a.pth", b"", "cannot be read as a checkpoint"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            checkpoint.read(tmp_path / name)
    with pytest.raises(InputError, match="there is no such file"):
        checkpoint.read(tmp_path / "missing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="expected a dictionary of tensors, but got list"):
        checkpoint.read(tmp_path / "list.pt")


# --- Settings ------------------------------------------------------------------------------------


def test_settings_come_from_the_command_then_the_layer_then_the_defaults() -> None:
    nothing = {"n": None, "iterations": None, "steps": None, "gap_tolerance": None}
    plain = checkpoint.settings(energy(), **nothing)
    assert (plain.iterations, plain.gap_tolerance) == (10, 1e-3)
    made = BundleEntropyArgmin(energy(), iterations=4, steps=7, gap_tolerance=0.1, residual_tolerance=0.2)
    kept = checkpoint.settings(made, **nothing)
    assert (kept.iterations, kept.steps, kept.gap_tolerance, kept.residual_tolerance) == (4, 7, 0.1, 0.2)
    mixed = checkpoint.settings(made, **{**nothing, "iterations": 9})
    assert (mixed.iterations, mixed.steps) == (9, 7)
    assert mixed.energy is made.energy
    with pytest.raises(ExportError, match="gap_tolerance: expected a finite number above 0"):
        checkpoint.settings(energy(), **{**nothing, "gap_tolerance": -1.0})


def test_a_solver_of_another_kind_stays_what_it_is() -> None:
    nothing = {"n": None, "iterations": None, "steps": None, "gap_tolerance": None}
    made = BregmanProximalGradient(energy(), 30, 0.5, domain="space", mu=2.0)
    assert checkpoint.is_solver(made)
    assert not checkpoint.is_solver(made.energy)
    kept = checkpoint.settings(made, **{**nothing, "n": 3, "iterations": 12})
    assert isinstance(kept, BregmanProximalGradient)
    assert (kept.iterations, kept.step_size, kept.domain, kept.mu) == (12, 0.5, "space", 2.0)
    with pytest.raises(InputError, match="steps: BregmanProximalGradient has no such setting to change"):
        checkpoint.settings(made, **{**nothing, "steps": 7})

    class Own(torch.nn.Module):
        y_dim, iterations, steps, gap_tolerance, residual_tolerance = 3, 5, 20, 1e-2, None

        def __init__(self) -> None:
            super().__init__()
            self.energy = energy()

    own = Own()
    assert checkpoint.settings(own, **{**nothing, "n": 3}) is own
    with pytest.raises(InputError, match="iterations: Own has no such setting"):
        checkpoint.settings(own, **{**nothing, "iterations": 7})
