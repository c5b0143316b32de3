"""The files below a folder: the one way in which data are looked for."""

import functools
import os
import stat
from collections import deque
from pathlib import Path
from typing import NamedTuple

from absl import logging

from repae_jax import faults

_BROKEN = 0  # mode of a link that leads nowhere


class Listing(NamedTuple):
    """Holds what is below a folder, as paths relative to it, with forward slashes, sorted.

    Attributes:
      files: the wanted ones.
      others: the files that are not.
      folders: all folders right below it, but for links to itself.
    """

    files: list[str]
    others: list[str]
    folders: list[str]


def list_below(root, endings):
    """Returns the Listing of a folder.

    Names that begin with a dot are hidden: neither such files nor what is in such folders count. Links are followed, but no
    folder is entered twice: not by a link to a folder above it, nor by two links; its own place comes before links to it.

    Args:
      root: the folder, which exists.
      endings: lower case, with their dots, of the names of wanted files, large or small.

    Raises:
      ValueError: if a folder may not be listed, a link that could be one to a folder leads nowhere, or a pipe or a device is
        named as a wanted file; it names them.
      OSError: if the system fails, naming the folder.
    """
    files, others, folders = [], [], []
    entered = dict.fromkeys(_above(root), "")  # (device, inode) -> path
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


def printable(path):
    """Returns a path as text that can be printed, logged and encoded: bytes that are not UTF-8 as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _above(root):
    """Returns (device, inode) of the folders that a folder is in."""
    return [(found.st_dev, found.st_ino) for found in map(os.stat, Path(os.path.realpath(root)).parents)]


def _entries(folder):
    """Returns ([(name, whether a link, mode of what it leads to)] of what is not hidden, the folder's (device, inode))."""
    try:
        where = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
            return [(entry.name, entry.is_symlink(), _mode(entry)) for entry in visible], (where.st_dev, where.st_ino)
    except OSError as error:
        if faults.is_of_the_system(error):
            raise
        raise ValueError(f"folder {folder!r} cannot be listed ({error.strerror}): make it readable, or move it away") from error


def _mode(entry):
    """Returns the kind of file that an entry is, or leads to."""
    if not entry.is_symlink():  # the folder knows; asking for more takes long on network disks
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
