"""Linear banks (φ = identity) without composing: the products with the bases serve all experts of a token.

gate and up:  What_e x = A_e Σ_j a_ej z_j  with z_j = B_j x
down:  Σ_e w_e What_eᵀ h_e = Σ_j B_jᵀ v_j  with v_j = Σ_e w_e a_ej A_eᵀ h_e

A token costs M·R·D for each of the two, and M·R + P·R for each of its experts and families, instead of P·D; and nothing
is composed, at M·R·D + P·R·D for each expert that is hit and family. That is far less for the few tokens of a decoding
step, and more for many tokens that use the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from globe.checkpoint.gate_up import fuse_gate_up
from globe.model.bank_module import BankUse
from globe.model.expert_modules import ExpertsLayout
from globe.model.grouped import grouped_mm
from globe.model.names import adapters_parameter, codes_parameter
from globe.terms import FAMILIES


def is_linear(uses: Sequence[BankUse]) -> bool:
    """Whether gate, up and down all are in banks with φ = identity."""
    covered = {family for use in uses for family in use.families if use.bank.activation == "identity"}
    return covered == set(FAMILIES)


def is_readable(uses: Sequence[BankUse], states: Tensor) -> bool:
    """Whether the bases can be used outside of their module's call: whole, and where the states are."""
    return not any(isinstance(use.bank.bases, DTensor) or use.bank.bases.device != states.device for use in uses)


def is_cheaper(
    uses: Sequence[BankUse], layout: ExpertsLayout, dtype: torch.dtype, num_tokens: int, num_pairs: int, num_hit: int
) -> bool:
    """Whether sharing takes fewer multiply-adds, weighted by the bytes of an operand, than composing what is hit.

    `num_pairs` are the pairs of a token and one of its experts. Experts are composed in float32, whatever the `dtype`
    of the states is.
    """
    P, D = layout.intermediate_size, layout.hidden_size
    exact = torch.promote_types(dtype, torch.float32).itemsize
    shared = composed = 0
    for use in uses:
        M, R, families = use.bank.num_bases, use.bank.rank, len(use.families)
        directions = len({family == "down" for family in use.families})
        shared += (
            dtype.itemsize * num_tokens * directions * M * R * D + dtype.itemsize * num_pairs * families * (M + P) * R
        )
        composed += exact * num_hit * families * (M + P) * R * D + dtype.itemsize * num_pairs * families * P * D
    return shared < composed


def bytes_per_token(uses: Sequence[BankUse]) -> int:
    """What the products of a token take, with a copy in float32."""
    return max(8 * use.bank.num_bases * use.bank.rank for use in uses)


def run_shared(
    uses: Sequence[BankUse],
    parameters: Mapping[str, Tensor],
    layout: ExpertsLayout,
    apply_gate: Callable[[Tensor], Tensor],
    states: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """Weighted sum over each token's experts: (T, D), (T, K), (T, K) -> (T, D); indices from E on add nothing.

    Mixed in float32 at least, the rest in the dtype of the states.
    """
    E, exact = layout.num_experts, torch.promote_types(states.dtype, torch.float32)
    counts = torch.bincount(index.flatten(), minlength=E)[:E]
    slots = index.flatten().argsort(stable=True)[: int(counts.sum())]
    if not len(slots):
        return torch.zeros_like(states)
    weights, index = weights.where(index < E, 0).to(exact), index.clamp_max(E - 1)
    banks = {family: use.bank for use in uses for family in use.families}

    def mixtures(family: str) -> Tensor:
        """Codes of each token's experts, (T, K, M)."""
        return parameters[codes_parameter(family)][index].to(exact)

    def adapted(rows: Tensor, family: str, *, transposed: bool) -> Tensor:
        """Rows in the order of `slots`, times A_eᵀ, or A_e if transposed."""
        adapters, ends = parameters[adapters_parameter(family)], counts.cumsum(0, dtype=torch.int32)
        adapters = adapters.to(rows.dtype)
        return grouped_mm(rows, adapters if transposed else adapters.mT, ends)

    products = {bank: bank.products(states).to(exact) for bank in {banks["gate"], banks["up"]}}
    gate, up = (
        adapted(
            (mixtures(family) @ products[banks[family]]).to(states.dtype).flatten(0, 1)[slots],
            family,
            transposed=False,
        )
        for family in ("gate", "up")
    )
    hidden = fuse_gate_up(gate, up, 1, interleaved=not layout.is_concatenated)
    if layout.has_bias:
        hidden = hidden + parameters["gate_up_proj_bias"][index.flatten()[slots]]
    rows = adapted(apply_gate(hidden), "down", transposed=True)
    rows_TKR = rows.new_zeros(index.numel(), rows.shape[1]).index_copy(0, slots, rows).unflatten(0, index.shape)
    sums_TMR = (mixtures("down") * weights[..., None]).mT @ rows_TKR.to(exact)
    output = banks["down"].transposed_sum(sums_TMR.to(states.dtype))
    if layout.has_bias:
        output = output + (parameters["down_proj_bias"][index] * weights[..., None]).sum(1).to(output.dtype)
    return output
