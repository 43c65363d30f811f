"""SECURITY.md promises what tests hold."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE.parent / "SECURITY.md").read_text(encoding="utf-8")


def known() -> set[str]:
    """The name of every test there is."""
    names = set()
    for file in HERE.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.add(node.name)
    return names


def test_every_test_that_security_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 30
    assert named <= known(), named - known()


def test_every_threat_is_held_by_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| **")]
    assert len(rows) > 15
    for row in rows:
        threat, promise, held = (cell.strip() for cell in row.strip("|").split(" | "))
        assert promise, threat
        assert re.search(r"`test_\w+`|TODO-LIMITS", held), threat
