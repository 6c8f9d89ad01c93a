"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from .errors import DTSError


@dataclass(frozen=True)
class Marker:
    """A file that tells what kind of directory one is.

    Attributes:
        name: the file's.
        peft_type: of an ``adapter_config.json``, what is to stand there.
    """

    name: str
    peft_type: str | None = None

    def __str__(self) -> str:
        return self.name if self.peft_type is None else f"{self.name} of peft_type {self.peft_type}"

    def marks(self, folder: Path) -> bool:
        if not (folder / self.name).is_file():
            return False
        if self.peft_type is None:
            return True
        try:
            config = json.loads((folder / self.name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return True  # damaged: who overwrites it loses nothing
        return not isinstance(config, dict) or config.get("peft_type", self.peft_type) == self.peft_type


def check_target(target: Path, *, overwrite: bool, marker: Marker) -> None:
    """Refuse a target early, before work is spent on it.

    Args:
        marker: tells that an existing directory is of the kind about to be written; any other is kept.

    Raises:
        DTSError: it exists and must not be overwritten, or its parent is not writable.
    """
    if os.path.ismount(target):
        raise DTSError(f"{target} is a mount point, which cannot be replaced whole. Choose a directory below it.")
    if target.exists() and not (target.is_dir() and os.access(target, os.R_OK) and not any(target.iterdir())):
        if not marker.marks(target):
            raise DTSError(
                f"{target} exists and holds no {marker}, so it is something else, which is not overwritten; nothing "
                "was changed. Choose another path."
            )
        if not overwrite:
            raise DTSError(f"{target} exists already; nothing was changed. Choose another path, or pass --overwrite.")
        if any(entry.is_dir() and entry.name != ".cache" for entry in target.iterdir()):  # a download's notes
            raise DTSError(
                f"{target} holds directories, which would be lost; nothing was changed. Move them away, or choose "
                "another path."
            )
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise DTSError(f"{parent} is not writable ({error}). Choose another directory.") from error


@contextmanager
def staged_directory(target: Path, *, overwrite: bool, marker: Marker) -> Iterator[Path]:
    """A hidden directory beside ``target`` to write files in; on leaving it is synced and renamed to ``target``.

    A process that is killed on the way leaves no half-written directory of the target's name. (An overwritten one is
    kept aside, hidden, while the new one takes its place.)

    Raises:
        DTSError: see `check_target`; or the disk is full or not writable, in which case nothing is left behind.
    """
    check_target(target, overwrite=overwrite, marker=marker)
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        yield staging
        staging.chmod(0o755)  # mkdtemp's private mode is for temporary files
        for file in (*staging.iterdir(), staging):
            _sync(file)
        _replace(staging, target)
        _sync(target.parent)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise DTSError(
                f"{target} cannot be written ({error}). Nothing was left there; free space or choose another "
                "--out-path."
            ) from error
        raise


def check_file(target: str | Path) -> None:
    """Refuse a file that cannot be written, before work is spent on it.

    Raises:
        DTSError: its directory is not there or not writable, or it is a directory itself.
    """
    target = Path(target)
    folder = target.absolute().parent
    if (target.exists() and not target.is_file()) or not folder.is_dir():
        raise DTSError(f"{target} cannot be written: expected a file in a directory that exists. Choose another file.")
    if not os.access(folder, os.W_OK | os.X_OK):  # it is written beside, and renamed
        raise DTSError(f"{target} cannot be written: {folder} is not writable. Choose another file.")


def write_text(target: str | Path, text: str) -> None:
    """Write a file, or replace one, whole or not at all.

    Raises:
        DTSError: it cannot be written; an old one is still there.
    """
    target = Path(target)
    staging = target.with_name(f".{target.name}.partial")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, target)
    except OSError as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        raise DTSError(f"{target} cannot be written ({error}). Choose another file.") from error


def _replace(staging: Path, target: Path) -> None:
    """Rename into place; an old directory of that name is kept aside until the new one stands."""
    if not target.exists():
        os.rename(staging, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rename(target, aside / target.name)
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(aside / target.name, target)
        raise
    finally:
        if not (aside / target.name).exists() or target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
