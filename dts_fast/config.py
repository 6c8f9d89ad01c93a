"""How to compress: the settings of `compress`, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from .errors import DTSError
from .fit import METHODS

EMBEDDING_CHOICES = ("low-rank", "skip", "full")


@dataclass(frozen=True)
class DTSConfig:
    """How to compress. Exactly one of ``budget``, ``density``, ``rank`` and ``energy``; a budget of 1 % if none is
    given.

    Attributes:
        budget: bytes of the adapter's files over bytes of the base checkpoint as stored; the files obey it. With the
            method ``"paper"`` every matrix gets the same density, else ranks go where they buy most
            (`rank.ranks_by_spectral_budget`).
        density: rank of a matrix over ``min(N, K)``, truncated to an integer (paper).
        rank: rank of every matrix.
        energy: share of each delta's squared Frobenius norm that its rank must hold.
        method: how factors are fitted, see `fit.fit`.
        include, exclude: regular expressions on parameter names.
        whole: regular expression of parameters stored whole, not as a delta.
        embeddings: token, position and type tables ``"low-rank"`` like any matrix, ``"skip"`` (stay the base's), or
            ``"full"`` (stored whole).
        reference: checkpoint whose weights the deltas are taken from and added to, in place of the base (the
            paper's DTS-D: a merged model).
        rank_multiple: ranks are multiples of this, as far as ``min(N, K)`` allows. Kernels work in pages of 16 ranks
            and a rank of 17 costs them two, in memory and time. 0 means 16 for a budget that gives most matrices a
            rank of 64 or more, so that rounding moves few bytes, and 1 elsewhere.
        characteristic: what the fine-tune's task is like, stored with the adapter for `similarity_weights` and
            `select`: a vector file or a description, see `characteristic.read_characteristic`.
        encoder: sentence encoder for a description.
        device: where deltas are fitted.

    Raises:
        DTSError: more than one of the four, a value out of range or of another type, an unknown method or choice, what
            is no regular expression, a device that is not there.
    """

    budget: float | None = None
    density: float | None = None
    rank: int | None = None
    energy: float | None = None
    method: str = "refined"
    include: str | None = None
    exclude: str | None = None
    whole: str | None = None
    embeddings: str = "low-rank"
    reference: str | None = None
    rank_multiple: int = 0
    characteristic: str | None = None
    encoder: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        given = [name for name in ("budget", "density", "rank", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise DTSError(f"give one of budget, density, rank and energy, not {' and '.join(given)}.")
        if not given:
            object.__setattr__(self, "budget", 0.01)
        for name in ("reference", "characteristic"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(getattr(self, name)))  # a Path is welcome, and JSON knows none
        for name in ("budget", "density", "energy"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Real):
                raise DTSError(f"{name} must be a number (1 % is 0.01), got {value!r}.")
            if value is not None and not 0 < value <= 1:
                raise DTSError(f"{name} must lie above 0 and up to 1 (1 % is 0.01), got {value}.")
        if self.budget == 1:
            raise DTSError("budget: 1 is the whole size of the base. Give a share, such as 0.01, or 1% in a command.")
        if self.encoder is not None and self.characteristic is None:
            raise DTSError("encoder is given without a characteristic for it to encode. Give both, or neither.")
        for name in ("rank", "rank_multiple"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 0):
                raise DTSError(f"{name} must be an integer, not negative, got {value!r}.")
        if self.method not in METHODS:
            raise DTSError(f"unknown method {self.method!r}; known: {', '.join(sorted(METHODS))}.")
        for name in ("include", "exclude", "whole"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise DTSError(f"{name} is not a regular expression ({error}): {getattr(self, name)!r}.") from error
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise DTSError(f"device {self.device!r} cannot be used here ({error}).") from error
        if self.embeddings not in EMBEDDING_CHOICES:
            raise DTSError(f"embeddings must be one of {', '.join(EMBEDDING_CHOICES)}, got {self.embeddings!r}.")
