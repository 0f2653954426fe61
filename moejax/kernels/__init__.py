"""The kernels that differ between platforms, one contract each.

``grouped_matmul`` multiplies sorted rows by the matrix of their group, ``grouped_ffn`` takes them
through the whole feed-forward network of their group; ``ragged_exchange`` sends slices of unequal
length between the devices of a mesh axis. Everything else in moejax is the same code on every
platform.
"""

from moejax.kernels.grouped_ffn import grouped_ffn
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.kernels.ragged_exchange import ragged_exchange
from moejax.kernels.support import MissingKernelError, kernels_pass_check_vma

__all__ = [
    "MissingKernelError",
    "grouped_ffn",
    "grouped_matmul",
    "kernels_pass_check_vma",
    "ragged_exchange",
]
