"""The families of published models. A new one is a table in a file here, and a line below."""

from moejax.hf.families.deepseek import DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, DOTS1, GLM4_MOE
from moejax.hf.families.family import Family
from moejax.hf.families.gpt_oss import GPT_OSS
from moejax.hf.families.granite import GRANITE_MOE, GRANITE_MOE_SHARED
from moejax.hf.families.llama import LLAMA, QWEN3
from moejax.hf.families.llama4 import LLAMA4, LLAMA4_VISION
from moejax.hf.families.mixtral import MIXTRAL
from moejax.hf.families.olmoe import OLMOE
from moejax.hf.families.phi import PHIMOE
from moejax.hf.families.qwen import QWEN2_MOE, QWEN3_MOE, UNGATED_QWEN2_MOE

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    QWEN3,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    UNGATED_QWEN2_MOE,
    QWEN3_MOE,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    GLM4_MOE,
    DOTS1,
    PHIMOE,
    GPT_OSS,
    LLAMA4,
    LLAMA4_VISION,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK,
)
"""In the order in which they are tried for a model of ours."""

READABLE = {family.model_type: family for family in FAMILIES if family.reads}
"""By the ``model_type`` of their configs."""
