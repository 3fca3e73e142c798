"""docs/families.md, from what the suite builds and what GloBE refuses: `python -m tests.conformance.document`."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import _default_apply_gate

from globe.checkpoint.layout import ExpertLayer, source_names
from globe.checkpoint.reader import open_checkpoint
from globe.errors import UnsupportedModelError
from globe.model.configuration import expert_layers
from globe.model.expert_modules import ExpertsLayout, find_experts
from globe.model.source import open_source
from globe.terms import FAMILIES
from tests.conformance.families import COMMON, COMPOSITES, SETTINGS
from tests.conformance.quantise import FP8, INT4, MXFP4, change_config
from tests.conformance.tiny import Case, tiny_model, write

PATH = Path(__file__).parents[2] / "docs" / "families.md"

REFUSED: Mapping[str, Mapping[str, Any]] = {
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"],
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 8,
        "mamba_num_heads": 2,
        "mamba_head_dim": 16,
        "ssm_state_size": 4,
        "n_groups": 1,
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "intermediate_size": 24, "moe_num_shared_experts": 1},
    "llama": {"intermediate_size": 24},
}
REFUSED_METHODS: Mapping[str, Mapping[str, Any]] = {
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "AWQ": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True},
    "FP8, a scale for each tensor": {**FP8, "weight_block_size": None},
    "compressed-tensors, NVFP4": {**INT4, "format": "nvfp4-pack-quantized"},
}

HEAD = """# Families

Written by `python -m tests.conformance.document` from the conformance suite, `tests/conformance`; a test keeps it
current.

For every row and each of its layouts on disk the suite builds a tiny checkpoint from the family's own configuration
class and checks that

- each expert computes what it does in transformers' module;
- when nothing is compressed away (R = P, a basis for each expert, φ = identity) the logits are the original's to 1e-5;
- the model compressed for good has, loaded, the logits of its dense export;
- names, shapes, dtypes and shards of the dense export are the source's;
- routers, shared experts, dense layers, biases and all else are untouched, bit for bit, in both;
- memory holds the factors and no dense expert.

`N` is a layer, `e` an expert. The first layout is the one that `save_pretrained` writes, the second that of
transformers' own modules, where it differs. A prefix of the names (`model.`, `language_model.`) may be another one.

| model type | experts | on disk: gate, up, down | what is special |
|---|---|---|---|
"""

QUANTISED = """
Models of text and pictures (`qwen3_5_moe`, `llama4`) load whole or, through `AutoModelForCausalLM`, as the language
model alone. Kimi-K2 (`kimi_k2`) is DeepSeek-V3 of other sizes: what GloBE writes says `deepseek_v3`, which needs no
remote code. Multi-token-prediction layers are kept as they are. A family that is not in the table is compressed if
its files and its module follow one of these forms, and is refused otherwise.

## Quantised sources

Dequantised a tensor at a time as they are read, experts and all else, to the dtype that config.json names (bfloat16 if
none). What is compressed, and the dense export, is therefore a plain model without the source's `quantization_config`:
the names are those of the unquantised release, the shards those of the source without any that held scales only.
Reports and `globe inspect` count the source's bytes as dequantised.

| method | as in | judged by |
|---|---|---|
"""

REFUSALS = """
## Refused, by name

| model or method | what GloBE says |
|---|---|
"""


def document() -> str:
    """The page."""
    rows = [_row(family) for family in (*SETTINGS, *COMPOSITES)]
    methods = [
        f"| block FP8 (`{FP8['quant_method']}` with `weight_block_size`) | DeepSeek-V3, MiniMax-M2 | "
        "transformers' `FineGrainedFP8Config(dequantize=True)` |",
        f"| MXFP4 (`{MXFP4['quant_method']}`) | gpt-oss | transformers' `Mxfp4Config(dequantize=True)` |",
        f"| symmetric int4 (`{INT4['quant_method']}`, `{INT4['format']}`) | Kimi-K2-Thinking | "
        "the arithmetic of the format's description |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        refusals = [*_refused_families(Path(folder)), *_refused_methods(Path(folder))]
    return HEAD + _lines(rows) + QUANTISED + _lines(methods) + REFUSALS + _lines(refusals)


def _lines(rows: list[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


def _row(family: str) -> str:
    stored: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("saved", "fused"):
            write(Case(family, layout), Path(folder) / layout)
            names = _names(expert_layers(open_checkpoint(Path(folder) / layout))[-1])
            stored += [names] if names not in stored else []
    experts = find_experts(tiny_model(family))[0]
    module = type(experts.module)
    special = _special(family, module, experts.layout)
    return f"| `{family}` | {module.__name__} | {'<br>'.join(stored)} | {special} |"


def _names(layer: ExpertLayer) -> str:
    """The names of the experts' tensors, with N and e for the numbers and what they have in common said once."""
    families = list(dict.fromkeys(source_names(layer, family)[0] for family in FAMILIES))
    leaves = [name.removeprefix(f"{layer.prefix}.").replace("0.", "e.", 1) for name in families]
    prefix = re.sub(r"layers\.\d+", "layers.N", layer.prefix)
    return f"`{prefix}.` " + ", ".join(f"`{leaf}`" for leaf in leaves)


def _special(family: str, module: type, layout: ExpertsLayout) -> str:
    facts = {
        "transposed: (E, D, 2P), (E, P, D)": layout.is_transposed,
        "gate and up alternate": not layout.is_concatenated,
        "biases": layout.has_bias,
        "a gate of its own": getattr(module, "_apply_gate", _default_apply_gate) is not _default_apply_gate,
        "tokens come weighted and sorted": layout.presorted,
        "identity experts, whose unused weights are zeros in the export": layout.num_identity > 0,
        "text and pictures": family in COMPOSITES,
    }
    return "; ".join(fact for fact, holds in facts.items() if holds)


def _refused_families(folder: Path) -> list[str]:
    rows: list[str] = []
    for family, settings in REFUSED.items():
        config = AutoConfig.for_model(family, **{**COMMON, **settings})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
        try:
            expert_layers(open_source(folder / family))
        except UnsupportedModelError as error:
            rows.append(_refusal(f"`{family}`", error, folder / family))
    return rows


def _refused_methods(folder: Path) -> list[str]:
    rows: list[str] = []
    write(Case("qwen3_moe", "saved"), folder / "source")
    for method, section in REFUSED_METHODS.items():
        change_config(folder / "source", json.loads(json.dumps(section)))
        try:
            open_source(folder / "source")
        except UnsupportedModelError as error:
            rows.append(_refusal(method, error, folder / "source"))
    return rows


def _refusal(name: str, error: UnsupportedModelError, folder: Path) -> str:
    said = str(error).replace(str(folder), "MODEL").replace("|", "\\|")
    return f"| {name} | {said} |"


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    PATH.write_text(document())
