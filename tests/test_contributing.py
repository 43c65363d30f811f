"""What CONTRIBUTING.md says of where things are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = TEXT.partition("### Where is\n")[2].partition("\n## ")[0].splitlines()
# Each file of a row, with the names that are said to be in it.
PLACES = [
    (row.split("|")[1].strip(), file, re.findall(r"`(\w+)`", names))
    for row in ROWS
    for file, names in re.findall(r"`([\w/.]+\.\w+)`: ((?:`\w+`(?:, )?)+)", row)
]


def test_the_table_is_read() -> None:
    assert len(PLACES) >= 10


@pytest.mark.parametrize(("task", "file", "names"), PLACES, ids=[f"{task}: {file}" for task, file, _ in PLACES])
def test_what_is_looked_for_is_there(task: str, file: str, names: list[str]) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"(?m)^ *(?:def|class|enum class) {name}\b|^{name}\b.* = ", text), f"{file} has no {name}"


@pytest.mark.parametrize("folder", ["native/core", "native/ort", "tests", "benchmarks", ".ci"])
def test_the_map_has_a_row_for_every_folder(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert f"`{folder}/`" in TEXT or f"`{folder}`" in TEXT


def test_the_map_has_a_row_for_every_folder_of_the_runtime() -> None:
    for folder in sorted((ROOT / "icnnrt").iterdir()):
        if folder.is_dir() and not folder.name.startswith(("_", ".")):
            assert f"`{folder.name}/`" in TEXT, f"CONTRIBUTING.md has no row for icnnrt/{folder.name}"
