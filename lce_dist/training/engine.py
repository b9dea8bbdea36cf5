"""DeepSpeed around the network: the only backward pass and the only update of its weights.

The door to deepspeed. Every scale factor between a mean and a sum lives here:

* DeepSpeed *averages* the network's gradients over ranks, while each rank differentiates the same global
  loss, so the true gradient is the *sum*: the embeddings' gradient is multiplied by the number of ranks.
* The gradients of parameters beside the network are multiplied by the number of ranks for the same reason.
* ``engine.backward`` divides by the number of accumulation steps for every tensor in the graph, the
  head's rows included: the loss is multiplied by it first.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import nn

from lce_dist.collectives import all_reduce_sum
from lce_dist.config import OptimConfig
from lce_dist.world import World

MOST_IN_A_BUCKET = 50_000_000  # values: 200 MB, enough for a link to be busy


class Engine:
    """A network under DeepSpeed, with SGD, ZeRO and precision from the config.

    beside: a module of further parameters, used outside ``embed``; a rank's gradients of them are its parts of
    the global loss's.
    ``embed`` -> loss -> ``backward`` (``accumulation`` times) -> ``step``. Stored state is keyed by
    parameter name in float32 (``tensors``), so it loads on any number of ranks and any ZeRO stage.
    """

    def __init__(self, net: nn.Module, config: OptimConfig, world: World, beside: nn.Module | None = None) -> None:
        if world.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))  # DeepSpeed insists; torchrun and Ray set it
        # DeepSpeed greets, warns about a missing compiler and prints its whole config otherwise
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        with redirect_stdout(StringIO()):
            import deepspeed
        # compiled on first use with the machine's C++ compiler, for a reduction that training never calls
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

        self.world = world
        alone = beside is None or not [*beside.parameters(), *beside.buffers()]
        self.net = net if alone or beside is None else _Together(net, beside, world.size)
        self.accumulation = config.accumulation
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and world.device.type == "cuda")
        self._zero = config.zero_stage > 0
        decayed = [p for p in self.net.parameters() if p.ndim > 1]
        plain = [p for p in self.net.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        self._engine, *_ = deepspeed.initialize(
            model=self.net.to(world.device),
            optimizer=optimizer,
            config=_settings(config, self.bf16, sum(p.numel() for p in self.net.parameters())),
            dist_init_required=False,
        )
        self._prime()

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W) -> (b, D) float32; the gradient that comes back is multiplied by the number of ranks."""
        if images.shape[0] == 0:
            raise AssertionError("embed needs at least one row on every rank")
        return _ScaleGradient.apply(self._engine(images).float(), float(self.world.size))

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch's share of the global mean loss."""
        self._engine.backward(loss * self.accumulation)

    def step(self, lr: float) -> float:
        """One update of the network after the last micro-batch; returns the gradient norm before clipping.

        Under ZeRO a gradient that is not finite updates nothing, and the norm is inf.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._zero:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        norm = torch.nn.utils.get_total_norm(p.grad for p in self.net.parameters() if p.grad is not None)
        self._engine.step()
        return float(norm)

    def micro_step_done(self) -> None:
        """Tell DeepSpeed that a micro-batch which does not end the step is over."""
        self._engine.step()

    @torch.no_grad()
    def buffers(self) -> list[torch.Tensor]:
        """Copies of this rank's buffers, for ``put_back``."""
        return [buffer.clone() for buffer in self.net.buffers()]

    @torch.no_grad()
    def put_back(self, kept: list[torch.Tensor]) -> None:
        """Make the buffers what they were when ``buffers`` copied them."""
        for buffer, value in zip(self.net.buffers(), kept, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Give every rank the mean over ranks of the batch-norm statistics.

        They differ by rank between calls; called before each checkpoint and evaluation, on every rank.
        """
        for buffer in self.net.buffers():
            if buffer.is_floating_point() and self.world.size > 1:
                mean = all_reduce_sum(buffer.double(), self.world) / self.world.size
                buffer.copy_(mean)

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights, momentum and buffers by name, whole, float32 (buffers as they are), on every rank.

        **Collectives**: with ZeRO, two all-reduces of each parameter.
        """
        state: dict[str, torch.Tensor] = {}
        for name, param in self.net.named_parameters():
            state[f"weight.{name}"] = self._get(param, None)
            state[f"momentum.{name}"] = self._get(param, "momentum_buffer")
        for name, buffer in self.net.named_buffers():
            state[f"buffer.{name}"] = buffer.detach().clone()
        return state

    @torch.no_grad()
    def load_tensors(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what ``tensors`` returned, on any number of ranks."""
        for name, param in self.net.named_parameters():
            self._set(param, state[f"weight.{name}"], None)
            self._set(param, state[f"momentum.{name}"], "momentum_buffer")
        for name, buffer in self.net.named_buffers():
            buffer.copy_(state[f"buffer.{name}"])

    def _prime(self) -> None:
        """Make the momentum buffers exist (as zeros), so that they can be read and set before any step."""
        optimizer = self._engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        saved = [(group["lr"], group["weight_decay"]) for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        inner.step()
        for group, (lr, decay) in zip(inner.param_groups, saved, strict=True):
            group["lr"], group["weight_decay"] = lr, decay
            for param in group["params"]:
                param.grad = None
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._lazy_init_hp_params_optimizer_state()

    def _get(self, param: nn.Parameter, key: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if _is_plain(param):
            value = param.data if key is None else self._engine.optimizer.state[param][key]
        else:
            value = safe_get_full_fp32_param(param) if key is None else safe_get_full_optimizer_state(param, key)
        return value.detach().float().clone()

    def _set(self, param: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(param.device)
        if _is_plain(param):
            (param.data if key is None else self._engine.optimizer.state[param][key]).copy_(value)
        elif key is None:
            safe_set_full_fp32_param(param, value)
            param.data.copy_(value)
        else:
            safe_set_full_optimizer_state(param, value, key)


class _Together(nn.Module):
    """The network, with a module whose parameters are trained beside it."""

    def __init__(self, net: nn.Module, beside: nn.Module, num_ranks: int) -> None:
        super().__init__()
        self.net = net
        self.beside = beside
        for parameter in beside.parameters():
            parameter.register_hook(lambda grad: grad * num_ranks)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.net(images)
        return value


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


def _is_plain(param: nn.Parameter) -> bool:
    return not hasattr(param, "_hp_mapping")


def _settings(config: OptimConfig, bf16: bool, num_parameters: int) -> dict[str, Any]:
    return {
        # DeepSpeed only divides by these; the true sizes of batches are ours (they may differ by one row)
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip_norm,
        # two buckets of this many values are allocated whatever the network needs: by default 4 GB
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": min(MOST_IN_A_BUCKET, num_parameters),
        },
        "zero_allow_untested_optimizer": True,
        # autocast rather than 16-bit weights: batch-norm statistics and the weights stay float32, as
        # face trainers do; for nets of 5 to 100 M parameters the copies cost nothing
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        "steps_per_print": 10**9,
    }
