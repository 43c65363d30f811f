"""A plugin of pytest: as Python reads one file, one piece of its text is replaced. See `mutants`."""

import importlib.machinery
import os
from types import CodeType

PLACE, BEFORE, AFTER = os.environ["ICNNRT_MUTANT"].split("\x1f")
_get_code = importlib.machinery.SourceFileLoader.get_code


def get_code(self: importlib.machinery.SourceFileLoader, fullname: str) -> CodeType | None:
    if getattr(self, "path", None) != PLACE:
        return _get_code(self, fullname)
    with open(PLACE, encoding="utf-8") as file:
        text = file.read()
    assert text.count(BEFORE) == 1
    return self.source_to_code(text.replace(BEFORE, AFTER).encode(), PLACE)


importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
