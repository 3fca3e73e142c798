"""Factorised experts inside a transformers model.

An experts module is swapped in place: its dense parameters go, the factors come, and its class becomes a subclass of
the family's own, so the gate function, limits, biases and norms stay the family's. See `factorise`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from globe.bank_shape import BankShape, sides
from globe.checkpoint.gate_up import fuse_gate_up
from globe.errors import UnsupportedModelError
from globe.model import bank_module
from globe.model.bank_module import BankUse
from globe.model.coded_spec import CodedSpec
from globe.model.compose_cache import LayerCache
from globe.model.expert_modules import ExpertsLayout
from globe.model.grouped import grouped_mm
from globe.model.names import (
    BANKS,
    DENSE_PARAMETER,
    adapters_parameter,
    coded_parameter,
    codes_parameter,
    dense_halves,
    dense_parameter,
)
from globe.model.sharing import bytes_per_token, is_cheaper, is_linear, is_readable, run_shared
from globe.quant.banked import BankedExperts
from globe.quant.product import multiply, multiply_sums
from globe.terms import FAMILIES, Family


class GlobeExperts(nn.Module):
    """Mixin that computes a family's experts from factors. Instances are made by `factorise`."""

    _is_hf_initialized = True  # the family's _init_weights would look for the dense parameters
    globe_layout: ExpertsLayout
    globe_uses: tuple[BankUse, ...]
    globe_coded: tuple[CodedSpec, ...]
    globe_cache: LayerCache | None = None
    # what the family's class brings
    _apply_gate: Callable[[Tensor], Tensor]
    act_fn: Callable[[Tensor], Tensor]
    has_post_expert_norm: bool = False
    post_expert_norm: nn.Module

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Weighted sum over each token's experts: (T, D), (T, K), (T, K) -> (T, D).

        This is not dispatched by `config._experts_implementation`. Indices from E on stand for experts of other devices
        and add nothing, or for the layout's identity experts. Coded experts multiply without being decoded as a whole,
        unless decoded ones are to be kept. Of others, only those that are hit are composed, as many at a time as
        `WORKING_BYTES` holds, and composed again in the backward pass instead of kept for it; in inference those in the
        cache are not composed again, and none is where linear banks make it cheaper not to (`globe.model.sharing`).
        """
        if self._globe_multiplies() and not self._globe_keeps():
            output = self._globe_multiplied(hidden_states, top_k_index, top_k_weights)
        else:
            parts = hidden_states, top_k_index, top_k_weights
            output = self._globe_composed_output(*parts)  # pyright: ignore[reportCallIssue]
        if self.globe_layout.num_identity:
            others = top_k_weights.where(top_k_index >= self._globe_num_experts(), 0)
            output = output + hidden_states * others.sum(1, keepdim=True)
        return output.to(hidden_states.dtype)

    def _globe_multiplies(self) -> bool:
        """Whether gate, up and down all are coded."""
        return {spec.family for spec in self.globe_coded} == set(FAMILIES)

    def _globe_keeps(self) -> bool:
        """Whether this call is to look for composed experts, and to keep those that it composes."""
        return self.globe_cache is not None and not self.training and not torch.is_grad_enabled()

    def _globe_multiplied(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self._globe_refuse_sharded()
        experts, order = index.flatten().sort(stable=True)
        num_experts = self.globe_layout.num_experts
        ends = torch.searchsorted(experts, torch.arange(num_experts).to(experts), right=True)
        weights = weights.flatten()[order].where(experts < num_experts, 0)
        owners, down = experts.clamp_max(num_experts - 1), self._globe_coded("down")
        hidden = self._globe_hidden(states, ends, owners, order)
        shared = None if self.has_post_expert_norm else down.bank  # norms are of the whole
        products = multiply(hidden, ends, down if shared is None else BankedExperts(down.rest))
        weighted = self._globe_finished(products, owners) * weights[:, None]
        per_slot = weighted.new_zeros(weighted.shape).index_copy(0, order, weighted)
        output = per_slot.unflatten(0, index.shape).sum(dim=1)
        if shared is not None:
            output = output + multiply_sums(hidden, ends, shared, weights, order, len(states))
        return output

    def _globe_products(self, states: Tensor, ends: Tensor, owners: Tensor) -> Tensor:
        """Every coded expert on its own rows of states, up to its end: (n, D) -> (n, D). Owners (n,): their experts."""
        hidden = self._globe_hidden(states, ends, owners)
        return self._globe_finished(multiply(hidden, ends, self._globe_coded("down")), owners)

    def _globe_hidden(self, states: Tensor, ends: Tensor, owners: Tensor, order: Tensor | None = None) -> Tensor:
        """What down is applied to, (n, P), of rows of states (n, D), or of tokens' choices, as in `multiply`."""
        gate, up = (multiply(states, ends, self._globe_coded(family), order) for family in ("gate", "up"))
        hidden = fuse_gate_up(gate, up, 1, interleaved=not self.globe_layout.is_concatenated)
        if self.globe_layout.has_bias:
            hidden = hidden + self.get_parameter("gate_up_proj_bias")[owners]
        return self._apply_gate(hidden)

    def _globe_finished(self, output: Tensor, owners: Tensor) -> Tensor:
        """Products with down, with what the family does to them: (n, D) -> (n, D)."""
        if self.globe_layout.has_bias:
            output = output + self.get_parameter("down_proj_bias")[owners]
        return self.post_expert_norm(output) if self.has_post_expert_norm else output

    @torch.compiler.disable  # which experts are hit is read back to the host; compiled callers break the graph here
    def _globe_composed_output(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        top_k = top_k_index.shape[1]
        num_experts = self._globe_num_experts()
        counts = torch.bincount(top_k_index.flatten(), minlength=num_experts)[:num_experts].tolist()
        if self._globe_shares(counts, hidden_states):
            return self._globe_shared(hidden_states, top_k_index, top_k_weights)
        slots = top_k_index.flatten().argsort(stable=True)[: sum(counts)]
        weighted = self._globe_outputs(counts, hidden_states[slots // top_k]) * top_k_weights.flatten()[slots, None]
        per_slot = weighted.new_zeros(top_k_index.numel(), weighted.shape[1]).index_copy(0, slots, weighted)
        return per_slot.unflatten(0, top_k_index.shape).sum(dim=1)

    def _globe_num_experts(self) -> int:
        """Of this device: under expert parallelism, those whose factors are here."""
        if not self.globe_uses:
            return self.globe_layout.num_experts
        return self.get_parameter(codes_parameter(self.globe_uses[0].families[0])).shape[0]

    def _globe_shares(self, counts: Sequence[int], states: Tensor) -> bool:
        """Whether this call is to share products instead of composing: in inference, without a cache, if cheaper."""
        if torch.is_grad_enabled() or self.has_post_expert_norm or getattr(self, "_is_hooked", False):
            return False
        cache, uses, hit = self.globe_cache, self.globe_uses, len(_hit(counts))
        if (cache is not None and cache.num_bytes) or not (is_linear(uses) and is_readable(uses, states)):
            return False
        if not is_cheaper(uses, self.globe_layout, states.dtype, len(states), sum(counts), hit):
            return False
        if cache is not None:
            cache.misses += hit
        return True

    def _globe_shared(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        run = functools.partial(
            run_shared, self.globe_uses, self._globe_parameters(), self.globe_layout, self._apply_gate
        )
        size = max(1, bank_module.WORKING_BYTES // bytes_per_token(self.globe_uses))
        return torch.cat([run(*part) for part in zip(*(x.split(size) for x in (states, index, weights)), strict=True)])

    def _globe_parameters(self) -> dict[str, Tensor]:
        return dict(self.named_parameters(recurse=False))

    def _globe_outputs(self, counts: Sequence[int], states: Tensor) -> Tensor:
        """Every expert on its own run of states, as many as its count: (ΣT_e, D) -> (ΣT_e, D)."""
        self._globe_refuse_sharded()
        if self.training and torch.is_grad_enabled() and getattr(self, "_is_hooked", False):
            raise UnsupportedModelError(
                "training GloBE experts under tensor or expert parallelism is not supported: the gradients of codes "
                "and bases would not be summed; use data parallelism (FSDP, DDP) or call eval()"
            )
        cache = self.globe_cache
        if cache is None or not self._globe_keeps():
            return self._globe_composed(counts, states)
        parameters = self._globe_parameters()
        if not cache.refresh([*parameters.values(), *(use.bank.bases for use in self.globe_uses)], states):
            return self._globe_composed(counts, states)
        return self._globe_cached(cache, parameters, counts, states)

    def _globe_refuse_sharded(self) -> None:
        if self.globe_coded and getattr(self, "_is_hooked", False):
            raise UnsupportedModelError(
                "coded experts cannot be sharded by tensor or expert parallelism: load the model on whole devices "
                "(device_map), or export it dense"
            )

    def _globe_composed(self, counts: Sequence[int], states: Tensor) -> Tensor:
        if self._globe_multiplies():
            sizes = torch.tensor(counts, device=states.device)
            owners = torch.arange(len(counts), device=states.device).repeat_interleave(sizes)
            return self._globe_products(states, sizes.cumsum(0), owners)
        parameters = self._globe_parameters()
        run = self._globe_compose_and_run
        if torch.is_grad_enabled():
            run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        outputs: list[Tensor] = [states[:0]]
        start = 0
        for experts in self.globe_batches(parameters, _hit(counts)):
            sizes = [counts[expert] for expert in experts]
            outputs.append(run(parameters, experts, sizes, states[start : start + sum(sizes)]))
            start += sum(sizes)
        return torch.cat(outputs)

    def _globe_cached(
        self, cache: LayerCache, parameters: Mapping[str, Tensor], counts: Sequence[int], states: Tensor
    ) -> Tensor:
        hit = _hit(counts)
        slots = cache.look_up(hit)
        for experts in self.globe_batches(parameters, list(slots)):
            cache.write(
                {expert: slots[expert] for expert in experts}, *self.globe_matrices(parameters, experts, states)
            )
        cached = sorted(cache.slots_of(hit).items(), key=lambda item: item[1])
        sizes = [0] * cache.num_slots
        for expert, slot in cached:
            sizes[slot] = counts[expert]
        if [expert for expert, _ in cached] == hit:
            return self._globe_run(parameters, cache.gate_up, cache.down, hit, sizes, states) if hit else states[:0]
        pieces = states.split(list(counts))
        here, elsewhere = [expert for expert, _ in cached], [expert for expert in hit if expert not in dict(cached)]
        rest = [count if expert in elsewhere else 0 for expert, count in enumerate(counts)]
        outputs: dict[int, Tensor] = {}
        if here:
            own = torch.cat([pieces[expert] for expert in here])
            both = self._globe_run(parameters, cache.gate_up, cache.down, here, sizes, own)
            outputs.update(zip(here, both.split([counts[expert] for expert in here]), strict=True))
        if elsewhere:
            composed = self._globe_composed(rest, torch.cat([pieces[expert] for expert in elsewhere]))
            outputs.update(zip(elsewhere, composed.split([counts[expert] for expert in elsewhere]), strict=True))
        return torch.cat([outputs[expert] for expert in hit])

    def globe_batches(self, parameters: Mapping[str, Tensor], experts: Sequence[int]) -> Iterator[Sequence[int]]:
        """Split the experts so that gate, up and down of a batch fit `WORKING_BYTES`."""
        adapters = [parameters[adapters_parameter(use.families[0])] for use in self.globe_uses[:1]]
        rows = adapters[0].shape[1] if adapters else self.globe_layout.intermediate_size
        itemsize = adapters[0].element_size() if adapters else 4
        per_expert = 3 * rows * self.globe_layout.hidden_size * itemsize
        size = max(1, bank_module.WORKING_BYTES // per_expert)
        return (experts[start : start + size] for start in range(0, len(experts), size))

    def _globe_compose_and_run(
        self, parameters: Mapping[str, Tensor], experts: Sequence[int], sizes: Sequence[int], states: Tensor
    ) -> Tensor:
        gate_up, down = self.globe_matrices(parameters, experts, states)
        return self._globe_run(parameters, gate_up, down, experts, sizes, states)

    def _globe_run(
        self,
        parameters: Mapping[str, Tensor],
        gate_up_n2PD: Tensor,
        down_nPD: Tensor,
        experts: Sequence[int],
        sizes: Sequence[int],
        states: Tensor,
    ) -> Tensor:
        """As many rows of states as `sizes` (n) says for each of n pairs of matrices: (Σ sizes, D) -> (Σ sizes, D).

        `experts` are those whose sizes are not 0, in order.
        """
        ends = torch.tensor(list(itertools.accumulate(sizes)), dtype=torch.int32, device=states.device)
        hidden = grouped_mm(states, gate_up_n2PD.mT, ends)
        owners = torch.empty(0)
        if self.globe_layout.has_bias:
            counts = torch.tensor([size for size in sizes if size], device=states.device)
            owners = torch.tensor(experts, device=states.device).repeat_interleave(counts)
            hidden = hidden + parameters["gate_up_proj_bias"][owners]
        output = grouped_mm(self._apply_gate(hidden), down_nPD, ends)
        if self.globe_layout.has_bias:
            output = output + parameters["down_proj_bias"][owners]
        return self.post_expert_norm(output) if self.has_post_expert_norm else output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled, and copied, by the classes that its own is made of: that one has no name in a module."""
        return _bare_experts, type(self).__bases__, self.__getstate__()

    def train(self, mode: bool = True) -> Self:
        """Training may change the factors unseen, so it empties the cache."""
        if mode:
            self._globe_forget()
        return super().train(mode)

    def _apply(self, *arguments: Any, **settings: Any) -> Self:
        """Composed experts neither move to another device or dtype with the factors nor stay behind."""
        self._globe_forget()
        return super()._apply(*arguments, **settings)

    def _globe_forget(self) -> None:
        if self.globe_cache is not None:
            self.globe_cache.clear()

    def globe_matrices(
        self, parameters: Mapping[str, Tensor], experts: Sequence[int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """gate_up (e, 2P, D), its rows in the family's order, and down (e, P, D) of the experts."""
        layout = self.globe_layout
        index = torch.tensor(experts, device=like.device)
        matrices = self._globe_compose(parameters, index, like)
        for family in ("gate", "up"):
            if dense_parameter(family) in parameters:
                matrices[family] = parameters[dense_parameter(family)][index]
        if "gate" in matrices:
            gate_up = fuse_gate_up(matrices["gate"], matrices["up"], 1, interleaved=not layout.is_concatenated)
        else:
            dense = parameters["gate_up_proj"][index]
            gate_up = dense.mT if layout.is_transposed else dense
        if "down" in matrices:
            return gate_up, matrices["down"]
        dense = parameters["down_proj"][index]
        return gate_up, dense if layout.is_transposed else dense.mT

    def _globe_compose(self, parameters: Mapping[str, Tensor], index: Tensor, like: Tensor) -> dict[str, Tensor]:
        """The experts' matrices of every compressed family, (e, P, D) each: from one call of each bank, or decoded."""
        matrices: dict[str, Tensor] = {}
        for use in self.globe_uses:
            adapters = torch.cat([parameters[adapters_parameter(family)][index] for family in use.families])
            codes = torch.cat([parameters[codes_parameter(family)][index] for family in use.families])
            composed = use.bank(adapters, codes, adapters.dtype).to(like)
            matrices.update(zip(use.families, composed.split(len(index)), strict=True))
        for spec in self.globe_coded:
            decoded = self._globe_coded_experts(spec).decode(index).to(like)
            matrices[spec.family] = decoded if spec.family == "down" else decoded.mT
        return matrices

    def globe_is_sound(self, spec: CodedSpec) -> bool:
        """Whether the parts of a coded family fit each other, as far as they are here."""
        parameters = self._globe_parameters()
        parts = [parameter for name, parameter in parameters.items() if name.startswith(f"globe_{spec.family}_")]
        return any(part.is_meta for part in parts) or self._globe_coded_experts(spec).is_sound()

    def _globe_coded(self, family: Family) -> BankedExperts:
        return next(self._globe_coded_experts(spec) for spec in self.globe_coded if spec.family == family)

    def _globe_coded_experts(self, spec: CodedSpec) -> BankedExperts:
        num_inputs, num_outputs = sides(self.globe_layout, spec.family)
        names = spec.shapes((self.globe_layout.num_experts, num_inputs, num_outputs))
        parts = {part: self.get_parameter(coded_parameter(spec.family, part)) for part in names}
        return spec.experts(parts, num_outputs)


class GlobePresortedExperts(GlobeExperts):
    """The same for Llama 4, whose experts are handed their tokens already weighted."""

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(E·T, D) -> (E·T, D): every token once for each expert. Those not routed to it are zeros, and stay zeros."""
        routed = hidden_states.any(dim=1)
        counts = routed.view(self.globe_layout.num_experts, -1).sum(dim=1).tolist()
        outputs = self._globe_outputs(counts, hidden_states[routed])
        return hidden_states.new_zeros(hidden_states.shape).index_put((routed,), outputs.to(hidden_states.dtype))


def _hit(counts: Sequence[int]) -> list[int]:
    return [expert for expert, count in enumerate(counts) if count]


def factorise(
    module: nn.Module, layout: ExpertsLayout, uses: Sequence[BankUse], coded: Sequence[CodedSpec] = ()
) -> None:
    """Swap the dense matrices of an experts module for what is stored of them, in place.

    Everything is made empty, on the device (normally meta) of the parameters that it replaces, factors also in their
    dtype; a family that is neither in a bank nor coded stays dense.

    Args:
        module: an experts module of transformers.
        layout: what `experts_layout` says of it.
        uses: the banks that serve the layer; the layer's own ones become part of the module.
        coded: the families of the layer that are coded; with `uses` at least one.
    """
    like = next(module.parameters(recurse=False))
    E, P, D = layout.num_experts, layout.intermediate_size, layout.hidden_size
    factors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for use in uses:
        bank = BankShape(E, P, D, use.bank.rank, use.bank.num_bases)
        for family in use.families:
            factors[adapters_parameter(family)] = bank.adapters, like.dtype
            factors[codes_parameter(family)] = bank.codes, like.dtype
    for spec in coded:
        for part, (shape, dtype) in spec.shapes((E, *sides(layout, spec.family))).items():
            factors[coded_parameter(spec.family, part)] = shape, dtype
    compressed = {family for use in uses for family in use.families} | {spec.family for spec in coded}
    for half in dense_halves(compressed):
        factors[dense_parameter(half)] = (E, P, D), like.dtype
    for parameter in {DENSE_PARAMETER[family] for family in compressed}:
        delattr(module, parameter)
    for name, (shape, dtype) in factors.items():
        empty = torch.empty(shape, dtype=dtype, device=like.device)
        module.register_parameter(name, nn.Parameter(empty, requires_grad=dtype.is_floating_point))
    own = {use.own: use.bank for use in uses if use.own is not None}
    if own:
        module.add_module(BANKS, nn.ModuleDict(own))
    module.__class__ = _globe_class(type(module), GlobePresortedExperts if layout.presorted else GlobeExperts)
    swapped = cast(GlobeExperts, module)
    swapped.globe_layout = layout
    swapped.globe_coded = tuple(coded)
    swapped.globe_uses = tuple(uses)  # a shared bank is only referred to: its one owner is the base model


def _bare_experts(mixin: type[GlobeExperts], original: type[nn.Module]) -> nn.Module:
    """What a pickle's state is put into."""
    made = _globe_class(original, mixin)
    return made.__new__(made)


@functools.cache
def _globe_class(original: type[nn.Module], mixin: type[GlobeExperts]) -> type[nn.Module]:
    gate = {} if hasattr(original, "_apply_gate") else {"_apply_gate": usual_gate}
    return type(f"Globe{original.__name__}", (mixin, original), {"__module__": __name__, **gate})


def usual_gate(experts: Any, gate_up: Tensor) -> Tensor:
    """The usual gate, (T, 2P) -> (T, P), for classes that have it in their forward only."""
    gate, up = gate_up.chunk(2, dim=-1)
    return experts.act_fn(gate) * up
