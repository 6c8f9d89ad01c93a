"""The ops on Triton kernels: for any GPU that Triton compiles for, without nvcc and without building an extension."""

from .launch import add_delta_, embedding_delta, linear

__all__ = ["add_delta_", "embedding_delta", "linear"]
