"""Write the table of families into docs/convert.md: python scripts/make_convert_docs.py"""

from pathlib import Path

from moejax.hf.families import READABLE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "convert.md"
BEGIN, END = "<!-- table: scripts/make_convert_docs.py -->", "<!-- end of table -->"

ABOUT = {
    "llama": ("Llama 1 to 3, and models that copy it", "dense; the control"),
    "qwen3": ("Qwen3, dense", "norms of queries and keys"),
    "mixtral": ("Mixtral 8x7B, 8x22B", "softmax over the chosen experts"),
    "olmoe": ("OLMoE-1B-7B", "norms of all queries and all keys"),
    "qwen2_moe": ("Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", "a gated shared expert; biases of q, k, v"),
    "qwen3_moe": ("Qwen3-30B-A3B, 235B-A22B", "as `qwen3`, without shared experts"),
    "granitemoe": ("Granite 3.0 and 3.1, 1B-A400M and 3B-A800M", "four multipliers"),
    "granitemoeshared": ("Granite's mixtures with shared experts", "the same with a shared expert"),
    "glm4_moe": ("GLM-4.5, 4.6", "V3's router, half of a head rotated, biases of q, k, v"),
    "dots1": ("dots.llm1", "V3's router, norms of queries and keys"),
    "phimoe": ("Phi-3.5-MoE", "SparseMixer, layer norms, biases everywhere, LongRoPE"),
    "gpt_oss": ("gpt-oss-20b, 120b", "sinks, every other layer in a window, biases of experts"),
    "llama4_text": ("the text model of Llama 4", "weighed inputs, chunks, layers without rotation"),
    "llama4": ("Llama 4 Scout, Maverick", "the same within a model that sees images"),
    "deepseek_v2": ("DeepSeek-V2, V2-Lite", "latent attention, experts limited to groups"),
    "deepseek_v3": ("DeepSeek-V3, R1", "latent attention, a bias that balances"),
    "deepseek": ("DeepSeekMoE 16B", "ungated shared experts"),
}
"""Published models of each type, and what sets them apart."""


def table() -> str:
    """A row per family that is read."""
    lines = ["| `model_type` | models | particular | written as |", "| --- | --- | --- | --- |"]
    for name, family in READABLE.items():
        models, particular = ABOUT[name]
        out = f"`{family.architecture}`" if family.writes else WRITTEN[name]
        lines.append(f"| `{name}` | {models} | {particular} | {out} |")
    return "\n".join(lines)


WRITTEN = {
    "llama4": "`Llama4ForCausalLM`, without the vision tower",
    "deepseek": "`Qwen2MoeForCausalLM` (below)",
}
"""For families that are written as another one."""


def render(page: str) -> str:
    """The page with its table rewritten."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
