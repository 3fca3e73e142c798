"""Speed and memory of the compressed model against the dense one, by the bytes that composed experts may take.

    python -m benchmarks.serving
    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
        python -m benchmarks.serving --models 'real rows' --threads 1 --output benchmarks/results/serving_avx2.json

The second line is for a CPU with AVX2 and no more. Three models: the shipped one, fitted for a few steps, and two
synthetic ones of few layers with random weights: a small one with random factors too, all families of a layer in one
bank, and one whose experts have the rows of real ones, which is coded only, and beside it what else is done about
memory: experts in int4, and a dense model whose experts are on disk, from where accelerate fetches them (the operating
system has them in memory, in truth). Prefill: one pass over the prompts. Decode: greedy steps after it. All variants
are run in turns, and a speed is compared with the dense model's of the same round; medians over the rounds. On one CPU
thread the clock counts the process's own time, so that others on the machine disturb less. Memory is that of the routed
experts: what is stored and what is composed, or dense matrices. The hit rate is that of the decoding. The linear
variant has the same factors with φ = identity, the coded ones have random paths of few bits. Writes a table, a record,
and a picture.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
import tyro
from accelerate import disk_offload
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.tables import Column, print_claims, print_table
from globe import CompressConfig, compress, set_compose_cache
from globe.bank_shape import sides
from globe.checkpoint.shipped import resolve_model
from globe.model.bank_module import Bank, BankUse
from globe.model.coded_spec import CodedSpec, spec_of, stored_parts
from globe.model.compose_cache import ComposeCache
from globe.model.expert_modules import find_experts
from globe.model.experts import factorise
from globe.model.loading import load
from globe.model.names import coded_parameter, is_factor
from globe.plan.budget import Keep
from globe.quant.banked import BankedExperts, CodedBank
from globe.quant.coded import CodedExperts
from globe.quant.outputs import Outputs
from globe.quant.packing import row_bytes
from globe.quant.side import OwnRows
from globe.quant.trellis import path_length
from globe.report.style import COLOURS, INK, MARKERS, STYLE
from globe.terms import FAMILIES

COLUMNS = (
    Column("model", "model"),
    Column("threads", "threads", "d"),
    Column("batch", "batch", "d"),
    Column("kind", "experts"),
    Column("share", "kept composed", ".0%"),
    Column("memory", "experts' MB", ".1f"),
    Column("relative_memory", "/ dense", ".2f"),
    Column("hit_rate", "hits", ".1%"),
    Column("decode", "decode, tokens/s", ".1f"),
    Column("relative_decode", "/ dense", ".2f"),
    Column("prefill", "prefill, tokens/s", ".0f"),
    Column("relative_prefill", "/ dense", ".2f"),
)


REAL = "real rows"
INT4, OFFLOADED = "int4", "offloaded"
GROUP = 128
"""Weights of an input that share a scale and a zero point in int4."""
DECODE_TARGETS = {1: 0.5, 8: 0.6, 64: 0.8}
"""Speed of coded experts over the dense model's, by batch."""


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """What is timed."""

    models: tuple[Literal["shipped", "synthetic", "real rows"], ...] = ("shipped", "synthetic", "real rows")
    """Which models are run."""
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Budgets for composed experts, in shares of what all of them take."""
    linear_shares: tuple[float, ...] = (0.0, 0.5)
    """Those of the linear variant."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Sequences at a time."""
    prompt: int = 32
    """Tokens of each prompt."""
    new_tokens: int = 6
    """Decoding steps in a round."""
    repeats: int = 3
    """Rounds after the warm-up."""
    keep: float = 0.5
    """Share of the experts' parameters that the compression keeps."""
    bits: tuple[int, ...] = (3, 2)
    """Bits of the coded variants' entries, on average."""
    bases: tuple[int, ...] = (0, 2)
    """Bases of the coded variants' banks, of which one serves each family of a layer."""
    layers: int = 2
    """Layers of the synthetic models."""
    experts: int = 32
    """Their experts in each layer."""
    intermediate_size: int = 256
    """P of the small one's experts."""
    hidden_size: int = 1024
    """D of the small one's experts."""
    real_intermediate_size: int = 768
    """P of the other one's experts, as in Qwen3-30B-A3B."""
    real_hidden_size: int = 2048
    """D of the other one's experts."""
    real_prompts: int = 512
    """Tokens of its prompts, all together."""
    seed: int = 0
    """Seeds the synthetic model and the prompts."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads; with more than the first number only the model with the rows of real ones is run."""
    device: str = "cpu"
    """Where the models run."""
    output: Path = RESULTS / "serving.json"
    """Where the record is written; the picture goes beside it."""


def shipped_models(config: ServingConfig) -> tuple[Any, Any]:
    """The shipped model, dense and compressed."""
    source = resolve_model("shipped")
    with tempfile.TemporaryDirectory() as folder:
        compress(source, Path(folder) / "out", CompressConfig(keep=config.keep, steps=20, seed=config.seed))
        compressed = load(Path(folder) / "out", config.device)
    return load(source, config.device), compressed


def synthetic_model(config: ServingConfig, P: int, D: int) -> Any:
    """A Qwen3-MoE of few layers in bfloat16."""
    settings = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=D,
        moe_intermediate_size=P,
        num_experts=config.experts,
        num_experts_per_tok=4,
        num_hidden_layers=config.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=2048,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(config.seed)
    return AutoModelForCausalLM.from_config(settings).to(config.device).eval()


def synthetic_models(config: ServingConfig) -> tuple[Any, Any]:
    """A small one, and the same with factorised experts."""
    P, D = config.intermediate_size, config.hidden_size
    dense = synthetic_model(config, P, D)
    compressed = copy.deepcopy(dense)
    shape = Keep(config.keep).shape_for((3 * config.experts, P, D))
    for found in find_experts(compressed):
        bank = Bank(shape.bases, "tanh", torch.bfloat16, torch.device(config.device))
        factorise(found.module, found.layout, [BankUse(bank, FAMILIES, own="own")])
        for parameter in found.module.parameters():
            nn.init.normal_(parameter, std=0.1)
    return dense, compressed


def linear(model: Any) -> Any:
    """A copy whose banks have φ = identity."""
    model = copy.deepcopy(model)
    for bank in model.modules():
        if isinstance(bank, Bank):
            bank.activation = "identity"
    return model


@torch.no_grad()
def coded(dense: Any, bits: int, num_bases: int) -> Any:
    """A copy whose experts are coded: random paths in rows of so many bits, give or take one, each with a scale of its
    own, and scaled outputs of gate and up, as trained experts have them; mixtures of so many bases are added."""
    model, generator = copy.deepcopy(dense), torch.Generator().manual_seed(bits)

    def random_paths(count: int, N: int, K: int, outputs: Outputs) -> CodedExperts:
        widths = 2 * bits + torch.randint(-2, 3, (count, N), generator=generator)
        bases = torch.full((count,), round(6 * math.log2(0.02)), dtype=torch.int16)
        exponents = bases[:, None] - torch.randint(31, (count, N), generator=generator)
        side = OwnRows.of(widths.to(torch.uint8), exponents.int(), bases)
        size = int(row_bytes(side.widths(), path_length(K)).sum())
        payload = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
        return CodedExperts(payload, side, K, outputs)

    for found in find_experts(model):
        parts, specs = dict[str, Tensor](), list[CodedSpec]()
        E, device = found.layout.num_experts, next(found.module.parameters()).device
        for family in FAMILIES:
            N, K = sides(found.layout, family)
            scales = torch.randint(-4, 5, (E, K), generator=generator).to(torch.int8)
            rest, bank = random_paths(E, N, K, Outputs(None if family == "down" else scales)), None
            if num_bases:
                codes = torch.randint(-4096, 4097, (E, num_bases), generator=generator).to(torch.int16)
                bank = CodedBank(random_paths(num_bases, N, K, Outputs()), codes)
            experts = BankedExperts(rest, bank)
            specs.append(spec_of(found.layer, family, experts))
            parts |= {coded_parameter(family, name): x for name, x in stored_parts(experts).items()}
        factorise(found.module, found.layout, [], specs)
        for name, tensor in parts.items():
            found.module.get_parameter(name).copy_(tensor.to(device))
    return model


class Int4Experts(nn.Module):
    """Experts of random weights in int4, by PyTorch's own kernel for CPUs, which is what torchao calls there."""

    def __init__(self, num_experts: int, P: int, D: int) -> None:
        super().__init__()
        for name, inputs, outputs in (("gate_up", D, 2 * P), ("down", P, D)):
            weights = torch.randint(16, (num_experts, outputs, inputs), dtype=torch.int32)
            packed = torch.stack([torch.ops.aten._convert_weight_to_int4pack_for_cpu(x, 1) for x in weights])
            scales = 1e-3 * torch.randn(num_experts, inputs // GROUP, outputs, 2).bfloat16()
            self.register_parameter(name, nn.Parameter(packed, requires_grad=False))
            self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))

    def _multiply(self, x: Tensor, name: str, expert: int) -> Tensor:
        packed, scales = self.get_parameter(name)[expert], self.get_parameter(f"{name}_scales")[expert]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(states)
        for expert in index.unique().tolist():
            tokens, slots = torch.where(index == expert)
            gate, up = self._multiply(states[tokens], "gate_up", expert).chunk(2, dim=1)
            hidden = self._multiply(nn.functional.silu(gate) * up, "down", expert)
            out.index_add_(0, tokens, hidden * weights[tokens, slots, None])
        return out


def in_int4(dense: Any) -> Any:
    """A copy whose experts are in int4."""
    model = copy.deepcopy(dense)
    for found in find_experts(model):
        layout = found.layout
        experts = Int4Experts(layout.num_experts, layout.intermediate_size, layout.hidden_size)
        model.set_submodule(found.path, experts)
    return model


def offloaded(dense: Any, folder: str) -> Any:
    """A copy whose experts are on disk, from where accelerate fetches those of a layer when it is run."""
    model = copy.deepcopy(dense)
    for found in find_experts(model):
        disk_offload(found.module, f"{folder}/{found.layer}", execution_device=torch.device("cpu"))
    return model


def parameter_bytes(model: Any) -> int:
    """Bytes of the parameters of a model's routed experts that are in memory: factors, or dense matrices."""
    held = {name: parameter.nbytes for name, parameter in model.named_parameters() if not parameter.is_meta}
    return sum(size for name, size in held.items() if is_factor(name) or ".experts." in name)


Kinds = list[tuple[str, Any, tuple[float, ...]]]
"""Models by name, and the budgets for their composed experts in shares of what all of them take."""


@dataclasses.dataclass
class Variant:
    """A model in one setting, and the seconds of its rounds."""

    kind: str
    model: Any
    share: float | None = None
    cache: ComposeCache | None = None
    prefill: list[float] = dataclasses.field(default_factory=list)
    decode: list[float] = dataclasses.field(default_factory=list)

    @property
    def memory(self) -> int:
        return parameter_bytes(self.model) + (0 if self.cache is None else self.cache.resident_bytes)

    @torch.inference_mode()
    def run(self, prompts: Tensor, new_tokens: int, clock: Callable[[], float]) -> None:
        """One round: a pass over the prompts, then greedy steps."""
        began = clock()
        output = self.model(prompts, use_cache=True)
        prefilled = clock()
        if self.cache is not None:
            self.cache.reset_counts()
        for _ in range(new_tokens):
            ids = output.logits[:, -1:].argmax(-1)
            output = self.model(ids, past_key_values=output.past_key_values, use_cache=True)
        self.prefill.append(prefilled - began)
        self.decode.append(clock() - prefilled)


def variants(dense: Any, kinds: Kinds) -> list[Variant]:
    """The dense model, and of every kind one for each budget."""
    found = [Variant("dense", dense)]
    for kind, model, shares in kinds:
        for share in shares:
            if budget := math.ceil(share * parameter_bytes(dense)):
                own = copy.deepcopy(model)  # for its cache
                found.append(Variant(kind, own, share, set_compose_cache(own, budget)))
            else:
                found.append(Variant(kind, model, share))
    return found


def coded_kinds(dense: Any, config: ServingConfig) -> Kinds:
    """Coded in every number of bits, with every number of bases, and nothing decoded beforehand."""
    return [
        (f"{bits} bits" + (f", {count} bases" if count else ""), coded(dense, bits, count), (0.0,))
        for bits, count in itertools.product(config.bits, config.bases)
    ]


def bank_kinds(compressed: Any, config: ServingConfig) -> Kinds:
    """With banks, and the same with φ = identity."""
    return [("tanh", compressed, config.shares), ("linear", linear(compressed), config.linear_shares)]


def rows_of(name: str, batch: int, prompt: int, timed: list[Variant], config: ServingConfig) -> list[dict[str, Any]]:
    dense = timed[0]

    def ratio(phase: str, variant: Variant) -> float:
        return statistics.median(
            ours / own for ours, own in zip(getattr(dense, phase), getattr(variant, phase), strict=True)
        )

    return [
        {
            "model": name,
            "threads": torch.get_num_threads(),
            "batch": batch,
            "kind": variant.kind,
            "share": variant.share,
            "memory": variant.memory / 1e6,
            "relative_memory": variant.memory / dense.memory,
            "hit_rate": None if variant.cache is None else variant.cache.hit_rate,
            "decode": batch * config.new_tokens / statistics.median(variant.decode),
            "relative_decode": ratio("decode", variant),
            "prefill": batch * prompt / statistics.median(variant.prefill),
            "relative_prefill": ratio("prefill", variant),
        }
        for variant in timed
    ]


def judge_claims(rows: list[dict[str, Any]], config: ServingConfig) -> list[Claim]:
    """At least 0.9 of the dense model's speed where all experts are kept composed; for coded ones, the targets."""

    def claim(row: dict[str, Any], what: str, key: str, least: float) -> Claim:
        where = f"{row['model']}, {row['kind']}, {row['threads']} threads, batch {row['batch']}"
        about = f"{where}: {what} at {least} of the dense speed or more"
        return Claim(about, f"{row[key]:.2f}", row[key] >= least)

    claims: list[Claim] = []
    for row in rows:
        if (row["kind"], row["share"]) == ("tanh", 1):
            claims += [claim(row, f"{phase}, all kept,", f"relative_{phase}", 0.9) for phase in ("decode", "prefill")]
        if row["model"] == REAL and row["kind"].endswith("bits"):
            claims += [
                claim(row, "decode", "relative_decode", DECODE_TARGETS.get(row["batch"], 0.5)),
                claim(row, f"prefill of {config.real_prompts} tokens", "relative_prefill", 0.8),
            ]
    memory = [row["relative_memory"] for row in rows if (row["model"], row["kind"]) == (REAL, "3 bits")]
    if memory:
        claims.append(
            Claim("experts of 3 bits take 0.21 of the dense memory or less", f"{memory[0]:.3f}", memory[0] <= 0.21)
        )
    return claims


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed against memory, both over the dense model's: a panel for decode and prefill of each model."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["kind"] != "dense"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        panels = figure.subplots(len(names), 2, sharex=True, squeeze=False)
        for (line, name), (place, phase) in itertools.product(
            zip(panels, names, strict=True), enumerate(("decode", "prefill"))
        ):
            axis = line[place]
            axis.set(title=f"{name}: {phase}", ylabel="speed over the dense model's")
            axis.axhline(1, color=INK, linewidth=0.8)
            for (batch, colour), (kind, marker) in itertools.product(
                zip(batches, COLOURS, strict=False), zip(kinds, MARKERS, strict=False)
            ):
                mine = [row for row in rows if (row["model"], row["batch"], row["kind"]) == (name, batch, kind)]
                x, y = ([row[key] for row in mine] for key in ("relative_memory", f"relative_{phase}"))
                axis.plot(x, y, color=colour, marker=marker)
            axis.set_ylim(bottom=0)
        for axis in panels[-1]:
            axis.set_xlabel("memory of the experts over the dense model's")
        for batch, colour in zip(batches, COLOURS, strict=False):
            panels[0][0].plot([], [], color=colour, label=f"batch {batch}")
        for kind, marker in zip(kinds, MARKERS, strict=False):
            panels[0][0].plot([], [], marker, color=INK, label=kind)
        panels[0][0].legend()
        figure.savefig(path)


def make_clock(config: ServingConfig) -> Callable[[], float]:
    """Seconds: the process's own on one CPU thread, else those that pass until the device is done."""
    if config.device == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def clock() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return clock


def measure(
    name: str, dense: Any, kinds: Kinds, config: ServingConfig, prompts: int | None = None
) -> list[dict[str, Any]]:
    """All variants of a model at every batch size; `prompts`: tokens of all prompts of a batch together."""
    rows: list[dict[str, Any]] = []
    clock = make_clock(config)
    for batch in config.batches:
        generator = torch.Generator().manual_seed(config.seed)
        length = config.prompt if prompts is None else prompts // batch
        ids = torch.randint(3, 2048, (batch, length), generator=generator).to(config.device)
        timed = variants(dense, kinds)
        for _ in range(config.repeats + 1):
            for variant in timed:
                variant.run(ids, config.new_tokens, clock)
        for variant in timed:  # the first round warms up
            del variant.prefill[0], variant.decode[0]
        rows += rows_of(name, batch, length, timed, config)
        print(name, batch, [f"{row['relative_decode']:.2f}" for row in rows[-len(timed) :]], flush=True)
    return rows


def measure_real_rows(config: ServingConfig) -> list[dict[str, Any]]:
    """Coded experts of real sizes beside what else is done about memory, by threads."""
    dense = synthetic_model(config, config.real_intermediate_size, config.real_hidden_size)
    rows, kinds = list[dict[str, Any]](), coded_kinds(dense, config)
    with tempfile.TemporaryDirectory() as folder:
        if config.device == "cpu":
            kinds += [(INT4, in_int4(dense), (0.0,)), (OFFLOADED, offloaded(dense, folder), (0.0,))]
        for num_threads in config.threads:
            torch.set_num_threads(num_threads)
            rows += measure(REAL, dense, kinds, config, config.real_prompts)
    return rows


def main(config: ServingConfig) -> None:
    # oneDNN compiles a bfloat16 kernel for every number of rows and keeps 1024, fewer than all variants use: whoever
    # is the first of a round would compile for the others
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100000")
    torch.set_num_threads(config.threads[0])
    logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    for name, make in (("shipped", shipped_models), ("synthetic", synthetic_models)):
        if name in config.models:
            dense, compressed = make(config)
            kinds = bank_kinds(compressed, config) + coded_kinds(dense, config)
            rows += measure(name, dense, kinds, config)
    if REAL in config.models:
        rows += measure_real_rows(config)
    claims = judge_claims(rows, config)
    print_table(f"Serving, medians of {config.repeats} rounds", rows, COLUMNS)
    print_claims(claims)
    write_record(config.output, "serving", config, rows, claims)
    draw([row for row in rows if row["threads"] == config.threads[0]], config.output.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(ServingConfig, description=__doc__))
