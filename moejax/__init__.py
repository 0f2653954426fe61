"""moejax: research on expert-parallel mixture-of-experts transformers in JAX and Flax NNX.

layer = moejax.MoE(256, 512, 8, gate="mixtral", rngs=nnx.Rngs(0))
y_BLD, info = layer(x_BLD)
"""

from typing import TYPE_CHECKING, Any

from moejax.errors import UserError, starting_jax

with starting_jax():
    import jax as jax  # the first to read JAX's environment variables

from moejax import gating
from moejax.mesh import make_mesh
from moejax.types import Context, Gate, GateContext, GateOutput, MoEInfo, MoEStats, Routing

if TYPE_CHECKING:
    from moejax.layers.moe import MoE
    from moejax.notebook import load

__version__ = "0.1.0"

__all__ = [
    "Context",
    "Gate",
    "GateContext",
    "GateOutput",
    "MoE",
    "MoEInfo",
    "MoEStats",
    "Routing",
    "UserError",
    "gating",
    "load",
    "make_mesh",
]


def __getattr__(name: str) -> Any:
    # Flax and chex take most of the second that importing them with the rest would add to
    # `import jax`; the command line's quick answers and code that only configures need neither.
    if name == "MoE":
        from moejax.layers.moe import MoE

        return MoE
    if name == "load":  # a run for a notebook: brings the trainer and the report
        from moejax.notebook import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
