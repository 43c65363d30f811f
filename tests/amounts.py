"""How much is tried of what is tried many times over: a tenth, or all of it with ICNNRT_TEST_AMOUNT=all.

`make test` tries a tenth and leaves out what is marked `slow`; `make test-all` is the whole. Both try every capability:
what is left out repeats it in size.
"""

import os

ALL = os.environ.get("ICNNRT_TEST_AMOUNT") == "all"


def amount(whole: int) -> int:
    """That many, or a tenth of it."""
    return whole if ALL else max(1, whole // 10)
