"""What a run needs before it is started: bytes per rank by part, bytes on the wire, operations and the time of a step.

Pure arithmetic on a config, a number of classes and a ``Machine``. The laws of memory follow the code of
head/ line by line and are compared with counted bytes in tests/unit/test_planning.py; times are
operations over rates that the machine is known, or said, to reach.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lce_dist.config import Config, NetConfig, parse_config
from lce_dist.errors import ConfigError
from lce_dist.models.catalog import build_net, num_parameters
from lce_dist.training.engine import MOST_IN_A_BUCKET
from lce_dist.training.plan import plan_stage

GIB = float(1 << 30)
# The same three numbers as in head/build.py, which decides with them; a test holds them equal.
KEPT_SHARE, CPU_CHUNK, CUDA_CHUNK = 0.25, 1024, 32768
# 1.0 in full, 0.1 as Partial FC recommends: what negative sampling would bring is always worked out for it.
_COMPARED_RATE = 0.1
DECODE_S = 0.5e-3  # an image, one core: decoding and augmentation (docs/performance.md, networks alone)
# head/sampling.py draws class by class where the labels are: about 20 ns on one CPU core (measured), and on a GPU
# some fifteen passes over int64 temporaries
_DRAW_S_PER_CLASS, _DRAW_BYTES_PER_CLASS = 20e-9, 240.0


@dataclass(frozen=True)
class Machine:
    """One rank's device. Rates are those that well-written code reaches, in FLOP/s and bytes/s, each way.

    net_factor: share of the matrix rate that a convolutional network reaches in training.
    reserve_bytes: context, communication buffers, library workspaces; and a twentieth is lost to fragments.
    """

    kind: str
    memory_bytes: float
    reserve_bytes: float
    matrix16_flop_per_s: float
    matrix32_flop_per_s: float
    memory_bytes_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    latency_s: float
    net_factor: float
    decode_s: float  # an image, where reading takes the cores that compute

    @property
    def usable_bytes(self) -> float:
        return 0.95 * (self.memory_bytes - self.reserve_bytes)

    @property
    def is_gpu(self) -> bool:
        return self.kind != "cpu"


# Networks: arcface_torch's table (docs/speed_benchmark.md, 8 x V100, iResNet-50, 125k identities) has 5,004 images/s,
# 625 a GPU. At 3 * 12.6 GFLOP an image that is 24 TFLOP/s, a quarter of what large products reach there
# (0.8 * 125). No newer figure of known provenance was at hand, so the same quarter is taken everywhere.
_GPU_NET_FACTOR = 0.24


def _gpu(
    kind: str, memory: float, tensor: float, fp32: float, bandwidth: float, node: float, network: float
) -> Machine:
    """From data-sheet figures (bytes, FLOP/s dense, bytes/s each way) to what is reached.

    0.80 of the tensor rate and 0.90 of the memory bandwidth, as measured on an H200 (790 of 989 TFLOP/s, 4.3 of
    4.8 TB/s); 0.8 of a link (assumed).
    """
    return Machine(
        kind,
        memory,
        3.0 * GIB,
        0.8 * tensor,
        0.8 * fp32,
        0.9 * bandwidth,
        0.8 * node,
        0.8 * network,
        30e-6,
        _GPU_NET_FACTOR,
        0.0,
    )


# Sources: NVIDIA's data sheets of each card (dense rates, without sparsity; NVLink and PCIe halved to one way).
# Between nodes: DGX H200 and H100 have a 400 Gb/s port a GPU, DGX A100 a 200 Gb/s one; L4 as eight in a node
# behind 100 Gb/s. The V100 is left out: it does not multiply bfloat16, in which gradients are formed here.
MACHINES: dict[str, Machine] = {
    "h200": replace(
        _gpu("h200", 139 * GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
        matrix16_flop_per_s=790e12,  # measured
        memory_bytes_per_s=4.3e12,  # measured
    ),
    "h100": _gpu("h100", 79 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "a100": _gpu("a100", 79 * GIB, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),
    # 72 W: clocks fall under load, so half of the rate on paper
    "l4": replace(_gpu("l4", 22 * GIB, 121e12, 30e12, 0.3e12, 32e9, 1.56e9), matrix16_flop_per_s=60e12),
}


def cpu_machine(
    memory_bytes: float,
    num_cores: int,
    ranks_per_node: int,
    core_flop_per_s: float = 60e9,
    core_bytes_per_s: float = 16e9,
    net_factor: float = 0.5,
) -> Machine:
    """A rank on one core of a CPU node that ``ranks_per_node`` ranks share; the defaults are a 2020s server core's.

    core_bytes_per_s: bytes read plus bytes written. Ranks talk over loopback or 10 Gb/s Ethernet.
    """
    share = min(1.0, num_cores / ranks_per_node)
    rate = core_flop_per_s * share
    return Machine(
        "cpu",
        memory_bytes / ranks_per_node,
        0.7 * GIB,  # Python with torch, DeepSpeed, DALI and Ray in a process
        rate,
        rate,
        core_bytes_per_s * share,
        1e9,
        1e9,
        200e-6,
        net_factor,
        DECODE_S / share,
    )


@dataclass(frozen=True)
class NetCost:
    """A network's size, and what one image costs: FLOP forward, and values kept for backward."""

    num_parameters: int
    forward_flop: float
    saved_values: float


@functools.lru_cache(maxsize=8)
def net_cost(net: str, embedding_dim: int, image_size: int) -> NetCost:
    """Counted on a forward pass without data: nothing is computed, nothing is stored."""
    module = build_net(net, embedding_dim, image_size, seed=0).to("meta").train()
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}  # by storage: what two operations keep is kept once

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage()._cdata not in own:
            kept[value.untyped_storage()._cdata] = value
        return value

    rows = 2  # batch norm wants two
    images = torch.empty(rows, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(images)
    saved_bytes = sum(value.untyped_storage().nbytes() for value in kept.values())
    return NetCost(num_parameters(module), counter.get_total_flops() / rows, saved_bytes / 4.0 / rows)


@dataclass(frozen=True)
class HeadShape:
    """The largest rank's share of the head in one step, and the formats it is computed in.

    active: classes that take part. micro_rows: rows of one gathered micro-batch. fused: Triton kernels make the
    exponentials and update the rows, so neither float32 logits nor loaded rows exist beside what is stored.
    """

    classes: int
    local: int
    active: float
    dim: int
    rows: int
    micro_batches: int
    ranks: int
    chunk: int
    operand_bytes: int
    keeps: bool
    fused: bool
    split: bool
    state_bytes: int
    num_states: int
    old_bytes: int
    sampling: str | None
    extra_logit_bytes: float
    on_gpu: bool

    @property
    def micro_rows(self) -> int:
        return -(-self.rows // self.micro_batches)

    @property
    def exp_bytes(self) -> int:
        return 2 if self.operand_bytes == 2 else 4

    @property
    def unit_operand(self) -> bool:
        """Whether 16-bit operands are unit rows made for each product."""
        return self.operand_bytes == 2 and not self.split


def head_shape(config: Config, num_classes: int, machine: Machine, ranks: int) -> HeadShape:
    """Every choice that ``head.build`` makes on such a machine. Errors: ConfigError for the dense head."""
    head, optim = config.head, config.optim
    if head.implementation == "dense":
        raise ConfigError(
            "head.implementation is 'dense'; the textbook head is for comparisons on small sizes and is not planned. "
            "Use 'auto'"
        )
    operands = head.operands
    if operands == "auto":
        operands = ("bf16" if head.rows == "split" else "fp16") if machine.is_gpu else "fp32"
    operand_bytes = 4 if operands == "fp32" else 2
    local = -(-num_classes // ranks)
    present = local * -math.expm1(optim.global_batch * math.log1p(-1.0 / num_classes)) if num_classes > 1 else 1.0
    active = head.sample_rate * local + (1.0 - head.sample_rate) * present
    kept_bytes = operand_bytes * optim.global_batch * head.sample_rate * local
    keeps = head.exponentials == "keep" or (
        head.exponentials == "auto" and kept_bytes <= KEPT_SHARE * machine.memory_bytes
    )
    extra = 14.0 if head.conflict_cos is not None else 0.0
    if head.loss == "curricularface":
        extra += 46.0
    aligned = config.compat.align_weight > 0.0
    return HeadShape(
        classes=num_classes,
        local=local,
        active=active,
        dim=config.new.embedding_dim,
        rows=optim.global_batch,
        micro_batches=optim.accumulation,
        ranks=ranks,
        chunk=min(head.chunk_classes or (CUDA_CHUNK if machine.is_gpu else CPU_CHUNK), max(1, math.ceil(active))),
        operand_bytes=operand_bytes,
        keeps=keeps,
        fused=machine.is_gpu and head.implementation in ("auto", "triton"),
        split=head.rows == "split",
        state_bytes=2 if head.state == "bf16" else 4,
        num_states=2 if head.optimizer == "adamw" else 1,
        old_bytes=(2 if config.compat.centres == "fp16" else 4) if aligned else 0,
        sampling=head.sample_policy if head.sample_rate < 1.0 else None,
        extra_logit_bytes=extra,
        on_gpu=machine.is_gpu,
    )


def head_memory(shape: HeadShape) -> dict[str, float]:
    """Bytes that one rank's head holds all the time, and at its worst moment within a step, by part.

    The last three are of the step alone. Laws: head/rows.py (``bytes_per_class``), head/softmax.py, head/layer.py.
    """
    values = float(shape.local) * shape.dim
    return {
        "class rows": 4.0 * values + (8.0 if shape.sampling == "lazy" else 4.0) * shape.local,
        "optimizer state of the rows": float(shape.state_bytes * shape.num_states) * values,
        "exponentials": shape.exp_bytes * float(shape.rows) * shape.active if shape.keeps else 0.0,
        "one chunk": _chunk_bytes(shape),
        "embeddings": _embedding_bytes(shape),
    }


def _chunk_bytes(shape: HeadShape) -> float:
    """Stored exponentials of a chunk where they are not kept, and the largest temporaries beside them."""
    cells, values = float(shape.micro_rows) * shape.chunk, float(shape.chunk) * shape.dim
    own = 0.0 if shape.keeps else shape.exp_bytes * cells * shape.micro_batches
    forward = 0.0
    if not shape.fused:
        forward += 4.0 * cells if shape.operand_bytes == 2 else 0.0
        if shape.extra_logit_bytes:
            forward += (1.0 if shape.extra_logit_bytes < 20.0 else 13.0) * cells
    if shape.unit_operand:
        forward += 6.0 * values
    elif shape.split and shape.operand_bytes == 4:
        forward += 16.0 * values
    elif not shape.on_gpu and shape.operand_bytes == 2:
        forward += 4.0 * values  # widened before they are multiplied
    # the update: a product for each micro-batch and their sum, what the formats are loaded into, and the
    # largest passing temporary, which is that of storing
    products = shape.micro_batches + (1.0 if shape.micro_batches > 1 else 0.0)
    sampled = shape.sampling is not None
    loads = 1.0 if shape.split or sampled else 0.0
    loads += shape.num_states * (1.0 if shape.state_bytes == 2 or sampled else 0.0)
    loads += 1.0 if shape.old_bytes == 2 or (shape.old_bytes and sampled) else 0.0
    passing = max(8.0 if shape.num_states == 2 else 4.0, _STORE_SPLIT if shape.split else 0.0)
    if shape.state_bytes == 2:
        passing = max(passing, _STORE_HALF)
    if shape.fused:  # the kernel changes the tables where they lie
        loads, passing = (1.0 if shape.old_bytes and sampled else 0.0), 0.0
    term = 8.0 * shape.micro_rows * shape.dim  # of the embeddings' gradient, as it is summed
    return own + max(forward, (4.0 * (products + loads) + passing) * values, term)


def _embedding_bytes(shape: HeadShape) -> float:
    # of every micro-batch: unit vectors, their 16-bit form, the same scaled, and the targets' rows; of one: a gradient
    kept = 4.0 + (2.0 if shape.operand_bytes == 2 else 0.0) + shape.exp_bytes + 4.0 / shape.ranks
    return shape.dim * (kept * shape.rows + 4.0 * shape.micro_rows)


def start_bytes(shape: HeadShape) -> float:
    """Bytes of rows and state while they are made: float32 rows and, beside them, their stored formats."""
    values = float(shape.local) * shape.dim
    stored = (4.0 if shape.split else 0.0) + shape.state_bytes * shape.num_states
    block = _STORE_SPLIT * min(shape.local, 65536) * shape.dim if shape.split else 0.0
    return values * (4.0 + stored) + (8.0 if shape.sampling == "lazy" else 4.0) * shape.local + block


def head_flop(shape: HeadShape) -> float:
    """Operations of one rank's matrix products in a step.

    6 a row, class and dimension with kept exponentials; 8 without; 10 without and with accumulation, where the
    rows cannot be updated during backward.
    """
    factor = 6.0 if shape.keeps else 8.0 if shape.micro_batches == 1 else 10.0
    return factor * shape.rows * shape.active * shape.dim


def head_traffic(shape: HeadShape) -> tuple[float, float, float]:
    """Bytes a step: of the products' own operands, of passes over logits, of passes over rows and state.

    Passes are counted operation by operation in head/chunked.py, head/layer.py, head/optimizer.py and
    head/tables.py; the sums agree with counted bytes of a CPU run to a few per cent.
    """
    logits, values = float(shape.rows) * shape.active, shape.active * shape.dim
    again = 1 if shape.keeps else 2 if shape.micro_batches == 1 else 3  # how often exponentials are made
    reads = shape.micro_batches * (again + 1)  # how often the rows are an operand
    operands = (again + 2) * shape.exp_bytes * logits + reads * shape.operand_bytes * values

    each = shape.extra_logit_bytes
    if shape.operand_bytes == 4:
        each += 36.0  # two column factors, scale, exp: read and write; a sum: read
    else:
        each += 26.0 + (16.0 if shape.split else 0.0)  # scale, exp, sum, rounding; split rows have column factors
    passes = 0.0 if shape.fused else again * each * logits

    load, store = (32.0, 60.0) if shape.split else (0.0, 0.0)
    if shape.fused:  # the product written and read; rows and state read and written once; old centres read
        update = 16.0 + 2.0 * shape.state_bytes * shape.num_states + shape.old_bytes
    else:
        update = 68.0  # the product written; the part along the row, momentum, gradient, decay, step, length
        update += 2.0 * load + store + (80.0 if shape.num_states == 2 else 0.0)
        if shape.state_bytes == 2:
            update += 282.0 * shape.num_states  # loading 6, the noise 220, rounding with it 56
        if shape.old_bytes:
            update += 28.0 + (8.0 if shape.old_bytes == 2 else 0.0)
    if shape.operand_bytes == 4:
        update += reads * load
    elif not shape.split:
        update += reads * 14.0  # unit rows, rounded
    if shape.sampling is not None:
        update += 8.0 * (reads + (0.0 if shape.fused else 3.0 + 2.0 * shape.num_states))  # copied out and back
        if shape.sampling == "lazy":
            update += 92.0 + load + store + (282.0 if shape.state_bytes == 2 else 0.0)
    idle = shape.local - shape.active if shape.sampling == "dense" else 0.0
    return operands, passes, update * values + 60.0 * idle * shape.dim


# Bytes a value at the worst moment of storing a chunk: split halves, and bfloat16 with its noise.
_STORE_SPLIT, _STORE_HALF = 12.0, 24.0


def net_memory(cost: NetCost, config: Config, machine: Machine, ranks: int) -> dict[str, float]:
    """Bytes of the trained network on one rank: what it always holds, activations, what backward adds.

    ZeRO 1 and 2 divide momentum and a float32 copy of the weights, but allocate their gradient buckets whole,
    twice under autocast (counted in DeepSpeed 0.19.8). A CPU hands out only pages that are used.
    """
    stage, size = config.optim.zero_stage, 4.0 * cost.num_parameters
    bf16 = _autocast(config, machine)
    rows = -(-config.optim.global_batch // (ranks * config.optim.accumulation))
    image = 3.0 * config.data.image_size**2 * 4.0
    buckets = 0.0
    if stage:
        buckets = (2.0 if bf16 else 1.0) * min(size, 4.0 * MOST_IN_A_BUCKET) if machine.is_gpu else size
    return {
        "network and momentum": 2.0 * size if stage == 0 else size + 2.0 * size / ranks,
        # autocast keeps a 16-bit copy of the weights until backward has used it
        "activations of the network": rows * (cost.saved_values * (2.0 if bf16 else 4.0) + 2.0 * image)
        + (2.0 * cost.num_parameters if bf16 else 0.0),
        "gradients of the network": buckets + (size / ranks if stage == 2 else size),
    }


def _autocast(config: Config, machine: Machine) -> bool:
    precision = config.optim.precision
    return precision == "bf16" or (precision == "auto" and machine.is_gpu)


@dataclass(frozen=True)
class Wire:
    """Bytes that each rank receives in a step, by purpose, and how many collectives carry them."""

    embeddings: float
    row_sums: float
    gradients: float
    num_collectives: int


def wire_bytes(shape: HeadShape, cost: NetCost, config: Config, machine: Machine) -> Wire:
    """All-gathers and reduce-scatters move (W-1)/W of their result once, all-reduces twice."""
    ranks, rows, parts = shape.ranks, float(shape.rows), shape.micro_batches
    if ranks == 1:
        return Wire(0.0, 0.0, 0.0, 0)
    once = (ranks - 1) / ranks
    forward = 2.0 if shape.operand_bytes == 2 else 4.0
    norms = 4.0 if config.head.loss in ("adaface", "magface") else 0.0
    embeddings = once * rows * ((forward + 4.0) * shape.dim + norms + 16.0)  # 16: labels and sample ids
    hard = 4.0 if config.head.loss == "curricularface" else 0.0
    row_sums = 2.0 * once * rows * (12.0 + hard)
    stage = config.optim.zero_stage
    gradient = 2.0 if stage and _autocast(config, machine) else 4.0
    gradients = once * cost.num_parameters * (2.0 * gradient + (4.0 if stage else 0.0))
    return Wire(embeddings, row_sums, gradients, 3 * parts + 2 + 4)


@dataclass(frozen=True)
class Plan:
    """What one step of the new model's training takes on the busiest rank.

    memory_bytes by part; ``step_bytes`` adds what is alive at one moment. time_s by part; their sum is a step.
    floor_s: the network's operations and 6 a logit and dimension, at full rates and nothing else.
    """

    machine: str
    num_nodes: int
    num_ranks: int
    num_classes: int
    num_images: int
    global_batch: int
    sample_rate: float
    exponentials: str
    memory_bytes: dict[str, float]
    start_bytes: float
    step_bytes: float
    usable_bytes: float
    wire_bytes: dict[str, float]
    head_flop: float
    net_flop: float
    time_s: dict[str, float]
    floor_s: float
    steps_per_epoch: int
    num_epochs: float

    @property
    def peak_bytes(self) -> float:
        return max(self.start_bytes, self.step_bytes)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    @property
    def step_s(self) -> float:
        return sum(self.time_s.values())

    @property
    def epoch_s(self) -> float:
        return self.step_s * self.steps_per_epoch

    @property
    def images_per_s(self) -> float:
        return self.global_batch / self.step_s

    @property
    def bottleneck(self) -> str:
        return max(self.time_s, key=lambda part: self.time_s[part])


# Alive all the time; the other parts belong to one half of the step.
_ALWAYS = (
    "class rows", "optimizer state of the rows", "exponentials", "old centres and boundaries", "network and momentum",
    "old network",
)  # fmt: skip


def trained_new(config: Config) -> NetConfig:
    """The new network. Errors: ConfigError where the config brings another one in a file."""
    section = config.new.trained
    if section is None:
        raise ConfigError(
            f"new.weights is {config.new.weights}, which brings its own network, and new.net is not set; what is trained is "
            "planned. Set new.net"
        )
    return section


def plan(
    config: Config, num_classes: int, num_images: int, machine: Machine, num_nodes: int, ranks_per_node: int
) -> Plan:
    """The new model's training on ``num_nodes`` nodes, as the code in this repository does it.

    Errors: ConfigError where the batch does not divide, as training itself would say.
    """
    ranks = num_nodes * ranks_per_node
    stage = plan_stage(config, num_images, num_classes, config.new.epochs, ranks)
    section = trained_new(config)
    new = net_cost(section.net, section.embedding_dim, config.data.image_size)
    # an old model that brings its own network counts as the new one's
    old = net_cost(config.old.net or section.net, config.old.embedding_dim, config.data.image_size)
    shape = head_shape(config, num_classes, machine, ranks)
    head, net = head_memory(shape), net_memory(new, config, machine, ranks)
    # boundaries, and how many images each class has
    centres = (4.0 if config.compat.centres == "fp32" else 2.0) * float(shape.local) * shape.dim + 12.0 * shape.local
    memory = {
        **head,
        "old centres and boundaries": centres,
        **net,
        "old network": 4.0 * old.num_parameters,
    }
    always = sum(memory[part] for part in _ALWAYS)
    # the head works while the network's activations are whole; the network's gradients come when the head is done,
    # the largest of them (of the last layers) before many activations have gone
    step_bytes = always + memory["embeddings"] + memory["activations of the network"]
    step_bytes += max(memory["one chunk"], memory["gradients of the network"])

    wire = wire_bytes(shape, new, config, machine)
    net_flop = 3.0 * new.forward_flop * config.optim.global_batch / ranks
    return Plan(
        machine.kind,
        num_nodes,
        ranks,
        num_classes,
        num_images,
        config.optim.global_batch,
        config.head.sample_rate,
        "kept" if shape.keeps else "recomputed",
        memory,
        start_bytes(shape) + centres + memory["old network"] + 4.0 * new.num_parameters,
        step_bytes,
        machine.usable_bytes,
        {"embeddings": wire.embeddings, "row sums": wire.row_sums, "gradients of the network": wire.gradients},
        head_flop(shape),
        net_flop,
        _times(shape, new, config, machine, num_nodes, wire),
        net_flop / _net_rate(config, machine)
        + 6.0 * shape.rows * shape.active * shape.dim / _matrix_rate(shape, machine),
        stage.steps_per_epoch,
        config.new.epochs,
    )


def _matrix_rate(shape: HeadShape, machine: Machine) -> float:
    return machine.matrix16_flop_per_s if shape.operand_bytes == 2 else machine.matrix32_flop_per_s


def _net_rate(config: Config, machine: Machine) -> float:
    rate = machine.matrix16_flop_per_s if _autocast(config, machine) else machine.matrix32_flop_per_s
    return machine.net_factor * rate


def _drawing_s(shape: HeadShape, machine: Machine) -> float:
    if machine.is_gpu:
        return _DRAW_BYTES_PER_CLASS * shape.local / machine.memory_bytes_per_s
    return _DRAW_S_PER_CLASS * shape.local


def _times(
    shape: HeadShape, cost: NetCost, config: Config, machine: Machine, num_nodes: int, wire: Wire
) -> dict[str, float]:
    images = config.optim.global_batch / shape.ranks
    moved = images * cost.saved_values * (2.0 if _autocast(config, machine) else 4.0)
    # an activation is written, read forward and backward; its gradient is written and read
    net_s = max(3.0 * cost.forward_flop * images / _net_rate(config, machine), 5.0 * moved / machine.memory_bytes_per_s)
    operands, passes, rows = head_traffic(shape)
    bandwidth = machine.memory_bytes_per_s
    if not machine.is_gpu:
        # a chunk and its temporaries stay in the processor's cache; kept exponentials and the tables do not
        kept = 3.0 * shape.exp_bytes * shape.rows * shape.active if shape.keeps else 0.0
        operands, passes = kept, passes / _CACHE_SPEED
        rows = rows / _CACHE_SPEED + 24.0 * shape.active * shape.dim
    times = {
        "network": net_s,
        "head: matrix products": max(head_flop(shape) / _matrix_rate(shape, machine), operands / bandwidth),
        "head: passes over logits": passes / bandwidth,
        "head: update of the rows": rows / bandwidth,
        "head: drawing classes": _drawing_s(shape, machine) if shape.sampling else 0.0,
        "network: update": 24.0 * cost.num_parameters / bandwidth,
        "reading on the same cores": machine.decode_s * images,
    }
    link = _seconds_on_links(machine, shape.ranks, num_nodes)
    latency_s = machine.latency_s * wire.num_collectives * math.log2(max(2, shape.ranks)) if shape.ranks > 1 else 0.0
    times["links: embeddings and sums"] = link * (wire.embeddings + wire.row_sums) + latency_s
    times["links: gradients of the network"] = link * wire.gradients
    return times


# A pass over data in a core's cache moves bytes about twice as fast as one over memory once exp and integer
# arithmetic are counted in (plain multiplication: five times; measured).
_CACHE_SPEED = 2.0


def _seconds_on_links(machine: Machine, ranks: int, num_nodes: int) -> float:
    """Seconds a received byte takes: the slower of the links in a node and those between nodes.

    All but 1/W of a result comes from other ranks, all but 1/nodes of it from other nodes, through the ports of
    all of a node's ranks together.
    """
    if ranks == 1:
        return 0.0
    per_node = ranks // num_nodes
    within = 1.0 / machine.node_bytes_per_s if per_node > 1 else 0.0
    if num_nodes == 1:
        return within
    between = (num_nodes - 1) / num_nodes / ((ranks - 1) / ranks) / (machine.network_bytes_per_s * per_node)
    return max(within, between)


@dataclass(frozen=True)
class SamplingGain:
    """The same plan with all classes and with a tenth of the negatives."""

    full: Plan
    sampled: Plan

    @property
    def speed_up(self) -> float:
        return self.full.step_s / self.sampled.step_s


def sampling_gain(
    config: Config, num_classes: int, num_images: int, machine: Machine, num_nodes: int, ranks_per_node: int
) -> SamplingGain:
    """What negative sampling at rate 0.1 changes."""
    sampled = {"head.sample_rate": min(_COMPARED_RATE, config.head.sample_rate)}
    full, less = (
        plan(with_settings(config, settings), num_classes, num_images, machine, num_nodes, ranks_per_node)
        for settings in ({"head.sample_rate": 1.0}, sampled)
    )
    return SamplingGain(full, less)


@dataclass(frozen=True)
class Fix:
    """Settings (or a number of nodes) that make a plan fit, and the peak bytes it then has."""

    settings: dict[str, Any]
    num_nodes: int
    peak_bytes: float
    step_s: float


def fixes(
    config: Config, num_classes: int, num_images: int, machine: Machine, num_nodes: int, ranks_per_node: int
) -> list[Fix]:
    """What would make it fit: each single setting that is enough, else all together; and the fewest nodes.

    Empty when neither settings nor 4,096 nodes are enough.
    """

    def tried(settings: dict[str, Any], nodes: int) -> Plan | None:
        try:
            return plan(with_settings(config, settings), num_classes, num_images, machine, nodes, ranks_per_node)
        except ConfigError:  # a batch that does not divide
            return None

    found: list[Fix] = []
    together: dict[str, Any] = {}
    whole: Plan | None = None
    for settings in _savings(config):
        if (alone := tried(settings, num_nodes)) is None:
            continue
        if alone.fits:
            found.append(_fix(settings, alone))
        together |= settings
        if whole is None or not whole.fits:
            whole = tried(together, num_nodes)
            enough = dict(together)
    if not found and whole is not None and whole.fits:
        found.append(_fix(enough, whole))
    while (num_nodes := num_nodes * 2) <= 4096:
        wider = tried({}, num_nodes)
        if wider is not None and wider.fits:
            return [*found, _fix({}, wider)]
    return found


def _fix(settings: dict[str, Any], made: Plan) -> Fix:
    return Fix(settings, made.num_nodes, made.peak_bytes, made.step_s)


def _savings(config: Config) -> Iterator[dict[str, Any]]:
    """Settings that save memory, those that cost least first; the last one changes what is trained."""
    head, optim = config.head, config.optim
    if head.exponentials != "recompute":
        yield {"head.exponentials": "recompute"}
    for parts in (2, 4, 8):
        if parts > optim.accumulation:
            yield {"optim.accumulation": parts}
    if head.state == "fp32":
        yield {"head.state": "bf16"}
    if optim.zero_stage == 0:
        yield {"optim.zero_stage": 1}
    if head.chunk_classes is None or head.chunk_classes > 8192:
        yield {"head.chunk_classes": 8192}
    if head.optimizer == "adamw":
        yield {"head.optimizer": "sgd"}
    if head.sample_rate > _COMPARED_RATE:
        yield {"head.sample_rate": _COMPARED_RATE}


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """``config`` with some settings, named like ``--set`` names them, replaced; checked again."""
    values = json.loads(config.model_dump_json(exclude_none=True))
    for key, value in settings.items():
        section, name = key.split(".")
        values[section][name] = value
    return parse_config(values, "plan", json_mode=True)
