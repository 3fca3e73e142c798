"""Composed experts kept between calls, within a budget of bytes: what `set_compose_cache` gives a loaded model."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from globe.model.expert_modules import ExpertsLayout


class LayerCache:
    """Composed experts of one layer, the least recently used of which makes room for a new one.

    Each layer has its own part of the budget: a model goes through its layers in turn, and with one order for all of
    them, a budget that is short of one pass would always have dropped what comes next. For the same reason an expert
    never makes room for another of the same call.
    """

    def __init__(self, layout: ExpertsLayout, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.hits = self.misses = 0
        self._layout = layout
        self.clear()

    def __reduce__(self) -> tuple[type[LayerCache], tuple[ExpertsLayout, int]]:
        """A pickle or a copy begins empty: what was composed is not carried along."""
        return LayerCache, (self._layout, self.num_bytes)

    def clear(self) -> None:
        """Forget the composed experts and free their memory."""
        self._slots: OrderedDict[int, int] = OrderedDict()
        """Where an expert is, the least recently used first."""
        self._sources: tuple[tuple[Tensor, int], ...] = ()
        empty = torch.empty(0)
        self.gate_up, self.down = empty, empty

    @property
    def num_slots(self) -> int:
        """Experts that fit; 0 before the first call."""
        return len(self.gate_up)

    @property
    def resident_bytes(self) -> int:
        """Bytes taken now."""
        return self.gate_up.nbytes + self.down.nbytes

    def refresh(self, sources: Sequence[Tensor], like: Tensor) -> bool:
        """Forget what was not composed from the factors `sources` as they are now, for states such as `like`.

        Returns whether anything can be kept: nothing of tensors of inference mode, which do not tell when they change.
        """
        if any(source.is_inference() for source in sources):
            self.clear()
            return False
        if not self._is_current(sources, like):
            self.clear()
            self._allocate(like)
            # views of the factors: as long as they are held, no other tensor can have their address
            self._sources = tuple((source.detach(), source._version) for source in sources)
        return True

    def _is_current(self, sources: Sequence[Tensor], like: Tensor) -> bool:
        if len(sources) != len(self._sources) or (self.gate_up.dtype, self.gate_up.device) != (like.dtype, like.device):
            return False
        return all(
            source.data_ptr() == seen.data_ptr() and source._version == version and source.dtype == seen.dtype
            for source, (seen, version) in zip(sources, self._sources, strict=True)
        )

    @torch.inference_mode(False)  # what is made in inference mode cannot be written to outside of it
    def _allocate(self, like: Tensor) -> None:
        layout = self._layout
        P, D = layout.intermediate_size, layout.hidden_size
        num_slots = min(layout.num_experts, self.num_bytes // expert_bytes(layout, like.dtype))
        self.gate_up, self.down = like.new_empty(num_slots, 2 * P, D), like.new_empty(num_slots, P, D)

    def look_up(self, experts: Sequence[int]) -> dict[int, int]:
        """Look up the experts of a call; returns the slots for those that are missing, as far as there is room."""
        missing = [expert for expert in experts if expert not in self._slots]
        self.hits += len(experts) - len(missing)
        self.misses += len(missing)
        for expert in experts:
            if expert in self._slots:
                self._slots.move_to_end(expert)
        if not missing:
            return {}
        if self.num_slots == self._layout.num_experts:
            return {expert: expert for expert in missing}
        free = sorted(set(range(self.num_slots)) - set(self._slots.values()))
        others = [expert for expert in self._slots if expert not in set(experts)]
        dropped = others[: max(0, len(missing) - len(free))]
        free += [self._slots.pop(expert) for expert in dropped]
        return dict(zip(missing, free, strict=False))

    def write(self, slots: dict[int, int], gate_up: Tensor, down: Tensor) -> None:
        """Keep composed experts: their matrices (e, 2P, D) and (e, P, D), in the order of `slots`."""
        index = torch.tensor(list(slots.values()), device=self.gate_up.device)
        self.gate_up.index_copy_(0, index, gate_up)
        self.down.index_copy_(0, index, down)
        self._slots.update(slots)

    def slots_of(self, experts: Sequence[int]) -> dict[int, int]:
        """Slots of those experts that are here."""
        return {expert: self._slots[expert] for expert in experts if expert in self._slots}


@dataclasses.dataclass(frozen=True)
class ComposeCache:
    """The composed experts that a model keeps, and how often they served."""

    num_bytes: int
    """The budget."""
    layers: tuple[LayerCache, ...]
    """One for each layer whose factors stay on a device; those of offloaded layers are composed in every call."""

    @property
    def resident_bytes(self) -> int:
        """Bytes that composed experts take now, beside the factors; never more than the budget."""
        return sum(layer.resident_bytes for layer in self.layers)

    @property
    def hits(self) -> int:
        """Experts that were needed by a layer's call and found composed."""
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        """Experts that were needed by a layer's call and had to be composed."""
        return sum(layer.misses for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        """Hits over all that were needed; 0 before the first call."""
        return self.hits / max(1, self.hits + self.misses)

    def reset_counts(self) -> None:
        """Count hits and misses from 0 again."""
        for layer in self.layers:
            layer.hits = layer.misses = 0


def expert_bytes(layout: ExpertsLayout, dtype: torch.dtype) -> int:
    """Bytes of a composed expert: gate, up and down."""
    return 3 * layout.intermediate_size * layout.hidden_size * dtype.itemsize


def split_budget(num_bytes: int, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Bytes for each layer, given its experts and the bytes of one: an expert each in turn while there is room."""
    shares = [0] * len(sizes)
    for round_ in range(max((num_experts for num_experts, _ in sizes), default=0)):
        for layer, (num_experts, size) in enumerate(sizes):
            if round_ < num_experts and sum(shares) + size <= num_bytes:
                shares[layer] += size
    return shares


def split_whole(num_bytes: int, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """The same, but all the experts of a layer or none, in the order of the layers."""
    shares: list[int] = []
    for num_experts, size in sizes:
        shares.append(num_experts * size if sum(shares) + num_experts * size <= num_bytes else 0)
    return shares
