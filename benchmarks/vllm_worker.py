"""Run by the servers' Python: a model in vLLM, which is timed as often as standard input asks.

A question is a line of JSON: requests at a time, tokens of their prompts, and tokens to continue each with. The answer
is one, too: the seconds of processor time that it took. Before the first one a line says what the model takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}

import torch
from torch import nn
from vllm import LLM, SamplingParams


def expert_bytes(model: nn.Module) -> int:
    """Of what the routed experts hold, each tensor once."""
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if ".routed_experts." in name)


def resident_bytes() -> int:
    """Of this process alone: without the pages of files that are mapped."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].removesuffix("kB")) * 1024


def main(model: str, most_requests: str) -> None:
    server = LLM(
        model,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=int(most_requests),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    kept = {"expert_bytes": server.apply_model(expert_bytes)[0], "resident_bytes": resident_bytes()}
    print(json.dumps(kept), flush=True)
    for line in sys.stdin:
        requests, prompt, num_tokens = json.loads(line)
        ids = torch.randint(3, 2048, (requests, prompt)).tolist()
        greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        began = time.process_time()
        server.generate([{"prompt_token_ids": prompt} for prompt in ids], greedy, use_tqdm=False)
        print(json.dumps(time.process_time() - began), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
