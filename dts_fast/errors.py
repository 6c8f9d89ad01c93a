"""Errors a user can meet. Each message says what was wrong, what was expected, what was found, and the mend."""

from __future__ import annotations


class DTSError(Exception):
    """Base class of every error that dts_fast raises on bad input."""


class DTSWarning(UserWarning):
    """Input that is taken and is hardly what was meant; commands print it too."""


class CheckpointError(DTSError, ValueError):
    """A model checkpoint cannot be read, or two checkpoints do not belong together."""


class AdapterFormatError(DTSError, ValueError):
    """An adapter directory is damaged, incomplete or of an unknown format version."""


class BaseMismatchError(DTSError, ValueError):
    """An adapter was made for another base model than the one it is attached to."""


class UnknownAdapterError(DTSError, LookupError):
    """A name in a batch, or passed to a verb, is not a loaded adapter."""


class RoutingError(DTSError, ValueError):
    """The adapter names of a batch do not fit its rows."""


class MixedBatchError(RoutingError):
    """A layer cannot tell the rows of a batch apart that use different adapters; one adapter at a time works."""


class NeverMixedError(MixedBatchError):
    """That is so for these adapters whatever the batch."""


class CapacityError(DTSError, RuntimeError):
    """A bank of fixed capacity has no room left."""
