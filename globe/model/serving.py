"""How a loaded compressed model is set up for serving."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from globe.errors import SettingsError, UnsupportedModelError
from globe.model.compose_cache import ComposeCache, LayerCache, expert_bytes, split_budget, split_whole
from globe.model.experts import GlobeExperts
from globe.model.sharing import is_linear


def set_compose_cache(model: nn.Module, num_bytes: int) -> ComposeCache:
    """Let a loaded compressed model keep up to `num_bytes` of composed experts beside its factors.

    In inference (`eval()`, gradients off) an expert that was composed is kept until it is the least recently used of
    its layer and another one needs its place. With room for all experts each is composed once, and the model is as fast
    as the dense one. Layers whose banks are linear (φ = identity) need not compose (`globe.model.sharing`): they keep
    all of their experts or none, the first layers first. Outputs change by rounding at most. What is kept is dropped
    when factors change, when the model is moved to another device or dtype, and by `train()`; it is no part of the
    state dict. Layers whose factors are offloaded keep nothing. 0 turns it off; a second call starts afresh.

    Returns the cache, which tells its hit rate and the memory it takes. Raises `SettingsError` for a negative number
    and `UnsupportedModelError` for a model that has no factorised experts, has them sharded, or was made under
    `torch.inference_mode()`.
    """
    if num_bytes < 0:
        raise SettingsError(f"the cache of composed experts cannot have {num_bytes} bytes; 0 turns it off")
    modules = [module for module in model.modules() if isinstance(module, GlobeExperts)]
    if not modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts compressed by GloBE to compose; "
            "load a folder that `globe compress` wrote"
        )
    for module in modules:
        module.globe_cache = None
    factors = {module: [*module.parameters(), *(use.bank.bases for use in module.globe_uses)] for module in modules}
    if any(isinstance(factor, DTensor) for held in factors.values() for factor in held):
        raise UnsupportedModelError("composed experts cannot be kept for a sharded model; load it on whole devices")
    if any(factor.is_inference() for held in factors.values() for factor in held):
        raise UnsupportedModelError(
            "composed experts cannot be kept for a model made under torch.inference_mode(), whose tensors do not tell "
            "when they change; load it outside, and run it inside if you like"
        )
    cached = [module for module in modules if num_bytes and not any(factor.is_meta for factor in factors[module])]
    sizes = [
        (module.globe_layout.num_experts, expert_bytes(module.globe_layout, model.dtype))  # pyright: ignore[reportArgumentType]
        for module in cached
    ]
    split = split_whole if all(is_linear(module.globe_uses) for module in cached) else split_budget
    for module, share in zip(cached, split(num_bytes, sizes), strict=True):
        module.globe_cache = LayerCache(module.globe_layout, share)
    return ComposeCache(num_bytes, tuple(module.globe_cache for module in cached if module.globe_cache is not None))
