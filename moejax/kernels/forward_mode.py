"""What is said where forward-mode differentiation meets a kernel that only has a backward pass."""

import contextlib
from collections.abc import Iterator

_JAX = "custom_vjp"


@contextlib.contextmanager
def refused(instead: str) -> Iterator[None]:
    """Inside, JAX's TypeError about forward mode through a custom_vjp says what to use instead.

    It reaches where the layer is called, unless a `jax.jit` lies between: then JAX's own is seen.
    """
    try:
        yield
    except TypeError as error:
        if _JAX not in str(error):
            raise
        raise TypeError(
            "forward-mode differentiation (jax.jvp, jacfwd, linearize) cannot pass the kernels of "
            f"this layer, which have a backward pass only; use {instead}, reverse mode (jax.grad, "
            "vjp, jacrev), forward over reverse (jax.jvp of jax.grad) or finite differences"
        ) from error
