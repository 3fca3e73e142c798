from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.model.conftest import Make


@pytest.mark.parametrize(
    ("banks", "tensor_plan", "expert_plan"),
    [
        (
            "shared_and_own",
            {"down_adapters": "colwise", "gate_adapters": "colwise", "gate_dense": "colwise", "up_adapters": "colwise"},
            {"down_codes", "down_adapters", "gate_codes", "gate_adapters", "gate_dense", "up_codes", "up_adapters"},
        ),
        ("down_only", {"down_adapters": "colwise"}, {"down_codes", "down_adapters"}),
    ],
)
def test_plans_shard_the_factors(
    compressed: Make, banks: str, tensor_plan: dict[str, str], expert_plan: set[str]
) -> None:
    """Rows of the adapters in tensor parallelism; whole experts, adapters and codes, in expert parallelism."""
    model = AutoModelForCausalLM.from_pretrained(compressed("qwen2_moe", banks).path)
    prefix = "model.layers.*.mlp.experts."

    def factors(plan: dict[str, str]) -> dict[str, str]:
        mine = f"{prefix}globe_"
        return {name.removeprefix(mine): style for name, style in plan.items() if name.startswith(mine)}

    assert factors(model.tp_plan) == tensor_plan
    assert factors(model.ep_plan) == dict.fromkeys(expert_plan, "grouped_gemm")
    parameters = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    for plan in (model.tp_plan, model.ep_plan):
        for dense in ("gate_up_proj", "down_proj"):
            assert (prefix + dense in plan) == (dense in parameters)


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import globe
from tests.model.compressed import logits

torch.set_num_threads(1)
dist.init_process_group("gloo")
path, sizes = sys.argv[1], {"tensor": {"tp_size": 2}, "expert": {"tp_size": 2, "ep_size": 2}}
expected = AutoModelForCausalLM.from_pretrained(path)
for kind, size in sizes.items():
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**size))
    adapters = model.model.layers[1].mlp.experts.globe_up_adapters
    local, whole = adapters.to_local().shape, adapters.shape
    halved = [dimension for dimension in range(3) if 2 * local[dimension] == whole[dimension]]
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
    model.save_pretrained(f"{sys.argv[2]}/{kind}")
    dist.barrier()
    saved = AutoModelForCausalLM.from_pretrained(f"{sys.argv[2]}/{kind}").state_dict()
    same = all(torch.equal(saved[name], tensor) for name, tensor in expected.state_dict().items())
    if dist.get_rank() == 0:
        print(kind, halved, same)
dist.destroy_process_group()
"""


def test_two_ranks(compressed: Make, tmp_path: Path) -> None:
    """Tensor parallelism halves the adapters' rows, expert parallelism the experts; the logits stay."""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, str(script), str(compressed("qwen2_moe").path), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["tensor [1] True", "expert [0] True"]
