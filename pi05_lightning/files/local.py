"""Local files: written as a whole or not at all, and JSON that says what is wrong with it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that stands for a large one, which Git LFS has not downloaded."""
LOCK = ".lock"
"""The file in a folder that is locked by the process which holds the folder, and stays there."""


@contextmanager
def replacing(path: Path, *, one_writer: bool = False) -> Iterator[Path]:
    """A new path beside `path`, for a file or a folder, that takes its place once the block has ended without error.

    Whoever reads `path` sees the old content or the new one, never a part, whenever the process is killed. What is left
    of a block that failed is removed. A folder can only take a place that is free.

    one_writer: no two processes write to `path` at a time. The part always has the same name then, so that what a
    killed process left of it is gone with the next writing.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.part" if one_writer else f".{path.name}.{os.getpid()}.part")
    delete(part, ignore_errors=True)
    try:
        yield part
        if part.is_file():
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # else the name may reach the disk before the content does
        part.replace(path)
    finally:
        delete(part, ignore_errors=True)


@contextmanager
def held(folder: Path, by: str, *, instead: str = "another --out") -> Iterator[None]:
    """A folder that no other process holds meanwhile; it is made if there is none.

    Raises ValueError while another one does, which is said to be held `by` it, with what to give `instead`. A killed
    process holds nothing, even while processes that it forked live on. NFS keeps other machines' processes out too: it
    tells its server of locks on files that are open for writing, and of none on folders. A file system without locks,
    as Windows', keeps nobody out.
    """
    make_folder(folder)
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _LOCKS.add(lock)
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            os.fchmod(lock, 0o666)  # whatever the umask: others who share the folder lock it too
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock).st_nlink:  # who held it has just removed it
                raise BlockingIOError
        except BlockingIOError:
            raise ValueError(f"another {by}: wait for it, or give {instead}") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
        yield
    finally:
        if lock in _LOCKS:  # not in a process that was forked meanwhile
            _LOCKS.remove(lock)
            os.close(lock)


_LOCKS: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _let_go() -> None:
    """Close a forked process's copies of the descriptors, each of which would keep a folder held."""
    while _LOCKS:
        os.close(_LOCKS.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def empty(folder: Path) -> None:
    """Delete all that is in a folder, but for the lock of the process that holds it."""
    for entry in folder.iterdir():
        if entry.name != LOCK:
            delete(entry)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there. OSError, with the folder, where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{folder} cannot be made: {error.strerror}") from error


def check_writable(folder: Path, option: str) -> None:
    """ValueError where nothing can be written to a folder, or where it would have to be made.

    option: which one names it.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): name another {option}") from error


def check_new(folder: Path, option: str) -> None:
    """ValueError where a folder is there already, or where it could not be made.

    option: which one names it.
    """
    if folder.exists():
        raise ValueError(f"{option} {folder} already exists: delete it or name another")
    check_writable(folder, option)


def shown(path: Path | str) -> str:
    """A path for a message, with the folder that it is relative to: `data/robot (in /home/me)`."""
    return str(path) if Path(path).expanduser().is_absolute() else f"{path} (in {Path.cwd()})"


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole; makes the folders above it."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_once(path: Path, text: str) -> None:
    """Write a text file, or leave it as it is. Raises ValueError where there is one with another text."""
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{path} was written with other options, or by another version: give those, or another directory"
        )
    write_text(path, text)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file as a whole; makes the folders above it."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file.  default: what a missing file gives.

    ValueError if the file is missing and there is no default, or is damaged (with the line), or holds no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if default is not None:
            return default
        raise ValueError(f"{shown(path)} does not exist: name the folder that holds {path.name}") from error
    except ValueError as error:  # of json, or no UTF-8
        check_downloaded(path)
        raise ValueError(f"{path} is not valid JSON ({error}): correct or restore it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object but a {type(values).__name__}")
    return values


def check_downloaded(file: Path) -> None:
    """ValueError where there is a pointer of Git LFS in place of a file."""
    with file.open("rb") as content:
        if content.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself: download it, as with `git lfs pull`")


def delete(path: Path, ignore_errors: bool = False) -> None:
    """A file, a link, or a folder with all in it; nothing where there is none.

    ignore_errors: leave what cannot be deleted in a folder; of a file or a link it is raised.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors)
    else:
        path.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """What an error says first; one that says nothing is named by its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def sha256(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
