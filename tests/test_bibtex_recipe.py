"""The bibtex recipe: its metrics against counts by hand and scikit-learn, and short runs of its training."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXACT = 1e-12  # float64 against float64: a few sums of numbers near 1


def import_recipe() -> ModuleType:
    """The recipe is a script in a model's folder, in no package."""
    name = "bibtex_recipe"
    spec = importlib.util.spec_from_file_location(name, ROOT / "models" / "bibtex" / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


recipe = import_recipe()


def synthetic(n_train: int = 120, n_test: int = 40, words: int = 24, tags: int = 6, seed: int = 0):
    """Binary words; tag j is there if enough of three words of its own are, and every row has one tag at least."""
    rng = np.random.default_rng(seed)
    x = (rng.random((n_train + n_test, words)) < 0.4).astype(np.float32)
    y = (x[:, : 3 * tags].reshape(-1, tags, 3).sum(2) >= 2).astype(np.float32)
    y[y.sum(1) == 0, 0] = 1.0
    return recipe.Split(recipe.Rows(x[:n_train], y[:n_train]), recipe.Rows(x[n_train:], y[n_train:]))


SMALL = {"hidden": 16, "batch_size": 32, "iterations": 2, "steps": 12, "positive_weight": 1.0}


# --- Metrics -------------------------------------------------------------------------------------


def test_scores_by_hand():
    true = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]])
    y = np.array([[0.9, 0.2, 0.6], [0.1, 0.0, 0.8], [0.1, 0.2, 0.3], [0.4, 0.0, 0.0]])
    # rows: TP 1 of 2 true and 2 predicted; all right; nothing and nothing; missed
    # columns: TP 1 of 2 true, 1 predicted; 1 true, none predicted; 1 true, 2 predicted
    found = recipe.scores(true, y)
    assert found.example == pytest.approx((0.5 + 1.0 + 1.0 + 0.0) / 4)
    assert found.label == pytest.approx((2 / 3 + 0.0 + 2 / 3) / 3)
    assert found.micro == pytest.approx(2 * 2 / (4 + 3))


def test_scores_of_no_labels_at_all():
    nothing = np.zeros((2, 3))
    assert recipe.scores(nothing, nothing) == (1.0, 1.0, 1.0)
    assert recipe.scores(nothing, np.ones((2, 3))) == (0.0, 0.0, 0.0)


def test_threshold_belongs_to_the_label():
    true = np.array([[1, 0]])
    assert recipe.scores(true, np.array([[0.5, 0.4999]])).example == 1.0
    assert recipe.scores(true, np.array([[0.7, 0.2]]), threshold=0.8).example == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed):
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    rng = np.random.default_rng(seed)
    true = rng.random((40, 7)) < 0.2  # some rows without any label
    y = rng.random((40, 7))
    predicted = y >= 0.8
    found = recipe.scores(true, y, 0.8)
    for value, average in ((found.example, "samples"), (found.label, "macro"), (found.micro, "micro")):
        assert value == pytest.approx(f1_score(true, predicted, average=average, zero_division=1.0), abs=EXACT)


def test_best_threshold_is_the_middle_of_the_best():
    true = np.array([[1, 0], [0, 1]])
    y = np.array([[0.6, 0.2], [0.2, 0.6]])  # every threshold in (0.2, 0.6] is perfect
    assert recipe.best_threshold(true, y) == pytest.approx(0.4, abs=0.02)


# --- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "loss"),
    [("argmin_network", "cross-entropy"), ("feed_forward", "cross-entropy"), ("feed_forward", "squared")],
)
def test_training_learns(build, loss):
    split, build = synthetic(), getattr(recipe, build)
    settings = recipe.Settings(epochs=6, learning_rate=5e-2, loss=loss, **SMALL)
    trained = recipe.train(build, split, settings, seed=0)
    found = recipe.report_of(trained, split.test, recipe.predict(trained.network, split.test.x))
    everything = recipe.scores(split.test.y, np.ones_like(split.test.y)).example
    assert found.test.example > everything + 0.1
    assert 1 <= found.epochs <= 15


def test_training_keeps_the_energy_convex():
    split = synthetic()
    layer = recipe.argmin_network(24, 6, recipe.Settings(**SMALL), seed=0)
    recipe.fit(layer, split.train, recipe.Settings(epochs=3, learning_rate=0.1, **SMALL), seed=0)
    state = layer.energy.state_dict()
    names = layer.energy.nonnegative_weights()
    assert names
    assert all((state[name] >= 0).all() for name in names)


def test_a_seed_names_one_network():
    split, settings = synthetic(), recipe.Settings(epochs=2, **SMALL)

    def answer(seed: int) -> np.ndarray:
        trained = recipe.train(recipe.argmin_network, split, settings, seed)
        return recipe.predict(trained.network, split.test.x)

    assert np.array_equal(answer(0), answer(0))
    assert not np.array_equal(answer(0), answer(1))


def test_early_stopping_hands_back_the_best_epoch():
    split = synthetic()
    settings = recipe.Settings(epochs=30, patience=2, learning_rate=3e-2, **SMALL)
    part, held_out = recipe.hold_out(split.train, seed=0)
    network = recipe.feed_forward(24, 6, settings, seed=0)
    history = recipe.fit(network, part, settings, 0, held_out)
    best = max(history, key=lambda epoch: epoch.validation.example)
    assert recipe.scores(held_out.y, recipe.predict(network, held_out.x)) == best.validation
    assert len(history) == min(30, best.number + 2)


def test_held_out_rows_are_a_fifth_and_none_is_lost():
    data = synthetic(n_train=101).train
    marked = recipe.Rows(np.arange(101, dtype=np.float32)[:, None], data.y)
    part, held_out = recipe.hold_out(marked, seed=3)
    assert len(held_out.x) == 20
    assert sorted(np.concatenate([part.x, held_out.x])[:, 0]) == list(range(101))


@pytest.mark.slow
def test_one_epoch_on_bibtex_itself():
    if not recipe.DATA.is_file():
        pytest.skip("bibtex.npz is not in ../shared/data: Mulan's bibtex, which the project does not carry")
    split = recipe.load(recipe.DATA)
    assert [a.shape for rows in split for a in rows] == [(4880, 1836), (4880, 159), (2515, 1836), (2515, 159)]
    assert (split.test.y.sum(1) >= 1).all()
    few = recipe.Split(split.train.take(slice(0, 320)), split.test.take(slice(0, 64)))
    settings = recipe.Settings(epochs=1, iterations=2)
    seen: list[recipe.Epoch] = []
    trained = recipe.train(recipe.argmin_network, few, settings, seed=0, on_epoch=seen.append)
    assert [epoch.validation is not None for epoch in seen] == [True, False]
    y = recipe.predict(trained.network, few.test.x)
    assert y.shape == (64, 159)
    assert ((y >= 0) & (y <= 1)).all()
    found = recipe.report_of(trained, few.test, y)
    assert all(0 <= score <= 1 for score in (*found.test, *found.test_tuned, *found.test_four_fifths))


# --- The file and the command line ---------------------------------------------------------------


def save(path: Path, split) -> Path:
    (a, b), (c, d) = split
    np.savez(path, trainX=a.astype(np.uint8), trainY=b.astype(np.uint8), testX=c.astype(np.uint8), testY=d)
    return path


def test_load_reads_what_was_saved(tmp_path):
    split = synthetic()
    found = recipe.load(save(tmp_path / "data.npz", split))
    for got, true in zip((*found.train, *found.test), (*split.train, *split.test), strict=True):
        assert got.dtype == np.float32
        assert np.array_equal(got, true)


def refused(capsys, path: Path) -> str:
    assert recipe.main(["--data", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Mulan" in captured.err
    assert captured.err.count("\n") == 1
    return captured.err


def test_absent_data_is_one_sentence_and_exit_code_2(capsys, tmp_path):
    assert "no data file nowhere.npz" in refused(capsys, tmp_path / "nowhere.npz")


def test_unfit_data_is_one_sentence_and_exit_code_2(capsys, tmp_path):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"not a zip file")
    assert "cannot be read" in refused(capsys, broken)
    other = tmp_path / "other.npz"
    np.savez(other, trainX=np.zeros((2, 2)))
    assert "cannot be read" in refused(capsys, other)
    split = synthetic()
    halves = recipe.Split(split.train, split.test._replace(x=split.test.x / 2))
    np.savez(other, **dict(zip(recipe.ARRAYS, (*halves.train, *halves.test), strict=True)))
    assert "shapes" in refused(capsys, other)
    np.savez(other, **dict(zip(recipe.ARRAYS, (*split.train, *split.test), strict=True)) | {"testX": np.zeros((40, 3))})
    assert "shapes" in refused(capsys, other)
