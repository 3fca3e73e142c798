"""Run by the servers' Python: continue prompts of token ids greedily by vLLM.

Further settings of `LLM` are given as JSON; `adapter` among them is a LoRA that the prompts are for. JSON on the last
line holds the continuations, the bytes of the routed experts' parameters in each of vLLM's processes, and the bytes of
this process in memory.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of `expert_bytes`
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every process wants a memory node of its own
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # the end of the processes is logged behind what is printed here
}

from torch import nn
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def expert_bytes(model: nn.Module) -> int:
    """Of what the routed experts hold, each tensor once."""
    named = model.named_parameters()
    return sum(parameter.nbytes for name, parameter in named if ".routed_experts." in name)


def resident_bytes() -> int:
    """Of this process alone: without the pages of files that are mapped."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].removesuffix("kB")) * 1024


def main(model: str, dtype: str, prompts: str, num_tokens: str, further: str) -> None:
    settings = json.loads(further)
    adapter = settings.pop("adapter", None)
    lora = None if adapter is None else LoRARequest("adapter", 1, adapter)
    server = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=64, skip_tokenizer_init=True, **settings)
    greedy = SamplingParams(temperature=0, max_tokens=int(num_tokens), ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in json.loads(prompts)]
    outputs = server.generate(asked, greedy, lora_request=lora)
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "expert_bytes": server.apply_model(expert_bytes),
        "resident_bytes": resident_bytes(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
