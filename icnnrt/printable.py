"""Text of strangers on a terminal: one line, and nothing in it that a terminal obeys.

A name in a file may hold an escape that sets the window's title or moves the cursor, a newline that makes a line look
like one of icnnrt's own, or a mark that shows text in another order than it has. Whatever is no printable character is
written as Python and JSON write it: \\x1b, \\n, \\u202e. Letters of any script stay.
"""

import json
import re
from typing import Final

# What terminals and readers of text obey or do not show: everything that `str.isprintable` denies, which is control
# characters (C0, DEL, C1), formats (bidirectional overrides, zero-width characters), line and paragraph separators,
# lone surrogates, blanks other than the space, and what Unicode has not assigned.
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_PLAIN: Final = re.compile(r"[\w./\[\]:*-]{1,80}")


def printable(text: str) -> str:
    """The same on one line, with what is not printable written out; safe to print whatever it holds."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    code = ord(c)
    long = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return _SHORT.get(c, long)


def cropped(text: str, most: int) -> str:
    """At most so many characters of it, printable."""
    line = printable(text[: most + 1])
    return line if len(line) <= most else line[: most - 3] + "..."


def is_plain(text: str) -> bool:
    """Whether it can stand in a sentence as it is: letters, digits and what names of weights hold besides, not many."""
    return _PLAIN.fullmatch(text) is not None and text.isprintable()


def harmless(error: BaseException) -> Exception:
    """The same as the cause of another error: a traceback prints it, and its text may come from a stranger's file."""
    return RuntimeError(cropped(f"{type(error).__name__}: {error}", 2000)).with_traceback(error.__traceback__)


def show(value: object) -> str:
    """Show a value from a file in a message: short, and safe to print whatever it contains."""
    if isinstance(value, str):
        text = json.dumps(value[:81])  # of a name of megabytes the beginning is enough
    else:
        try:
            text = json.dumps(value) if isinstance(value, bool | None) else " ".join(ascii(value).split())
        except Exception:  # an object of the caller's own, or an integer with too many digits to write
            kind = type(value).__name__
            text = f"an {kind}" if kind[:1].lower() in "aeiou" else f"a {kind}"
    return text if len(text) <= 80 else text[:77] + "..."


def named(value: str) -> str:
    """Show a name from a file: as it is where it looks like one, else as `show` does, in quotes."""
    return value if is_plain(value) else show(value)
