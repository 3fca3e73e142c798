"""Run by the servers' Python: greedy continuations of prompts of token ids by vLLM, as JSON on the last line."""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams


def main(model: str, prompts: str, num_tokens: str) -> None:
    server = LLM(model, dtype="float32", enforce_eager=True, max_model_len=256)
    greedy = SamplingParams(temperature=0, max_tokens=int(num_tokens), ignore_eos=True)
    outputs = server.generate([{"prompt_token_ids": ids} for ids in json.loads(prompts)], greedy)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
