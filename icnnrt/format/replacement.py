"""A package's folder replaced by a new one, so that whatever interrupts leaves the old package or the new one.

The docstring of `icnnrt.format.package` says what holds on the way.
"""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from icnnrt.arguments import flag, refused
from icnnrt.errors import IcnnrtError, InputError
from icnnrt.format.files import sync_folder
from icnnrt.format.folder import PACKAGE_FILE, asides, check_place, is_ignored, is_package, list_folder
from icnnrt.printable import show

# Of a package's folder, in bytes; file systems take 255, and folders aside have a token too.
MAX_NAME: Final = 224


def check_target(target: Path, overwrite: bool, *, kind: type[IcnnrtError] = InputError) -> tuple[Path, ...]:
    """Refuse a path that is taken by anything but a package that may be overwritten, or that lies in one.

    Returns what lies in the folder to be replaced and is not the package's, which is to be in the new one too.
    """
    there = old = None
    overwrite = flag(overwrite, "overwrite")
    try:
        if "\0" in str(target):
            raise refused("path", "a place on the disk", show(str(target)), "choose another", kind=kind)
        if (length := len(os.fsencode(target.name))) > MAX_NAME:
            why = "as the folders that a replacement makes beside it have longer ones"
            expected = f"a name of at most {MAX_NAME} bytes, {why}"
            raise refused("path", expected, f"one of {length}", "choose a shorter one", kind=kind)
        check_place(target, "path", kind=kind)
        there = os.path.lexists(target)
        old = target if there else next(filter(is_package, asides(target)), None)
        if there and (target.is_symlink() or not is_package(target)):
            raise kind(
                f"path: {target} exists and is not a package of plain files alone, so it is not replaced; "
                "choose another path or remove it yourself."
            )
        beside = _beside(old) if old else ()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        if isinstance(error, IcnnrtError):
            raise
        raise kind(f"path: {target} cannot be looked at ({error}); choose another.") from error
    if old and not overwrite:
        if there:
            raise kind(f"path: {target} is there already; pass overwrite=True to replace it, or choose another path.")
        raise kind(
            f"path: {target} is a package whose replacement was interrupted, in {old.name}; pass overwrite=True "
            "to replace it, or choose another path."
        )
    stuck = [path.name for path in beside if not _can_be_carried(path)]
    if stuck:
        names = ", ".join(show(name) for name in stuck[:5]) + (f" and {len(stuck) - 5} more" if len(stuck) > 5 else "")
        raise kind(
            f"path: {target} also holds {names}, which a replacement of the folder cannot take along; choose another "
            "path, or move what is not the package's out of the folder."
        )
    return beside


def _beside(folder: Path) -> tuple[Path, ...]:
    """What lies in a package's folder and is not read."""
    return tuple(folder / name for name in list_folder(folder)[1])


def _can_be_carried(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def _carry(path: Path, folder: Path) -> None:
    """Have a file of the old folder in the new one too: a second name for it, or a copy where there are no such."""
    new = folder / path.name
    with contextlib.suppress(FileNotFoundError):  # somebody has removed it
        if path.is_symlink():
            os.symlink(os.readlink(path), new)
            return
        try:
            os.link(path, new)
        except FileNotFoundError:
            raise
        except OSError:  # a file system that has no links
            shutil.copy2(path, new)
            with open(new, "rb+") as copy:
                os.fsync(copy.fileno())


def replace_folder(target: Path, files: Mapping[str, bytes], beside: Collection[Path] = ()) -> None:
    """Put a folder with these files, and what was `beside` the old ones, at `target`.

    The module docstring says what holds on the way.
    """
    token = secrets.token_hex(8)
    new = target.with_name(f".{target.name}.new-{token}")
    old = target.with_name(f".{target.name}.old-{token}")
    try:
        os.mkdir(new)
        for name, data in files.items():
            with open(new / name, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        for path in beside:
            _carry(path, new)
        sync_folder(new)
        if os.path.lexists(target):
            # Left behind by an earlier interruption; the only folder aside is to be this package's.
            _remove_asides(target)
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        try:
            if os.path.lexists(old) and not os.path.lexists(target):
                os.rename(old, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        raise
    try:
        sync_folder(target.parent)
    except OSError as error:
        if os.path.lexists(old):
            error.add_note(f"{target} is the new package; the old one is kept in {old}.")
        raise
    # Only now is the new package sure to survive a loss of power.
    _remove_asides(target)


def _remove_asides(target: Path) -> None:
    """Delete the folders aside of `target`, but no file that is neither a package's nor at `target` too."""
    for folder in asides(target, always=True):
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                if PACKAGE_FILE.fullmatch(name) or (is_ignored(name) and os.path.lexists(target / name)):
                    with contextlib.suppress(OSError):  # a folder, for one
                        os.unlink(folder / name)
            os.rmdir(folder)
