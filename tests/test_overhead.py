"""What an export changes in the process while it runs, and leaves as it was."""

import gc
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from icnnrt_exporters.exporter import export  # noqa: E402
from icnnrt_exporters.tracing.overhead import THRESHOLDS, collected_rarely, one_thread  # noqa: E402
from icnnrt_models import FICNN  # noqa: E402


def test_an_export_collects_rarely_and_takes_one_thread_while_it_runs(tmp_path: Path) -> None:
    before, threads = gc.get_threshold(), torch.get_num_threads()
    seen = []

    def look(stage: str) -> None:
        seen.append((gc.get_threshold(), torch.get_num_threads()))
        if stage == "parity with torch":
            raise KeyboardInterrupt

    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            export(FICNN(2, 3, (4,)), None, torch.randn(4, 2), torch.rand(4, 3), tmp_path / "a.icnn", progress=look)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen
    assert set(seen) == {(THRESHOLDS, 1)}
    assert gc.get_threshold() == before


def test_exports_that_overlap_restore_what_was_before_the_first() -> None:
    before = gc.get_threshold()
    first, second = collected_rarely(), collected_rarely()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold() == THRESHOLDS
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


@pytest.mark.parametrize("chosen", [(0, 10, 10), (1_000_000, 200, 200)])
def test_whoever_collects_less_goes_on_doing_so(chosen: tuple[int, int, int]) -> None:
    before = gc.get_threshold()
    gc.set_threshold(*chosen)
    try:
        with collected_rarely():
            assert gc.get_threshold() == chosen
        assert gc.get_threshold() == chosen
    finally:
        gc.set_threshold(*before)


def test_one_thread_is_left_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert torch.get_num_threads() == before


def test_threads_that_overlap_restore_what_was_before_the_first() -> None:
    before, within, go_on, found = torch.get_num_threads(), threading.Event(), threading.Event(), []

    def other() -> None:
        with one_thread():
            within.set()
            go_on.wait()
        found.append(torch.get_num_threads())

    torch.set_num_threads(2)
    thread = threading.Thread(target=other)
    try:
        with one_thread():
            thread.start()
            within.wait()
        assert torch.get_num_threads() == 2
        go_on.set()
        thread.join()
        assert found == [2]
        assert torch.get_num_threads() == 2
    finally:
        go_on.set()
        torch.set_num_threads(before)
