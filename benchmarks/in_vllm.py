"""Speed and memory in vLLM's CPU build: the dense model, GloBE's native format, and experts in int4.

    python -m benchmarks.in_vllm

It needs `.venv-servers` (`make .venv-servers/ready`) with GloBE in it (docs/serving.md). The model has two layers of
random weights, with the rows of Qwen3-30B-A3B; coded experts have random paths, those in int4, which are in the format
of compressed-tensors and of GPTQ, random numbers. Every model is in a process of its own, of one thread; they are asked
in turns, for as many tokens as a request brings, and the best of the rounds counts. The clock counts the processor time
of the process, so that others on the machine disturb less. Memory: parameters of the routed experts, and all that the
process holds, vLLM and one GiB for its cache included.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.record import RESULTS, write_record
from benchmarks.serving import ServingConfig, coded, synthetic_model
from benchmarks.tables import Column, print_table
from globe.checkpoint.compressed_tensors import quantization_section
from globe.checkpoint.packed import packed_matrix
from globe.checkpoint.writer import write_json
from globe.model.expert_modules import factor_names, find_experts
from globe.model.experts import GlobeExperts
from globe.model.names import TRIPWIRE_SHAPE
from globe.model.quantization_config import GlobeQuantizationConfig

COLUMNS = (
    Column("kind", "experts"),
    Column("requests", "requests", "d"),
    Column("expert_bytes", "experts' bytes", ",d"),
    Column("relative_bytes", "/ dense", ".2f"),
    Column("resident_bytes", "process", ",d"),
    Column("speed", "tokens/s", ".1f"),
    Column("relative_speed", "/ dense", ".2f"),
)
DENSE, COMPRESSED_TENSORS, GPTQ = "dense", "int4, compressed-tensors", "int4, GPTQ"
GROUP = 128
"""Numbers of int4 that share a scale."""


@dataclasses.dataclass(frozen=True)
class InVllmConfig:
    """What is timed."""

    requests: tuple[int, ...] = (1, 8, 64)
    """Requests at a time."""
    prompt: int = 32
    """Tokens of each prompt."""
    new_tokens: int = 32
    """Tokens that each is continued with."""
    bits: tuple[int, ...] = (3,)
    """Bits of the coded variants' entries, on average."""
    repeats: int = 3
    """Rounds after the warm-up."""
    servers: Path = Path(".venv-servers")
    """The environment with vLLM."""
    folder: Path = Path("runs/in_vllm")
    """Where the models are written."""
    output: Path = RESULTS / "in_vllm.json"
    """Where the record is written."""


def write_models(config: InVllmConfig) -> dict[str, Path]:
    """The checkpoints, by what their experts are."""
    sizes = ServingConfig()
    dense = synthetic_model(sizes, sizes.real_intermediate_size, sizes.real_hidden_size)
    dense.save_pretrained(config.folder / "dense")
    found = {DENSE: config.folder / "dense"}
    for bits in config.bits:
        found[f"{bits} bits"] = _write_coded(dense, bits, config.folder / f"coded-{bits}")
    rest = {name: x for name, x in dense.state_dict().items() if ".experts." not in name}
    packed = _pack(dense)
    section = quantization_section({(4, GROUP): [experts.path for experts in find_experts(dense)]})
    found[COMPRESSED_TENSORS] = _write(config.folder / "compressed-tensors", dense, rest | packed, section)
    section = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    section |= {"lm_head": False, "modules_in_block_to_quantize": ["mlp.experts"]}
    found[GPTQ] = _write(config.folder / "gptq", dense, rest | _as_gptq(packed), section)
    return found


def _write_coded(dense: Any, bits: int, folder: Path) -> Path:
    model, names = coded(dense, bits), factor_names(dense)
    specs = [spec for module in model.modules() if isinstance(module, GlobeExperts) for spec in module.globe_coded]
    section = GlobeQuantizationConfig(coded=specs)
    tripwire = {names.tripwire(section.compressed): torch.zeros(TRIPWIRE_SHAPE, dtype=torch.bfloat16)}
    return _write(folder, dense, model.state_dict() | tripwire, section.to_dict())


def _pack(dense: Any) -> dict[str, Tensor]:
    """Random numbers of four bits for all experts, as compressed-tensors has them."""
    tensors: dict[str, Tensor] = {}
    for found in find_experts(dense):
        P, D = found.layout.intermediate_size, found.layout.hidden_size
        for expert in range(found.layout.num_experts):
            for name, shape in {"gate": (P, D), "up": (P, D), "down": (D, P)}.items():
                numbers, scales = torch.randint(-8, 8, shape), torch.rand(shape[0], shape[1] // GROUP) / 200
                matrix = f"{found.path}.{expert}.{name}_proj.weight"
                tensors |= packed_matrix(matrix, numbers, scales.bfloat16(), bits=4)
    return tensors


def _as_gptq(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers as GPTQ has them: transposed, with zero points that are all 8, stored as 7."""
    tensors: dict[str, Tensor] = {}
    for name, x in packed.items():
        stem, _, part = name.rpartition(".")
        if part == "weight_packed":
            tensors[f"{stem}.qweight"] = x.T.contiguous()
        elif part == "weight_scale":
            rows, groups = x.shape
            tensors[f"{stem}.scales"] = x.T.contiguous()
            tensors[f"{stem}.qzeros"] = torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)
            tensors[f"{stem}.g_idx"] = torch.arange(groups * GROUP, dtype=torch.int32) // GROUP
    return tensors


def _write(folder: Path, dense: Any, tensors: dict[str, Tensor], section: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", dense.config.to_dict() | {"quantization_config": section})
    return folder


@contextmanager
def serving(kind: str, model: Path, config: InVllmConfig) -> Iterator[subprocess.Popen[str]]:
    """A process with the model in vLLM."""
    # zentorch changes the rest of the servers' environment, and has the kernels for int4
    needed = [str(config.servers / "zen")] if kind in (COMPRESSED_TENSORS, GPTQ) else []
    path = os.pathsep.join([*needed, os.environ.get("PYTHONPATH", "")])
    worker = Path(__file__).with_name("vllm_worker.py")
    command = [config.servers / "bin" / "python", worker, model, str(max(config.requests))]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with (
        (model / "log").open("w") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


def answer(process: subprocess.Popen[str], question: Any = None) -> Any:
    """What a worker says, asked or not."""
    assert process.stdin is not None
    assert process.stdout is not None
    if question is not None:
        print(json.dumps(question), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def measure(workers: dict[str, subprocess.Popen[str]], requests: int, config: InVllmConfig) -> dict[str, float]:
    """Tokens per second of every worker, the best of the rounds after the first, which warms up."""
    question = requests, config.prompt, config.new_tokens
    rounds = [{kind: answer(worker, question) for kind, worker in workers.items()} for _ in range(config.repeats + 1)]
    return {kind: requests * config.new_tokens / min(seconds[kind] for seconds in rounds[1:]) for kind in workers}


def main(config: InVllmConfig) -> None:
    """Run everything, print the table, write the record."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        workers = {
            kind: stack.enter_context(serving(kind, model, config)) for kind, model in write_models(config).items()
        }
        kept = {kind: answer(worker) for kind, worker in workers.items()}
        for requests in config.requests:
            for kind, speed in (speeds := measure(workers, requests, config)).items():
                relative = {
                    "relative_bytes": kept[kind]["expert_bytes"] / kept[DENSE]["expert_bytes"],
                    "relative_speed": speed / speeds[DENSE],
                }
                rows.append({"kind": kind, "requests": requests, **kept[kind], "speed": speed, **relative})
    print_table(f"vLLM on a CPU, best of {config.repeats} rounds", rows, COLUMNS)
    write_record(config.output, "in_vllm", config, rows, [])


if __name__ == "__main__":
    main(tyro.cli(InVllmConfig, description=__doc__))
