"""Files that an interruption leaves old or new, never in part; and reading what may be anything at all."""

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_atomically(target: Path, data: bytes) -> None:
    """Put `data` at `target`: a scratch file beside it, flushed to the disk, then renamed. Raises `OSError`.

    A kill may leave the scratch file, `.<name>.<token>.tmp`; see `scratch_of`.
    """
    with atomic_file(target) as file:
        file.write(data)


@contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """A file to write in the block, which stands at `target` once the block has ended. Raises `OSError`.

    Until then it is a scratch file beside it, of which `scratch_of` tells the name; it is flushed to the disk, then
    renamed. A block that raises leaves the target as it was and no scratch file.
    """
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(scratch, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def scratch_of(name: str) -> str | None:
    """The name of the file that a scratch file called `name` was to become; None if it is no scratch file."""
    parts = name.rsplit(".", 2)
    return parts[0][1:] if len(parts) == 3 and name[0] == "." and parts[0][1:] and parts[2] == "tmp" else None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; Windows offers no way to, and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NotPlain(OSError):
    """It is a folder, a pipe, a device, or a link that is not to be followed."""


def read_whole(path: Path, fits: Callable[[int], bool], follow_links: bool = False) -> tuple[bytes | None, int]:
    """The bytes of a plain file, if their number `fits`, and that number. Pipes are not waited for.

    The size is looked at before memory is taken for it. Raises `OSError`, `NotPlain` where it is no file.
    """
    # The name may have become a link or a pipe since it was listed.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= 0 if follow_links else getattr(os, "O_NOFOLLOW", 0)
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise NotPlain(f"{path.name} is not a plain file")
        if not fits(status.st_size):
            return None, status.st_size
        data = file.read(status.st_size + 1)  # one more: it may have grown meanwhile
    return data if len(data) == status.st_size else None, len(data)


def read_plain(path: Path, most: int) -> bytes | None:
    """The bytes of a plain file; None if it has more than `most`. Links are not followed. Raises `OSError`."""
    return read_whole(path, lambda size: size <= most)[0]
