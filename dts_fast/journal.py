"""Results of a long run on disk as they come, so that an interrupted run goes on where it was."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import DTSError

try:
    import fcntl
except ImportError:  # not on Windows: two runs for one target are then not told apart
    fcntl = None

_KEY = "key.json"


class Journal:
    """A hidden directory beside the target with the tensors of each finished step.

    It is used only by a run with the same key as the one that wrote it, and by one run at a time; whoever finds it
    taken works without. A run that ends well removes it, and so does one that meets bad input.

    Args:
        target: what the run writes in the end.
        key: all that the steps depend on, ready for JSON.
    """

    def __init__(self, target: Path, key: Mapping[str, object]) -> None:
        self.folder: Path | None = None
        self._lock = None
        folder = target.parent / f".{target.name}.partial"
        text = json.dumps(key, sort_keys=True, default=str)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("a")
        except OSError:
            return  # no place for it: the writing of the target will say why
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that had the lock may have removed the folder just now, and another made a new one.
            if not os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
                raise OSError("the journal has changed hands")
            self._lock, self.folder = lock, folder
            if not (folder / _KEY).is_file() or (folder / _KEY).read_text(encoding="utf-8") != text:
                for file in folder.glob("*.safetensors"):
                    file.unlink()
                (folder / _KEY).write_text(text, encoding="utf-8")
        except OSError:
            lock.close()
            self._lock = self.folder = None

    def get(self, step: str, name: str) -> dict[str, Tensor] | None:
        """What a step gave for a parameter; None where it has not been done."""
        file = self._file(step, name)
        if file is None or not file.is_file():
            return None
        try:
            return load_file(file)
        except (OSError, SafetensorError):
            return None  # damaged: it is done again

    def put(self, step: str, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a step gave. A full disk is no error here: the run goes on without."""
        file = self._file(step, name)
        if file is not None:
            with contextlib.suppress(OSError, SafetensorError):
                part = file.with_suffix(".part")
                save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, part)
                os.replace(part, file)

    def _file(self, step: str, name: str) -> Path | None:
        digest = hashlib.sha256(f"{step} {name}".encode()).hexdigest()[:32]
        return self.folder / f"{digest}.safetensors" if self.folder else None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.folder is not None:
            # Kept for what a second try may get past: an interruption, a full disk. Bad input stays bad.
            # So does a target that another run has made meanwhile.
            folder, cause = self.folder, error.__cause__ if isinstance(error, DTSError) else None
            kept = isinstance(cause, OSError) and cause.errno not in (errno.EEXIST, errno.ENOTEMPTY)
            if error is None or (isinstance(error, DTSError) and not kept):
                shutil.rmtree(folder, ignore_errors=True)
            self._lock.close()
            self.folder = None
            if kept:
                raise type(error)(
                    f"{error} What was finished is kept in {folder} for another try with the same --out-path; "
                    "delete it if there will be none."
                ) from error.__cause__
