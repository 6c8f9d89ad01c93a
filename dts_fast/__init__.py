"""dts_fast: many fine-tuned variants of one model, each about 1 % of it, served from one resident base.

Names are imported when first used, so that the command line answers without loading torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .adapter_file import Adapter, load_adapter, save_adapter
    from .characteristic import read_characteristic
    from .codes import CodedMatrix, CodedVector, DeltaSum, LowRankDelta
    from .compress import CompressReport, compress
    from .config import DTSConfig
    from .distill import DistillConfig, DistillReport, distill
    from .errors import DTSError
    from .fit import fit, fit_vector
    from .fuse import fuse, nearest
    from .model import DTSModel
    from .nn import DTSEmbedding, DTSLinear, DTSModule
    from .routing import route

_HOME = {
    "Adapter": "adapter_file",
    "CodedMatrix": "codes",
    "CodedVector": "codes",
    "CompressReport": "compress",
    "DTSConfig": "config",
    "DTSEmbedding": "nn",
    "DTSError": "errors",
    "DTSLinear": "nn",
    "DTSModel": "model",
    "DTSModule": "nn",
    "DeltaSum": "codes",
    "DistillConfig": "distill",
    "DistillReport": "distill",
    "LowRankDelta": "codes",
    "compress": "compress",
    "distill": "distill",
    "fit": "fit",
    "fit_vector": "fit",
    "fuse": "fuse",
    "load_adapter": "adapter_file",
    "nearest": "fuse",
    "read_characteristic": "characteristic",
    "route": "routing",
    "save_adapter": "adapter_file",
}

__all__ = ["__version__", *sorted(_HOME)]


def _function(name: str) -> property:
    """A function whose module has the same name: importing that would put the module in its place."""
    return property(lambda self: getattr(import_module(f"{__name__}.{name}"), name), lambda self, module: None)


class _Package(ModuleType):
    compress = _function("compress")
    distill = _function("distill")
    fit = _function("fit")
    fuse = _function("fuse")


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
