"""The compiled extension, if it is there: importing it registers its kernels and tells what it was built for."""

from __future__ import annotations

from types import ModuleType

import torch  # noqa: F401  (its libraries must be loaded before the extension that links to them)

# Why the extension is not used; None if it is.
REASON: str | None = None
MODULE: ModuleType | None = None

try:
    from . import _C as MODULE  # noqa: F401
except ImportError as error:
    missing = "No module named" in str(error) or "cannot import name '_C'" in str(error)
    REASON = "not built" if missing else f"built, but does not load: {error}"
