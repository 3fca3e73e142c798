"""A family of a layer, coded: rows of few bits by feedback and a trellis, and what it takes to read them.

Orientation: X (E experts, N inputs, K outputs). A row is one input of one expert: K numbers, a path, a width, a scale.
Rows are coded as `outputs` makes them.

For all stacks of a model (one family of one layer each), with one multiplier:

    rows = outputs.apply(X)                                              of every stack
    costs = shared_or_not(row_costs(rows², importance, order), form)     of every stack
    multiplier = water_fill(all rows, budget less side information)
    expected = rehearse(rows, order, widths at the multiplier)           of every stack
    costs, multiplier                                                    once more, from what is expected
    code_experts(X, outputs, order, costs, multiplier, expected)         of every stack
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from globe.quant import packing, trellis
from globe.quant.feedback import Order, code_inputs
from globe.quant.outputs import Outputs
from globe.quant.scales import PER_OCTAVE, fit_exponents, steps
from globe.quant.side import HEADROOM, LARGEST_SCALE, OwnRows, SharedCosts, SharedRows, share_costs, share_rows
from globe.quant.threads import run_all, split
from globe.quant.water_fill import log_costs, widths_at

Form = Literal["own", "shared"]
"""Whether every row has a width and a scale of its own, or they are sums of numbers of experts and of inputs."""

MAX_EXPONENT = 120 * PER_OCTAVE
"""Of a scale, either way: its steps are then within float32."""
_LEAST_PER_THREAD = 2**13
"""Entries of an input's rows that a thread codes at least: a few milliseconds, ten times what calls take."""


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """What it takes to decode rows of n experts with N inputs."""

    offsets: Tensor
    """(n, N) int64: of their first bytes in the payload."""
    widths: Tensor
    """(n, N) uint8."""
    steps: Tensor
    """(n, N) float32."""


@dataclasses.dataclass(frozen=True)
class CodedExperts:
    """Experts (E, N, K) as they are stored."""

    payload: Tensor
    """uint8: the paths, see `packing`."""
    side: OwnRows | SharedRows
    """Widths and scales."""
    num_outputs: int
    """K."""
    outputs: Outputs
    """What was done to them."""

    @classmethod
    def cat(cls, parts: Sequence[CodedExperts]) -> CodedExperts:
        """Parts of a family, whose rows have widths and scales of their own, as one; one part as it is."""
        if len(parts) == 1:
            return parts[0]
        sides = [part.side for part in parts if isinstance(part.side, OwnRows)]
        outputs = Outputs.cat([part.outputs for part in parts])
        return cls(torch.cat([part.payload for part in parts]), OwnRows.cat(sides), parts[0].num_outputs, outputs)

    @property
    def num_bytes(self) -> int:
        """Stored, everything counted."""
        return self.payload.numel() + self.side.num_bytes + self.outputs.num_bytes

    @property
    def length(self) -> int:
        """Entries of a path: K, or more where so few cannot close."""
        return trellis.path_length(self.num_outputs)

    def is_sound(self) -> bool:
        """Whether the payload is as long as the widths say, and no width or scale is out of its range."""
        widths, exponents = self.side.widths(), self.side.exponents()
        return bool(
            int(packing.row_bytes(widths, self.length).sum()) == self.payload.numel()
            and (exponents[widths > 0].abs() < MAX_EXPONENT).all()
            and self.outputs.is_sound()
        )

    def __getitem__(self, experts: Tensor) -> CodedExperts:
        """Those with these indices (n,), by themselves."""
        ends = packing.row_bytes(self.side.widths(), self.length).sum(1).cumsum(0)
        paths = torch.tensor_split(self.payload, ends[:-1].cpu())
        payload = torch.cat([paths[int(expert)] for expert in experts])
        return CodedExperts(payload, self.side[experts], self.num_outputs, self.outputs[experts])

    def rows(self, experts: Tensor | None = None) -> PackedRows:
        """Those of the experts with these indices (n,), or of all."""
        side, kernels = self.side, trellis.compiled()
        if kernels is not None and isinstance(side, OwnRows) and side.scales.device.type == "cpu":
            if experts is None:
                experts = torch.arange(len(side.scales))
            shape = len(experts), side.scales.shape[1]
            found = PackedRows(*(torch.empty(shape, dtype=kind) for kind in (torch.int64, torch.uint8, torch.float32)))
            stored = (x.contiguous().numpy() for x in (side.packed_widths, side.scales, side.bases, experts))
            made = (x.numpy() for x in (_step_table(), found.offsets, found.widths, found.steps))
            kernels.own_rows(*stored, self.length, *made)
            return found
        offsets = packing.row_offsets(side.widths(), self.length)
        if experts is not None:
            offsets, side = offsets[experts], side[experts]
        widths = side.widths()
        return PackedRows(offsets, widths, steps(side.exponents(), widths))

    def decode(self, experts: Tensor | None = None) -> Tensor:
        """The experts with these indices (n,), or all: (n, N, K) float32; the same bits on every machine."""
        rows = self.rows(experts)
        offsets, widths, steps = rows.offsets.flatten(), rows.widths.flatten(), rows.steps.flatten()
        found = packing.decode(self.payload, offsets, widths, steps, self.length)
        return self.outputs.undo(found.view(*rows.widths.shape, self.length)[..., : self.num_outputs], experts)


@functools.cache
def _step_table() -> Tensor:
    """Steps by scale exponent, from −MAX_EXPONENT to MAX_EXPONENT, and width."""
    exponents, widths = torch.arange(-MAX_EXPONENT, MAX_EXPONENT + 1), torch.arange(trellis.MAX_WIDTH + 1)
    return steps(exponents[:, None], widths).contiguous()


def row_costs(mean_squares: Tensor, importance: Tensor, order: Order) -> Tensor:
    """Log costs (E, N) of leaving rows out: importance (E,) times price times mean square (E, N) when it is their turn.

    `mean_squares` are the rows' own to begin with and those of a rehearsal once there are widths.
    """
    return log_costs(importance[:, None] * order.prices_by_input() * mean_squares)


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What rows are expected to be when it is their turn."""

    mean_squares: Tensor
    """(E, N)."""
    exponents: Tensor
    """(E, N) int32: of the scales that suit them."""

    @classmethod
    def cat(cls, parts: Sequence[Rehearsal]) -> Rehearsal:
        """That of experts one after the other."""
        return cls(torch.cat([each.mean_squares for each in parts]), torch.cat([each.exponents for each in parts]))

    def __getitem__(self, experts: slice) -> Rehearsal:
        """That of some experts next to each other."""
        return Rehearsal(self.mean_squares[experts], self.exponents[experts])


def rehearse(rows: Tensor, order: Order, widths: Tensor, seed: int = 0) -> Rehearsal:
    """What rows (E, N, K) become when they are coded with widths (E, N) uint8.

    Feedback with the ideal quantiser's statistics in place of the trellis (the forward test channel: a row loses D of
    its energy, D(1−D) comes back as noise), for the price of the matrix products. Rows that get few bits hand on nearly
    all of what they were, which adds up where inputs are alike: without this, widths and costs are wrong by factors.
    """
    generator = torch.Generator(rows.device).manual_seed(seed)
    losses = order.sort(torch.tensor(trellis.DISTORTION, device=rows.device)[widths.long()])
    sorted_widths = order.sort(widths)
    found, exponents = torch.empty_like(losses), torch.empty_like(sorted_widths, dtype=torch.int32)

    def lose(i: int, now: Tensor) -> Tensor:
        found[:, i] = mean_squares = now.square().mean(1)
        exponents[:, i] = fit_exponents(now, sorted_widths[:, i])
        lost = losses[:, i]
        noise = torch.randn(now.shape, generator=generator, device=now.device)
        return (1 - lost)[:, None] * now + (lost * (1 - lost) * mean_squares).sqrt()[:, None] * noise

    code_inputs(order.sort(rows.float()), order, lose)
    return Rehearsal(order.unsort(found), order.unsort(exponents))


def _parts(rows: Tensor) -> list[slice]:
    """Experts that are coded by a thread each; what they become depends on none of the others."""
    E, _, K = rows.shape
    return split(E, min(torch.get_num_threads(), E * K // _LEAST_PER_THREAD) if rows.device.type == "cpu" else 1)


def shared_or_not(costs: Tensor, form: Form) -> Tensor | SharedCosts:
    """Log costs (E, N) as rows of this form will have them."""
    return share_costs(costs) if form == "shared" else costs


def code_experts(
    X: Tensor, outputs: Outputs, order: Order, costs: Tensor | SharedCosts, multiplier: int, expected: Rehearsal
) -> tuple[CodedExperts, Tensor]:
    """Code X (E, N, K), widths from log costs and multiplier; what is stored, and what it decodes to, (E, N, K).

    The rows are of their own or shared as the costs are. `expected` is of a rehearsal at about these widths.
    """
    if isinstance(costs, SharedCosts):
        return code_shared(X, outputs, order, share_rows(costs, multiplier, expected.exponents))
    return code_own(X, outputs, order, widths_at(costs, multiplier), expected)


def code_own(
    X: Tensor, outputs: Outputs, order: Order, widths: Tensor, expected: Rehearsal
) -> tuple[CodedExperts, Tensor]:
    """Code X (E, N, K) with widths (E, N) uint8 and a scale for each row; what is stored, and what it decodes to.

    What is expected of the rows says where the scales of an expert begin.
    """
    largest = torch.where(widths > 0, expected.exponents, -(2**14)).amax(1)
    bases = (largest + HEADROOM).to(torch.int16)

    def exponents(part: slice, now: Tensor, widths: Tensor, _: int) -> Tensor:
        least = bases[part].int()
        return least - (least - fit_exponents(now, widths)).clamp(0, LARGEST_SCALE)

    payload, chosen, decoded = _code(X, outputs, order, widths, exponents)
    return CodedExperts(payload, OwnRows.of(widths, chosen, bases), X.shape[2], outputs), decoded


def code_shared(X: Tensor, outputs: Outputs, order: Order, side: SharedRows) -> tuple[CodedExperts, Tensor]:
    """Code X (E, N, K) with the widths and scales of `share_rows`; what is stored, and what it decodes to."""
    sorted_exponents = order.sort(side.exponents())
    payload, _, decoded = _code(X, outputs, order, side.widths(), lambda part, _, __, i: sorted_exponents[part, i])
    return CodedExperts(payload, side, X.shape[2], outputs), decoded


_Exponents = Callable[[slice, Tensor, Tensor, int], Tensor]
"""Scale exponents (n,) of the rows (n, K) of the i-th input of a part of the experts, with widths (n,)."""


def _code(
    X: Tensor, outputs: Outputs, order: Order, widths: Tensor, exponents: _Exponents
) -> tuple[Tensor, Tensor, Tensor]:
    """Payload, scale exponents (E, N) and what is decoded (E, N, K)."""
    parts, payloads = _parts(X), dict[int, Tensor]()
    chosen, decoded = torch.empty_like(widths, dtype=torch.int32), torch.empty_like(X, dtype=torch.float32)

    def code(part: slice) -> None:
        rows, of_part = outputs[part].apply(X[part]), functools.partial(exponents, part)
        symbols, chosen[part], rows = _code_rows(rows, order[part], widths[part], of_part)
        payloads[part.start] = packing.pack(symbols, widths[part])
        decoded[part] = outputs[part].undo(rows)

    run_all([functools.partial(code, part) for part in parts])
    return torch.cat([payloads[part.start] for part in parts]), chosen, decoded


def _code_rows(
    rows: Tensor, order: Order, widths: Tensor, exponents: Callable[[Tensor, Tensor, int], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols (E, N, length), scale exponents (E, N) and decoded rows (E, N, K)."""
    E, N, K = rows.shape
    length = trellis.path_length(K)
    symbols = torch.zeros(E, N, length, dtype=torch.uint8, device=rows.device)
    chosen = torch.zeros(E, N, dtype=torch.int32, device=rows.device)
    sorted_widths = order.sort(widths)
    levels = trellis.levels(rows.device)

    def code_rows(i: int, now: Tensor) -> Tensor:
        chosen[:, i] = exponents(now, sorted_widths[:, i], i)
        step = steps(chosen[:, i], sorted_widths[:, i])[:, None]
        unit = torch.nn.functional.pad(now / step, (0, length - K))
        decoded = torch.zeros_like(now)
        for width, who in packing.rows_by_width(sorted_widths[:, i], length):
            symbols[who, i], states = trellis.encode(unit[who], width)
            decoded[who] = levels[states[:, :K]].float() * step[who]
        return decoded

    decoded = code_inputs(order.sort(rows.float()), order, code_rows)
    return order.unsort(symbols), order.unsort(chosen), order.unsort(decoded)
