"""From settings to a head: every choice that was left to us is made here, once, and can be read back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from lce_dist.config import HeadConfig, OptimConfig
from lce_dist.errors import ConfigError
from lce_dist.head import margins
from lce_dist.head.layer import Sampling, ShardedHead
from lce_dist.head.optimizer import SGD, AdamW, Rule
from lce_dist.head.rows import ClassRows, initial_rows, local_classes
from lce_dist.head.softmax import Anchor, Settings
from lce_dist.head.update import update_rows_fused
from lce_dist.world import World

_KEPT_SHARE = 0.25  # of the device's memory, for stored exponentials
_CPU_CHUNK = 1024  # 256 rows of float32 logits are 1 MiB: they and the chunk's rows stay in the cache
_CUDA_CHUNK = 32768
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_head(
    config: HeadConfig,
    optim: OptimConfig,
    num_classes: int,
    embedding_dim: int,
    seed: int,
    world: World,
    lr_of: Callable[[int], float],
    anchor: Anchor | None = None,
    weight_SD: torch.Tensor | None = None,
) -> ShardedHead:
    """A fresh head for ``num_classes``; ``weight_SD`` replaces the seeded initial rows of this shard.

    lr_of: the head's learning rate of a step. Errors: ConfigError for what this machine cannot do.
    """
    first, last = local_classes(num_classes, world)
    if weight_SD is None:
        weight_SD = initial_rows(first, last, embedding_dim, seed).to(world.device)
    rule = rule_of(config, optim)
    lazy = config.sample_rate < 1.0 and config.sample_policy == "lazy"
    rows = ClassRows.from_weight(weight_SD, rule.state_names, config.rows, config.state, lazy, num_classes, first, seed)
    sampling = Sampling(config.sample_rate, config.sample_policy, seed, lr_of) if config.sample_rate < 1.0 else None
    settings = settings_of(config, num_classes, optim.global_batch, world)
    chunk = config.chunk_classes or (_CUDA_CHUNK if world.device.type == "cuda" else _CPU_CHUNK)
    implementation: Literal["dense", "chunked"] = "dense" if config.implementation == "dense" else "chunked"
    return ShardedHead(rows, margin_of(config), rule, settings, chunk, world, anchor, sampling, implementation)


def settings_of(config: HeadConfig, num_classes: int, global_batch: int, world: World) -> Settings:
    """Formats and modes: 16-bit operands on CUDA, float32 on a CPU; exponentials are kept where they fit."""
    on_cuda = world.device.type == "cuda"
    name = config.operands
    if name == "auto":
        name = ("bf16" if config.rows == "split" else "fp16") if on_cuda else "fp32"
    settings = Settings(config.scale, config.conflict_cos, _DTYPES[name], None)
    if config.exponentials != "recompute":
        bytes_needed = kept_bytes(settings.product, num_classes, global_batch, config.sample_rate, world.size)
        if config.exponentials == "keep" or bytes_needed <= _KEPT_SHARE * _memory_bytes(world):
            settings = replace(settings, kept=settings.product)
    if config.implementation == "triton" or (config.implementation == "auto" and on_cuda and has_triton()):
        if not has_triton() or not (on_cuda or "TRITON_INTERPRET" in os.environ):
            raise ConfigError(
                "head.implementation is 'triton'; needs a CUDA device and the package triton. Use 'auto' or 'chunked'"
            )
        from lce_dist.head.kernels import exp_cosines

        settings = replace(settings, exp_cosines=exp_cosines, update_rows=update_rows_fused)
    return settings


def kept_bytes(product: torch.dtype, num_classes: int, global_batch: int, rate: float, num_ranks: int) -> int:
    """Bytes of one rank's stored exponentials in a step."""
    return int(product.itemsize * global_batch * rate * -(-num_classes // num_ranks))


def has_triton() -> bool:
    """Whether the kernels can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def rule_of(config: HeadConfig, optim: OptimConfig) -> Rule:
    """The update rule that the config names."""
    if config.optimizer == "adamw":
        return AdamW(0.9, 0.999, optim.weight_decay)
    return SGD(optim.momentum, optim.weight_decay)


def margin_of(config: HeadConfig) -> margins.Margin:
    """The margin that the config names; its keys were checked with the config."""
    rad, cos, through = config.margin_rad or 0.0, config.margin_cos or 0.0, config.straight_through
    if config.loss == "arcface":
        return margins.ArcFace(rad, straight_through=through)
    if config.loss == "cosface":
        return margins.CosFace(cos)
    if config.loss == "combined":
        return margins.Combined(config.margin_factor or 1.0, rad, cos, straight_through=through)
    if config.loss == "adaface":
        return margins.AdaFace(rad, straight_through=through)
    if config.loss == "magface":
        norms = (config.norm_lower or 0.0, config.norm_upper or 0.0)
        return margins.MagFace(
            *norms, rad, config.margin_rad_upper or 0.0, config.norm_weight or 0.0, straight_through=through
        )
    if config.loss == "curricularface":
        return margins.CurricularFace(rad, straight_through=through)
    return margins.PlainSoftmax()


def _memory_bytes(world: World) -> float:
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    ranks_here = -(-world.size // world.num_nodes)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_here
