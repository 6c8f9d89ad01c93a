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
    from .codes import CodedMatrix, CodedVector, LowRankDelta
    from .compress import CompressReport, DTSConfig, compress
    from .errors import DTSError
    from .fit import fit, fit_vector
    from .model import DTSModel
    from .nn import DTSEmbedding, DTSLinear, DTSModule
    from .routing import route

_HOME = {
    "Adapter": "adapter_file",
    "CodedMatrix": "codes",
    "CodedVector": "codes",
    "CompressReport": "compress",
    "DTSConfig": "compress",
    "DTSEmbedding": "nn",
    "DTSError": "errors",
    "DTSLinear": "nn",
    "DTSModel": "model",
    "DTSModule": "nn",
    "LowRankDelta": "codes",
    "compress": "compress",
    "fit": "fit",
    "fit_vector": "fit",
    "load_adapter": "adapter_file",
    "route": "routing",
    "save_adapter": "adapter_file",
}

__all__ = ["__version__", *sorted(_HOME)]


class _Package(ModuleType):
    """Keeps two functions apart from the modules of the same name, which importing those would put in their place."""

    @property
    def compress(self):
        return import_module(f"{__name__}.compress").compress

    @compress.setter
    def compress(self, module: ModuleType) -> None:
        pass

    @property
    def fit(self):
        return import_module(f"{__name__}.fit").fit

    @fit.setter
    def fit(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
