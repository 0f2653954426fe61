"""The Mixtral block of transformers, and torch's dense FFN, as functions without arguments."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from scripts.layer_bench.checks import LIMIT, largest_error
from scripts.layer_bench.problems import Params, Problem, Shape

KINDS = ("eager", "grouped_mm")


def missing() -> str | None:
    """The reason that the block cannot run here, or None."""
    try:
        import torch  # noqa: F401  # only whether it is there
        import transformers  # noqa: F401  # the same
    except ImportError as error:
        return f"{error.name} is not installed"
    return None


def tensors(arrays: Any) -> Any:
    """Arrays as tensors that want gradients."""
    import torch

    return jax.tree.map(lambda a: torch.tensor(np.asarray(a)).requires_grad_(), arrays)


def dense(w: Params) -> tuple[Callable, list]:
    """torch's SwiGLU and its parameters."""
    import torch

    t = tensors(w)
    return (
        lambda x: (torch.nn.functional.silu(x @ t["gate"]) * (x @ t["up"])) @ t["down"],
        list(t.values()),
    )


def mixtral(kind: str, shape: Shape, params: Params) -> tuple[Callable, list]:
    """The block with its own router, holding the weights that every other layer here has."""
    import torch
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_local_experts=shape.E,
        num_experts_per_tok=shape.k,
    )
    config._experts_implementation = kind
    block = MixtralSparseMoeBlock(config)
    w = {name: torch.tensor(np.asarray(array)) for name, array in params.items()}
    fused = torch.cat([w["gate_EDF"], w["up_EDF"]], dim=-1).transpose(1, 2)
    values = {
        "gate.weight": w["router_DE"].T,
        "experts.gate_up_proj": fused,
        "experts.down_proj": w["down_EFD"].transpose(1, 2),
    }
    block.load_state_dict({name: value.contiguous() for name, value in values.items()})

    def run(x):
        out = block(x.reshape(1, *x.shape))
        return (out[0] if isinstance(out, tuple) else out).reshape(x.shape)

    names = ("gate.weight", *list(values)[1:])
    return run, [dict(block.named_parameters())[name] for name in names]


def runs(function: Callable, parameters: list, problem: Problem) -> tuple[Callable, Callable]:
    """The forward pass alone, and the output with the gradients of input and parameters."""
    import torch

    x, dy = tensors(problem.x_TD), tensors(problem.dy_TD).detach()

    def forward():
        with torch.no_grad():
            return function(x)

    def both():
        y = function(x)
        return y, *torch.autograd.grad(y, [x, *parameters], dy)

    return forward, both


def check(kind: str, shape: Shape, problem: Problem, wanted: tuple) -> float:
    """The largest error of the block's output and gradients against `checks.expected`."""
    _, both = runs(*mixtral(kind, shape, problem.params), problem)
    y, dx, d_router, d_fused, d_down = (np.asarray(t.detach()) for t in both())
    d_gate, d_up = np.split(np.swapaxes(d_fused, 1, 2), 2, axis=-1)
    grads = {
        "router_DE": d_router.T,
        "gate_EDF": d_gate,
        "up_EDF": d_up,
        "down_EFD": np.swapaxes(d_down, 1, 2),
    }
    error = largest_error((y, dx, grads), wanted)
    if not error <= LIMIT:
        raise ArithmeticError(f"hf-mixtral-{kind}, shape {shape.name}: off by {error:.1e}")
    return error
