"""The ops on Triton kernels: for any GPU that Triton compiles for, without a compiler on the user's machine."""

from .launch import add_delta_, linear

__all__ = ["add_delta_", "linear"]
