"""Listing of the files below a folder, shared by all sources and image sets that read folders."""

import functools
import os
import stat
from collections import deque
from pathlib import Path
from typing import NamedTuple

from absl import logging

from repae_jax import faults

_BROKEN = 0  # stands for the mode of a link's missing target


class Listing(NamedTuple):
    """Paths below a folder, relative to it, with forward slashes, sorted."""

    files: list[str]  # with the wanted endings
    others: list[str]  # all other files
    folders: list[str]  # directly below it, without links to itself


def list_below(root: str | os.PathLike, endings: tuple[str, ...]) -> Listing:
    """Returns the Listing of an existing folder; `endings` are those of wanted files, with dots, in lower case for either case.

    Names that begin with a dot are hidden, with all that such folders contain. Links are followed, but no folder is entered
    twice: not by a link to a folder above it, nor by two links; a folder's own path is preferred to links to it.

    Raises ValueError if a folder may not be listed, a link that may have led to a folder is broken, or a pipe or a device has a
    wanted file's name; and OSError, naming the folder, if the system fails.
    """
    files, others, folders = [], [], []
    above = map(os.stat, Path(os.path.realpath(root)).parents)
    entered = {(status.st_dev, status.st_ino): "" for status in above}  # (device, inode) -> path
    entering, links = deque([""]), deque()
    while entering or links:
        folder = entering.popleft() if entering else links.popleft()
        full = os.path.join(root, folder) if folder else str(root)
        entries, number = faults.read(_entries, full, name=functools.partial(repr, full))
        if number in entered:
            logging.warning("%r is the folder %r or above it, and not entered", full, os.path.join(root, entered[number]))
            if entered[number] == "" and folder in folders:
                folders.remove(folder)
            continue
        entered[number] = folder
        for name, is_link, mode in entries:
            path = f"{folder}/{name}" if folder else name
            wanted = name.lower().endswith(endings)
            if stat.S_ISDIR(mode):
                (links if is_link else entering).append(path)
                if not folder:
                    folders.append(path)
            elif mode == _BROKEN and not wanted:
                raise ValueError(f"{os.path.join(full, name)!r} is a link that leads to nothing: mend or remove it")
            elif wanted and mode not in (stat.S_IFREG, _BROKEN):
                raise ValueError(f"{os.path.join(full, name)!r} is a pipe, a socket or a device, no file: remove or rename it")
            else:
                (files if wanted else others).append(path)
    return Listing(sorted(files), sorted(others), sorted(folders))


def printable(path: str) -> str:
    """Returns a path as text that can be printed, logged and encoded: bytes that are not UTF-8 as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _entries(folder):
    """Returns ([(name, whether a link, mode of the file or the link's target), ...], the folder's (device, inode))."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
            return [(entry.name, entry.is_symlink(), _mode(entry)) for entry in visible], (status.st_dev, status.st_ino)
    except OSError as error:
        if faults.is_of_the_system(error):
            raise
        raise ValueError(f"folder {folder!r} cannot be listed ({error.strerror}): make it readable, or move it away") from error


def _mode(entry):
    if not entry.is_symlink():  # the folder holds the type; a call of stat takes long on network disks
        if entry.is_dir():
            return stat.S_IFDIR
        if entry.is_file():
            return stat.S_IFREG
    try:
        return stat.S_IFMT(entry.stat().st_mode)
    except OSError as error:
        if faults.is_of_the_system(error):
            raise
        return _BROKEN
