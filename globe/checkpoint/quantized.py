"""Sources whose weights are quantised: what GloBE can read is seen as plain floating point, the rest refused by name.

Read are DeepSeek-V3's block FP8, gpt-oss' MXFP4 and compressed-tensors' symmetric int4 and int8
(pack-quantized: Kimi-K2, and what GloBE itself writes with `--format compressed-tensors`). Each
tensor is dequantised when it is read, so that memory holds one at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from globe.checkpoint.header import FLOAT_DTYPES, TensorInfo, item_bytes
from globe.checkpoint.reader import Checkpoint
from globe.errors import CheckpointError, UnsupportedModelError
from globe.typed import shown

if TYPE_CHECKING:
    from torch import Tensor

QUANT_METHOD = "globe"
"""Of checkpoints of GloBE's own."""
_READ = "block-wise fp8, mxfp4 and compressed-tensors' symmetric int4 and int8 (pack-quantized)"
_ADVICE = (
    f"only {', '.join(FLOAT_DTYPES)} weights, {_READ} are read: use the unquantised release, or dequantise it first"
)
_SECTIONS = ("quantization_config", "compression_config")  # the second: early compressed-tensors models
_LEFTOVERS = ("_scale", "_scale_inv", "_scales", "_blocks", "_zero_point", "_zeros", "_g_idx", "_packed")


@dataclasses.dataclass(frozen=True)
class Packed:
    """How one tensor lies in the files."""

    parts: tuple[str, ...]
    """The stored tensors, the one with the numbers first."""
    shape: tuple[int, ...]
    """Of what they stand for."""
    options: Mapping[str, Any]
    """Of the function that makes it of its parts."""


@dataclasses.dataclass(frozen=True)
class DequantizedCheckpoint(Checkpoint):
    """A quantised checkpoint seen as the plain one that it stands for: no quantization_config, no scales."""

    quantised: Checkpoint = dataclasses.field(kw_only=True)
    method: str = dataclasses.field(kw_only=True)
    """As config.json calls it."""
    packed: Mapping[str, Packed] = dataclasses.field(kw_only=True)
    """The tensors that are not stored as they are read, by name."""

    @property
    def stored_plainly(self) -> bool:
        """The files' bytes are not the tensors'."""
        return False

    @property
    def files(self) -> Checkpoint:
        """As the files are."""
        return self.quantised

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each in turn, dequantised one at a time.

        Raises `CheckpointError` if a tensor is not what its shape in the header said.
        """
        from globe.checkpoint.dtypes import TORCH_DTYPES  # which takes torch, and headers are read without
        from globe.checkpoint.packed import UNPACK

        infos = [self._info(name) for name in names]
        parts = {
            info.name: self.packed[info.name].parts if info.name in self.packed else (info.name,) for info in infos
        }
        stream = self.files.read_many(part for info in infos for part in parts[info.name])
        for info in infos:
            stored = [tensor for _, tensor in (next(stream) for _ in parts[info.name])]
            if info.name in self.packed:
                options = self.packed[info.name].options
                yield info.name, UNPACK[self.method](*stored, dtype=TORCH_DTYPES[info.dtype], **options)
            else:
                yield info.name, stored[0]

    def fingerprint(self) -> str:
        """That of the files."""
        return self.files.fingerprint()


def refuse_unread(checkpoint: Checkpoint) -> None:
    """Raise `UnsupportedModelError` naming the method if the checkpoint is quantised by one that is not read, or is a
    checkpoint of GloBE's own."""
    section = _section(checkpoint)
    if section is not None and (not isinstance(section, Mapping) or _method(section) not in _FINDERS):
        _refuse(checkpoint, _method(section))


def dequantized(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The checkpoint in floating point: itself, or a view of it that dequantises what is read to `dtype`.

    Raises `UnsupportedModelError` naming the method if it is not one that is read, or a checkpoint of GloBE's own.
    """
    refuse_unread(checkpoint)
    section = _section(checkpoint)
    if section is None:
        return checkpoint
    method = _method(section)
    packed = _FINDERS[method](checkpoint, section)
    owners = {recipe.parts[0]: owner for owner, recipe in packed.items()}
    consumed = {part for recipe in packed.values() for part in recipe.parts} - packed.keys()
    tensors: dict[str, TensorInfo] = {}
    for info in checkpoint.tensors.values():
        if (owner := owners.get(info.name)) is not None:
            shape = packed[owner].shape
            tensors[owner] = TensorInfo(owner, dtype, shape, info.shard, 0, math.prod(shape) * item_bytes(dtype))
        elif info.name not in consumed:
            tensors[info.name] = info
    unknown = [
        info.name
        for info in tensors.values()
        if info.name not in packed and (info.dtype.startswith("F8") or info.name.endswith(_LEFTOVERS))
    ]
    if unknown:
        raise UnsupportedModelError(
            f"{checkpoint.folder} is quantised ({method}), but {len(unknown)} tensors are not in the form that GloBE "
            f"knows of it: {', '.join(unknown[:3])}; {_ADVICE}"
        )
    held = {info.shard for info in tensors.values()}
    return DequantizedCheckpoint(
        checkpoint.folder,
        _plain_config(checkpoint.config),
        tensors,
        tuple(shard for shard in checkpoint.shards if shard in held),
        checkpoint.repo,
        checkpoint.notes,
        checkpoint.coming,
        quantised=checkpoint,
        method=method,
        packed=packed,
    )


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise `UnsupportedModelError` if config.json or the experts' dtypes say that the weights are quantised.

    A view from `dequantized` passes; a checkpoint that GloBE has compressed does not: its experts are no longer dense.
    """
    if (section := _section(checkpoint)) is not None:
        _refuse(checkpoint, _method(section))
    packed = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if ".experts." in name and tensor.dtype not in FLOAT_DTYPES
    ]
    if packed:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: {len(packed)} expert tensors are quantised, such as {packed[0].name} "
            f"({packed[0].dtype}); {_ADVICE}"
        )


def _find_fp8(checkpoint: Checkpoint, section: Mapping[str, Any]) -> dict[str, Packed]:
    block = section.get("weight_block_size")
    if not _are_sizes(block) or len(block) != 2 or section.get("activation_scheme", "dynamic") != "dynamic":
        _refuse(checkpoint, "fp8 without weight_block_size or with static activations")
    packed: dict[str, Packed] = {}
    for name, info in checkpoint.tensors.items():
        scale = checkpoint.tensors.get(f"{name}_scale_inv")
        if info.dtype == "F8_E4M3" and len(info.shape) >= 2 and scale is not None:
            *_, N, K = info.shape
            blocks = (*info.shape[:-2], -(-N // block[0]), -(-K // block[1]))
            _check_scale(scale, blocks, info, (*FLOAT_DTYPES, "F8_E8M0"))
            packed[name] = Packed((name, scale.name), info.shape, {"block": (block[0], block[1])})
    return packed


def _find_mxfp4(checkpoint: Checkpoint, _: Mapping[str, Any]) -> dict[str, Packed]:
    packed: dict[str, Packed] = {}
    for name, info in checkpoint.tensors.items():
        owner = name.removesuffix("_blocks")
        scales = checkpoint.tensors.get(f"{owner}_scales")
        is_packed = info.dtype == "U8" and len(info.shape) == 4 and info.shape[3] == 16
        if owner not in checkpoint.tensors and is_packed and scales is not None:
            E, rows, num_groups = info.shape[:-1]
            _check_scale(scales, info.shape[:-1], info, ("U8",))
            packed[owner] = Packed((name, scales.name), (E, 32 * num_groups, rows), {})
    return packed


def _find_int(checkpoint: Checkpoint, section: Mapping[str, Any]) -> dict[str, Packed]:
    groups = _objects(section.get("config_groups"))
    if not groups:
        _refuse(checkpoint, "compressed-tensors without config_groups")
    forms = {_form(checkpoint, group, group.get("format") or section.get("format")) for group in groups}
    packed: dict[str, Packed] = {}
    for name, info in checkpoint.tensors.items():
        owner = name.removesuffix("_packed")
        scale, shape = (checkpoint.tensors.get(f"{owner}_{part}") for part in ("scale", "shape"))
        is_packed = info.dtype == "I32" and len(info.shape) == 2
        if owner not in checkpoint.tensors and is_packed and scale is not None and shape is not None:
            rows, words = info.shape
            # a scale for each row may lie in one dimension; otherwise one for each run of a row's numbers
            per_row = math.prod(scale.shape[1:]) if scale.shape[:1] == (rows,) and len(scale.shape) <= 2 else 0
            fitting = [form for form in forms if _fits(form, per_row, words)]
            _check_scale(scale, scale.shape if fitting else (rows, 1), info, FLOAT_DTYPES)
            _check_scale(shape, (2,), info, ("I64", "I32"))
            if len({bits for bits, _ in fitting}) > 1:
                _refuse(checkpoint, f"compressed-tensors, the shape of {owner} fits several widths")
            bits = fitting[0][0]
            packed[owner] = Packed((name, scale.name, shape.name), (rows, 32 // bits * words), {"bits": bits})
    return packed


def _form(checkpoint: Checkpoint, group: Mapping[str, Any], form: object) -> tuple[int, int | None]:
    """Bits, and numbers under one scale, None where that is a whole row; refused if it is not one that is read."""
    (weights,) = _objects({"weights": group.get("weights") or {}}) or ({},)
    scheme = {name: weights.get(name) for name in ("num_bits", "type", "symmetric", "strategy", "actorder")}
    size = weights.get("group_size") if scheme["strategy"] == "group" else None
    if (
        form != "pack-quantized"
        or scheme["num_bits"] not in (4, 8)
        or (scheme["type"], scheme["symmetric"]) != ("int", True)
        or scheme["strategy"] not in ("group", "channel")
        or scheme["actorder"] not in (None, False, "static", "weight")
        or not (size is None or _are_sizes([size]))
    ):
        _refuse(checkpoint, f"compressed-tensors {form}, {scheme}")
    return int(scheme["num_bits"]), size


def _fits(form: tuple[int, int | None], per_row: int, words: int) -> bool:
    """Whether rows of so many words, with so many scales each, have this form."""
    bits, size = form
    columns = 32 // bits * words
    return per_row == 1 if size is None else 0 < per_row <= columns and per_row * size == columns


_FINDERS: Mapping[str, Callable[[Checkpoint, Mapping[str, Any]], dict[str, Packed]]] = {
    "fp8": _find_fp8,
    "mxfp4": _find_mxfp4,
    "compressed-tensors": _find_int,
}


def _check_scale(scale: TensorInfo, shape: tuple[int, ...], weight: TensorInfo, dtypes: Collection[str]) -> None:
    if scale.shape != shape or scale.dtype not in dtypes:
        raise CheckpointError(
            f"{scale.name} is {scale.dtype} of shape {scale.shape}; for {weight.name} of shape {weight.shape} it "
            f"should be {' or '.join(dtypes)} of shape {shape}: download the checkpoint again, or use the "
            "unquantised release"
        )


def _are_sizes(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 < size < 1 << 31 for size in value)


def _objects(section: object) -> list[Mapping[str, Any]]:
    """The objects in an object of them; whatever else is there says nothing."""
    values = section.values() if isinstance(section, Mapping) else ()
    return [value for value in values if isinstance(value, Mapping)]


def _section(checkpoint: Checkpoint) -> Any:
    """What the configuration says of quantisation, if anything."""
    sections = (part.get(key) for part in _parts(checkpoint.config) for key in _SECTIONS)
    return next((section for section in sections if section), None)


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is said of quantisation, of the whole or of a part."""
    return {
        key: _plain_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _SECTIONS
    }


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration and those of its parts: language model, vision tower, …"""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _refuse(checkpoint: Checkpoint, method: str) -> NoReturn:
    if method == QUANT_METHOD:
        raise UnsupportedModelError(
            f"{checkpoint.folder} is already compressed by GloBE: evaluate or export it, or compress its source"
        )
    raise UnsupportedModelError(f"{checkpoint.folder} is quantised ({method}, says its config.json); {_ADVICE}")


def quant_method(checkpoint: Checkpoint) -> str | None:
    """What the configuration says the weights are quantised by; None where they are plain."""
    return None if (section := _section(checkpoint)) is None else _method(section)


def _method(section: Any) -> str:
    if not isinstance(section, Mapping):
        return shown(section)
    if "quant_method" in section:
        method = section["quant_method"]
        return method if isinstance(method, str) and len(method) < 100 else shown(method)
    if any(key.startswith(("load_in_", "bnb_")) for key in section):  # written before quant_method existed
        return "bitsandbytes"
    return "by a method it does not name"
