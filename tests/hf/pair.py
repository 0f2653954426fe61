"""A model of transformers beside ours, converted from its files."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Config, load
from moejax.hf.families import READABLE
from moejax.hf.imported import import_model
from moejax.hf.layout import plan
from moejax.tasks.language.task import LanguageModel, cross_entropy
from moejax.train import evaluate
from moejax.train.checkpoint.manifest import named_leaves
from moejax.train.state import TrainState
from moejax.types import Context

B, L = 3, 12
LENGTHS = np.array([L, L - 5, L - 1])
VALID = {
    "none": np.ones((B, L), bool),
    "right": np.arange(L) < LENGTHS[:, None],
    "left": np.arange(L) >= L - LENGTHS[:, None],
}
"""Where the padding of a batch lies."""


class Outputs(NamedTuple):
    logits_BLV: np.ndarray
    expert_NLK: np.ndarray | None
    """Ids and weights of the experts of each MoE layer and token, in the order of the ids."""
    weight_NLK: np.ndarray | None
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both models with their folders. ``theirs`` is a model of transformers."""

    theirs: Any
    folder: Path
    workdir: Path
    config: Config
    task: LanguageModel
    state: TrainState

    @functools.cached_property
    def _forward(self):
        def forward(params, gate_state, token_BL, context):
            model = self.task.built(params)

            def tap(x_BLD, info):
                experts, weights = info.routing.expert_GTK, info.routing.weight_GTK
                order = jnp.argsort(experts, axis=-1)
                sort = lambda x: jnp.take_along_axis(x, order, axis=-1)  # noqa: E731
                k = experts.shape[-1]
                return {
                    "experts": sort(experts).reshape(-1, k),
                    "weights": sort(weights).reshape(-1, k),
                }

            sparse = bool(self.config.moe.every)
            logits, aux = model(token_BL, context, gate_state, False, tap if sparse else None)
            return logits, aux.taps, aux.losses

        return jax.jit(forward)

    def ours(
        self, token_BL: np.ndarray, valid_BL: np.ndarray, segment_BL: np.ndarray | None = None
    ) -> Outputs:
        """The results of our model; padding may lie anywhere."""
        context = _context(token_BL, valid_BL, segment_BL=segment_BL)
        tokens = jnp.asarray(token_BL, jnp.int32)
        found = self._forward(self.state.params, self.state.gate_state, tokens, context)
        logits, taps, losses = jax.tree.map(np.asarray, found)
        taps = taps or {"experts": None, "weights": None}
        losses = {name: float(value) for name, value in losses.items()}
        return Outputs(logits, taps["experts"], taps["weights"], losses)

    def decoded(self, token_BL: np.ndarray, valid_BL: np.ndarray, first: int) -> np.ndarray:
        """Our logits where ``first`` tokens are read at once and the others one by one."""

        def step(params, gate_state, token_BL, context, memory):
            model = self.task.built(params)
            logits, aux = model(token_BL, context, gate_state, False, memory=memory)
            return logits, aux.memory

        step = jax.jit(step)
        memory = self.task.built(self.state.params).empty_memory(*token_BL.shape)
        whole, found, at = _context(token_BL, valid_BL), [], 0
        for width in (first, *[1] * (token_BL.shape[1] - first)):
            part = np.s_[:, at : at + width]
            context = _context(token_BL[part], valid_BL[part], position_BL=whole.position_BL[part])
            tokens = jnp.asarray(token_BL[part], jnp.int32)
            logits, memory = step(self.state.params, self.state.gate_state, tokens, context, memory)
            found.append(np.asarray(logits))
            at += width
        return np.concatenate(found, axis=1)

    def gradients(self, token_BL: np.ndarray) -> dict[str, np.ndarray]:
        """Ours of the mean cross-entropy of the next token, under the names of their tensors."""

        def loss(params, gate_state):
            inputs_BL = jnp.asarray(token_BL[:, :-1], jnp.int32)
            context = _context(token_BL[:, :-1], np.ones(inputs_BL.shape, bool))
            context = dataclasses.replace(context, key=jax.random.key(0))
            logits, _ = self.task.built(params)(inputs_BL, context, gate_state, True)
            return jnp.mean(cross_entropy(logits, jnp.asarray(token_BL[:, 1:]))[1])

        found = jax.jit(jax.grad(loss))(self.state.params, self.state.gate_state)
        arrays = {f"params/{name}": np.asarray(x) for name, x in named_leaves(found).items()}
        state = {f"gate_state/{n}": x for n, x in named_leaves(self.state.gate_state).items()}
        family = READABLE[self.theirs.config.model_type]
        rows = plan(family, self.task.model, {**arrays, **state}).tensors()
        named = {}
        for name, copies in rows.items():
            if copies[0].places[0].array in state:
                continue
            parts = [c.row.to_theirs([arrays[p.array][p.index] for p in c.places]) for c in copies]
            named[name] = parts[0] if copies[0].expert is None else np.stack(parts)
        return named


def bring_in(folder: Path, workdir: Path) -> None:
    """Converts a model. Its text is small, since every run measures how repetitive its text is."""
    text = workdir.with_name(f"{workdir.name}.txt")
    text.write_text("".join(f"line {i} of a text {i * i}\n" for i in range(200)))
    flags = [
        f"--config.data.path={text}",
        "--config.train.seq_len=16",
        "--config.train.eval_rows=8",
    ]
    import_model(folder, workdir, flags)


def converted(theirs: Any, folder: Path, workdir: Path) -> Pair:
    """The pair of a model of transformers that lies in ``folder``."""
    bring_in(folder, workdir)
    config = load(str(workdir / "config.json")).config
    with evaluate.open_run(config, str(workdir), None) as (run, state, _):
        assert isinstance(run.task, LanguageModel)
        return Pair(theirs, folder, workdir, config, run.task, jax.device_get(state))


def _context(token_BL: np.ndarray, valid_BL: np.ndarray, **known: Any) -> Context:
    known = {name: value for name, value in known.items() if value is not None}
    return Context.of(
        *token_BL.shape,
        token_BL=jnp.asarray(token_BL, jnp.int32),
        valid_BL=jnp.asarray(valid_BL),
        **{name: jnp.asarray(value) for name, value in known.items()},
    )


def theirs_of(
    model: Any,
    token_BL: np.ndarray,
    valid_BL: np.ndarray | None,
    position_BL: np.ndarray | None = None,
    **more: Any,
) -> Outputs:
    """The results of a model of transformers, with the routing that its routers return."""
    import torch

    routings = []

    def keep(module, _, result):
        scores, experts = _llama4(result) if "Llama4" in type(module).__name__ else result[1:]
        order = experts.argsort(dim=-1)
        routings.append([x.gather(-1, order).numpy() for x in (experts, scores)])

    routers = [m for m in model.modules() if type(m).__name__.endswith("Router")]
    hooks = [router.register_forward_hook(keep) for router in routers]
    if valid_BL is not None:
        position_BL = np.maximum(np.cumsum(valid_BL, axis=1) - 1, 0)
        more["attention_mask"] = torch.tensor(valid_BL.astype(np.int64))
    with torch.no_grad():
        found = model(
            torch.tensor(token_BL),
            position_ids=None if position_BL is None else torch.tensor(position_BL),
            use_cache=False,
            **more,
        )
    for hook in hooks:
        hook.remove()
    experts, weights = zip(*routings, strict=True) if routings else (None, None)
    losses = {"load_balance": float(found.aux_loss)} if more.get("output_router_logits") else {}
    return Outputs(
        found.logits.float().numpy(),
        None if experts is None else np.stack(experts),
        None if weights is None else np.stack(weights),
        losses,
    )


def _llama4(result: Any) -> Any:
    scores, logits = result
    experts = logits.topk(1, dim=1)[1]
    return scores.gather(1, experts), experts


def decoded_by(model: Any, token_BL: np.ndarray, valid_BL: np.ndarray, first: int) -> np.ndarray:
    """Logits of transformers with its own cache."""
    import torch

    tokens, mask_BL = torch.tensor(token_BL), torch.tensor(valid_BL.astype(np.int64))
    position_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    cache, found, at = None, [], 0
    with torch.no_grad():
        for width in (first, *[1] * (tokens.shape[1] - first)):
            end = at + width
            out = model(
                tokens[:, at:end],
                attention_mask=mask_BL[:, :end],
                position_ids=position_BL[:, at:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache, at = out.past_key_values, end
            found.append(out.logits.numpy())
    return np.concatenate(found, axis=1)


def gradients_of(model: Any, token_BL: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """Theirs, under the names of the tensors in their files: saved in the place of the weights."""
    import copy

    import torch
    from safetensors.numpy import load_file

    model = copy.deepcopy(model)
    tokens = torch.tensor(token_BL)
    logits = model(tokens[:, :-1], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.zeros_like(x) if x.grad is None else x.grad)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def close(found: np.ndarray, wanted: np.ndarray, relative: float, what: str = "") -> None:
    """The largest difference is small beside the largest value.

    Single values near zero are sums of large ones, whose rounding they have.
    """
    scale = np.abs(wanted).max()
    error = np.abs(found - wanted).max() / max(scale, 1e-30)
    assert error <= relative, f"{what}: {error:.2e} of the largest value, more than {relative}"
