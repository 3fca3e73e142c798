"""Run by the servers' Python: log probabilities of texts of token ids by vLLM in bfloat16, as JSON on the last line."""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams


def main(model: str, texts: str) -> None:
    server, ids = LLM(model, dtype="bfloat16", enforce_eager=True, max_model_len=256), json.loads(texts)
    outputs = server.generate(
        [{"prompt_token_ids": text} for text in ids], SamplingParams(max_tokens=1, prompt_logprobs=0)
    )
    scores = [
        [entry[token].logprob for token, entry in zip(text[1:], output.prompt_logprobs[1:], strict=True)]
        for text, output in zip(ids, outputs, strict=True)
    ]
    print(json.dumps(scores))


if __name__ == "__main__":
    main(*sys.argv[1:])
