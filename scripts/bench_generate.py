"""Benchmark of generation: python scripts/bench_generate.py --out FILE [--sizes A,B] [--quick]

Prompt and decode tokens/s of moejax over those of transformers' own ``generate``, for a Mixtral of
the same shapes with random weights in float32, greedily, on CPU. Both have all cores (but see
--threads; the file has the machine's load). Ratios are medians over pairs, with quartiles; pairs
are measured in turns, A B, B A, A B, in one process.

transformers is measured with each of its caches (dynamic, and static with its fixed size, not
compiled) and with each implementation of experts that it has on CPU; ratios are to the fastest of
these. Prompt: reading the prompt up to the first token. Decode: the tokens after that.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moejax import gating
from moejax.dispatch import Dropless
from moejax.generate.decode import Decoder, Weights, apart
from moejax.generate.prompts import Prompts
from moejax.generate.sampling import Sampling
from moejax.options import AttentionOptions, MoEOptions, RopeOptions, TextOptions
from moejax.tasks.language.model import LMConfig
from moejax.tasks.language.task import LanguageModel
from moejax.types import MoEConfig

Row = dict[str, Any]

EXPERTS, K, VOCAB, THETA = 8, 2, 8192, 1e6
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 256, "layers": 4, "heads": 8, "kv_heads": 4, "d_ff": 512},
    "small": {"d_model": 512, "layers": 8, "heads": 8, "kv_heads": 4, "d_ff": 1024},
}
CACHES = ("dynamic", "static")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class Ours:
    """Our decoder with random weights."""

    def __init__(self, size: dict[str, int]):
        options = LMConfig(
            d_model=size["d_model"],
            num_layers=size["layers"],
            attention=AttentionOptions(
                num_heads=size["heads"],
                num_kv_heads=size["kv_heads"],
                rope=RopeOptions(theta=THETA),
            ),
            experts=MoEOptions(
                gate=gating.make("top_k", k=K, renormalize=True),
                config=MoEConfig(EXPERTS, Dropless(), Dropless()),
                d_ff=size["d_ff"],
                vocab_size=VOCAB,
            ),
            text=TextOptions(tie_embeddings=False, embed_scale=1.0),
        )
        task = LanguageModel(options, (), 0.0, seq_len=1024)
        params = jax.jit(task.init)(jax.random.key(0))
        self.parameters = sum(x.size for x in jax.tree.leaves(params))
        weights = Weights(
            apart(params, options.num_periods),
            task.init_gate_state(),
            jax.numpy.int32(0),
            jax.random.key_data(jax.random.key(0)),
        )
        self._decoder = Decoder(task, weights, Sampling(), vocab=VOCAB)

    def __call__(self, token_BP: np.ndarray, tokens: int) -> tuple[float, float]:
        """Seconds of the prompt with the first token, and of the others."""
        prompts = Prompts.of(list(token_BP), len(token_BP))
        begin = time.perf_counter()
        progress = self._decoder.start(prompts, np.zeros(len(token_BP)), tokens)
        progress, first, _ = self._decoder.more(progress, 1)
        middle = time.perf_counter()
        left = tokens - first.shape[1]
        while left:
            progress, found, _ = self._decoder.more(progress, left)
            left -= found.shape[1]
        return middle - begin, time.perf_counter() - middle


class Theirs:
    """transformers' Mixtral with random weights."""

    def __init__(self, size: dict[str, int], threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=size["d_model"],
            intermediate_size=size["d_ff"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["kv_heads"],
            num_local_experts=EXPERTS,
            num_experts_per_tok=K,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            tie_word_embeddings=False,
            sliding_window=None,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
        self._torch = torch
        self.model: Any = transformers.MixtralForCausalLM(config).eval()
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def variant(self, cache: str, experts: str) -> Callable[[np.ndarray, int], Any]:
        def run(token_BP: np.ndarray, tokens: int) -> tuple[float, float]:
            self.model.set_experts_implementation(experts)
            times = []
            for number in (1, tokens):
                begin = time.perf_counter()
                found = self._generate(token_BP, number, cache)
                times.append(time.perf_counter() - begin)
                assert found.shape[1] == token_BP.shape[1] + number
            return times[0], times[1] - times[0]

        return run

    def _generate(self, token_BP: np.ndarray, tokens: int, cache: str) -> Any:
        given = self._torch.as_tensor(token_BP, dtype=self._torch.long)
        with self._torch.inference_mode():
            return self.model.generate(
                given,
                attention_mask=self._torch.ones_like(given),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                cache_implementation=cache,
                disable_compile=True,
            )


def spread(values: list[float]) -> dict[str, float]:
    """The median with the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def compared(
    size: str, batch: int, ours: Ours, theirs: Theirs, lengths: tuple[int, int], pairs: int
) -> Row:
    prompt, tokens = lengths
    rng = np.random.default_rng(0)
    token_BP = rng.integers(1, VOCAB, (batch, prompt)).astype(np.int32)
    ours(token_BP, tokens)  # compiles
    variants = {f"{c}, {i}": theirs.variant(c, i) for c in CACHES for i in IMPLEMENTATIONS}
    trials = {name: [run(token_BP, tokens) for _ in range(2)][1] for name, run in variants.items()}
    # The fastest at each of the two.
    best = [min(trials, key=lambda name, part=part: trials[name][part]) for part in (0, 1)]
    times: list[list[tuple[float, float]]] = [[], []]  # by part, of pairs
    for pair in range(pairs):
        for part in (0, 1):
            runs = [
                lambda: ours(token_BP, tokens),
                lambda n=best[part]: variants[n](token_BP, tokens),
            ]
            found = {}
            for index in (0, 1) if pair % 2 == 0 else (1, 0):
                found[index] = runs[index]()[part]
            times[part].append((found[0], found[1]))
    row: Row = {"size": size, "batch": batch, "prompt": prompt, "tokens": tokens, "pairs": pairs}
    for part, (name, number) in enumerate(
        (("prompt", batch * prompt), ("decode", batch * (tokens - 1)))
    ):
        row[f"{name}_ratio"] = spread([b / a for a, b in times[part]])
        row[f"{name}_tokens_per_second"] = number / statistics.median(a for a, _ in times[part])
        row[f"{name}_theirs"] = number / statistics.median(b for _, b in times[part])
        row[f"{name}_variant"] = best[part]
    return row


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = ["size   batch  part    ours tok/s  theirs tok/s  ratio (quartiles)    theirs, fastest"]
    for row in rows:
        for part in ("prompt", "decode"):
            ratio = row[f"{part}_ratio"]
            lines.append(
                f"{row['size']:<6} {row['batch']:>5}  {part:<6} "
                f"{row[f'{part}_tokens_per_second']:>11.1f} {row[f'{part}_theirs']:>13.1f}  "
                f"{ratio['median']:>5.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
                f"    {row[f'{part}_variant']}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a continuation")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        help="of torch; on a busy machine, where its threads wait for each other, 1 is faster",
    )
    parser.add_argument("--quick", action="store_true", help="few pairs of short texts")
    args = parser.parse_args()
    if args.quick:
        args.prompt, args.tokens, args.pairs = 16, 9, 2
    import torch
    import transformers

    rows = []
    for size in args.sizes.split(","):
        ours, theirs = Ours(SIZES[size]), Theirs(SIZES[size], args.threads)
        assert ours.parameters == theirs.parameters, (ours.parameters, theirs.parameters)
        for batch in map(int, args.batches.split(",")):
            rows.append(compared(size, batch, ours, theirs, (args.prompt, args.tokens), args.pairs))
            print(table(rows[-1:]), flush=True)
    about = {
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "torch_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(about, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
