"""The folder of a package on the disk: listing it, reading its files, and telling a package from anything else."""

import contextlib
import errno
import os
import re
import stat
from itertools import islice
from pathlib import Path
from typing import Final, TypeAlias

from icnnrt import arguments
from icnnrt.errors import IcnnrtError, InputError, PackageError
from icnnrt.format.fields import AGAIN, load_json
from icnnrt.format.files import NotPlain, read_whole
from icnnrt.format.manifest import FORMAT, GOLDEN_FILE, MANIFEST_FILE, MAX_MANIFEST_BYTES, WEIGHTS_FILE, Manifest
from icnnrt.printable import show

StrPath: TypeAlias = str | os.PathLike[str]

# Far more than a package can have, and few enough to list.
MAX_ENTRIES: Final = 4096
# What lies beside packages in working copies, on volumes and in file managers; so does what begins with a dot.
IGNORED: Final = frozenset(("README.md", "LICENSE", "Thumbs.db", "lost+found"))
PACKAGE_FILE: Final = re.compile(
    rf"{'|'.join(map(re.escape, (MANIFEST_FILE, WEIGHTS_FILE, GOLDEN_FILE)))}|[a-z][a-z0-9_]*\.onnx"
)


def folder_of(path: object, argument: str = "path") -> Path:
    """The absolute path of a folder that a caller gave, or the `InputError`."""
    try:
        return Path(os.path.abspath(arguments.path(path, argument)))
    except OSError as error:  # a relative path, and the working directory is gone
        raise InputError(
            f"{argument}: the working directory, from which {show(str(path))} is counted, cannot be found "
            f"({error.strerror}); give an absolute path."
        ) from error


def asides(target: Path, *, always: bool = False) -> list[Path]:
    """Folders that replacements of `target` have put aside, newest first; none, unless `always`, where it exists.

    A rename keeps a folder's time of change, so it is when the package was written.
    """
    found: list[tuple[int, str]] = []
    # ValueError: a null character in the path.
    with contextlib.suppress(OSError, ValueError):
        if always or not os.path.lexists(target):
            with os.scandir(target.parent) as entries:
                found = [
                    (entry.stat(follow_symlinks=False).st_mtime_ns, entry.name)
                    for entry in entries
                    if entry.name.startswith(f".{target.name}.old-") and entry.is_dir(follow_symlinks=False)
                ]
    return [target.with_name(name) for _, name in sorted(found, reverse=True)]


def read_folder(folder: Path, follow_links: bool) -> tuple[Manifest, dict[str, bytes], tuple[str, ...]]:
    """Read the manifest and then exactly the files it lists, by name and with the size it gives."""
    names, ignored = list_folder(folder, follow_links)
    manifest = Manifest.from_json(_read_file(folder / MANIFEST_FILE, follow_links, limit=MAX_MANIFEST_BYTES))
    listed = {graph.file: graph.bytes for graph in manifest.graphs.values()}
    listed[manifest.weights.file] = manifest.weights.bytes
    if manifest.golden:
        listed[manifest.golden.file] = manifest.golden.bytes
    for name in sorted(listed.keys() - names):
        raise PackageError(f"{name} is missing, though {MANIFEST_FILE} lists it; copy the whole folder, or {AGAIN}.")
    for name in sorted(names - listed.keys() - {MANIFEST_FILE}):
        raise PackageError(
            f"{show(name)} does not belong to the package: {MANIFEST_FILE} does not list it; move it out of the folder."
        )
    files = {name: _read_file(folder / name, follow_links, size=size) for name, size in listed.items()}
    return manifest, files, ignored


def is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def list_folder(folder: Path, follow_links: bool = False) -> tuple[set[str], tuple[str, ...]]:
    """The names in a package folder, and those of what is ignored there.

    Refuses a folder without a manifest, and what is no plain file: with `follow_links`, no link to one either.
    """
    try:
        if folder.is_file():
            raise PackageError(
                "expected a package, which is a folder, but this is a file; a packed .onnx runs as it is "
                "in onnxruntime.InferenceSession, an archive must be unpacked first."
            )
        if not os.path.lexists(folder):
            aside = asides(folder)
            remedy = (
                f"a new one was being written, and the old one, in {aside[0].name}, is damaged too; copy the package "
                f"again or {AGAIN}."
                if aside
                else "check the path, or export the model first."
            )
            raise PackageError(f"expected a package folder, but there is nothing; {remedy}")
        with os.scandir(folder) as entries:
            listed = list(islice(entries, MAX_ENTRIES + 1))
        # First, as it matters little what else such a folder holds; among very many files it may not be listed.
        if MANIFEST_FILE not in {entry.name for entry in listed} and not os.path.lexists(folder / MANIFEST_FILE):
            raise PackageError(
                f"expected a package, but the folder has no {MANIFEST_FILE}; "
                "give the path of the package folder itself, or export the package again."
            )
        if len(listed) > MAX_ENTRIES:
            raise PackageError(
                f"a package holds a few files, but there are more than {MAX_ENTRIES} in the folder; move out what does "
                "not belong to it."
            )
        names, ignored = set(), []
        for entry in sorted(listed, key=lambda e: e.name):
            if is_ignored(entry.name):
                ignored.append(entry.name)
                continue
            if kind := _no_file(entry, follow_links):
                raise PackageError(f"a package holds plain files only, but {show(entry.name)} is {kind}.")
            names.add(entry.name)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise PackageError(f"cannot be read ({error}); check the path and its permissions.") from error
    return names, tuple(ignored)


def _no_file(entry: os.DirEntry[str], follow_links: bool) -> str:
    """What an entry of a package's folder is, and a remedy, if it is no file; empty if it is one."""
    whole = "copy the package so that it holds the files themselves, and nothing else"
    if not entry.is_symlink():
        if entry.is_file(follow_symlinks=False):
            return ""
        kind = "a folder" if entry.is_dir(follow_symlinks=False) else "neither a file nor a folder"
        return f"{kind}; {whole}"
    if not follow_links:
        return (
            "a symbolic link; pass follow_links=True, or --follow-links on the command line, if whoever made the link "
            f"is to be trusted, or {whole}"
        )
    try:
        mode = os.stat(entry.path).st_mode
    except FileNotFoundError:
        return "a symbolic link to what is not there; copy the files that it and others lead to"
    except OSError as error:
        why = "leads in a circle" if error.errno == errno.ELOOP else f"cannot be followed ({error.strerror})"
        return f"a symbolic link that {why}; {whole}"
    if stat.S_ISREG(mode):
        return ""
    kind = "a folder" if stat.S_ISDIR(mode) else "what is neither a file nor a folder, such as a device or a pipe"
    return f"a symbolic link to {kind}; {whole}"


def _read_file(path: Path, follow_links: bool = False, *, size: int | None = None, limit: int = 0) -> bytes:
    """Read a file that should have exactly `size` bytes, or at most `limit`."""
    try:
        data, found = read_whole(path, lambda n: n <= limit if size is None else n == size, follow_links)
    except NotPlain as error:
        raise PackageError(f"{path.name}: expected a plain file; copy the package again or {AGAIN}.") from error
    except OSError as error:
        raise PackageError(f"{path.name}: cannot be read ({error}); check its permissions.") from error
    if data is not None:
        return data
    if size is None:
        raise PackageError(f"{path.name}: expected at most {limit} bytes, but it has {found}; {AGAIN}.")
    raise PackageError(
        f"{path.name}: expected {size} bytes, as {MANIFEST_FILE} says, but it has {found}; "
        f"the file is truncated or was changed, so copy the package again or {AGAIN}."
    )


def is_package(folder: Path) -> bool:
    """Tell whether a folder may be replaced as a package: it holds nothing else, or what is ignored in one."""
    try:
        if not all(PACKAGE_FILE.fullmatch(name) for name in list_folder(folder)[0]):
            return False
    except PackageError:
        return False
    return _has_manifest(folder)


def _has_manifest(folder: Path, follow_links: bool = False) -> bool:
    """Whether the manifest.json of a folder says that it is a package's, and not one of the many others."""
    try:
        data = _read_file(folder / MANIFEST_FILE, follow_links, limit=MAX_MANIFEST_BYTES)
        manifest = load_json(data, MANIFEST_FILE)
    except PackageError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def check_place(path: Path, argument: str, *, kind: type[IcnnrtError] = InputError) -> None:
    """Refuse a place for a file or folder whose own folder is not there, or that lies in a package."""
    if not path.parent.is_dir():
        raise kind(f"{argument}: the folder {path.parent} is not there; create it first.")
    refuse_inside_a_package(path, argument, kind=kind)


def refuse_inside_a_package(path: StrPath, argument: str, *, kind: type[IcnnrtError] = InputError) -> None:
    """Refuse a place for a file or folder that lies in a package: with anything else in it a package does not open.

    Links are followed, for the place may be reached by them; whether case counts is the file system's affair.
    """
    try:
        folders = Path(os.path.realpath(path)).parents
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise kind(f"{argument}: {path} cannot be looked at ({error}); choose another.") from error
    for folder in folders:
        if os.path.lexists(folder / MANIFEST_FILE) and _has_manifest(folder, follow_links=True):
            raise kind(
                f"{argument}: {path} lies in the package {folder}, which would not open with another file in it; "
                "choose a place outside."
            )
