"""Names in packages of others that mean something else for a while."""

import contextlib
from typing import Any


def replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Until the stack is left."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:  # found by the owner's __getattr__
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)
