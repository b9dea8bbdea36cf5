"""The plan against what a real head allocates, against numbers worked by hand, and as typed."""

import gc
import itertools
import json
import math
import multiprocessing
import os
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.cli import main
from lce_dist import planning
from lce_dist.compat.lce import OldAnchor
from lce_dist.config import Config, load_config
from lce_dist.errors import ConfigError
from lce_dist.head import build
from lce_dist.head.build import build_head, settings_of
from lce_dist.head.layer import ShardedHead
from lce_dist.models.catalog import build_net, num_parameters
from lce_dist.world import World
from tests.unit.test_config import QUICKSTART

GIB = 1 << 30
CPU = planning.cpu_machine(24.0 * GIB, 2, 1)
H200 = planning.MACHINES["h200"]
FACES = (
    "data.image_size=112",
    "old.net=iresnet18",
    "new.net=iresnet18",
    "old.embedding_dim=512",
    "new.embedding_dim=512",
)


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that operations made and that are still alive; ``peak`` is the most at one moment."""

    def __init__(self, existing=()):
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key, size):
        self._known.discard(key)
        self.live -= size


def config_of(num_rows: int, dim: int, *overrides: str) -> Config:
    sizes = [f"optim.global_batch={num_rows}", f"old.embedding_dim={dim}", f"new.embedding_dim={dim}"]
    return load_config(QUICKSTART, [*sizes, *overrides])


def one_step(head: ShardedHead, config: Config, step: int) -> None:
    rows, parts = config.optim.global_batch, config.optim.accumulation
    labels = torch.randint(head.rows.num_classes, (rows,))
    weight = torch.full((rows // parts,), 1.0 / rows)
    head.begin_step(step, labels, 0.1)
    for part in labels.chunk(parts):
        emb = torch.nn.functional.normalize(torch.randn(len(part), config.new.embedding_dim))
        head(emb.requires_grad_(), part, weight, None, only_micro_batch=parts == 1).total.backward()
    head.step()


KEEP, AGAIN = "head.exponentials=keep", "head.exponentials=recompute"
SPLIT, HALF, WIDE = "head.rows=split", "head.state=bf16", "head.chunk_classes=8192"


@pytest.mark.parametrize(
    ("num_classes", "dim", "overrides"),
    [
        (20000, 64, [KEEP]),
        (30000, 256, [KEEP]),
        (30000, 256, [AGAIN, WIDE]),
        (40000, 128, [KEEP, SPLIT]),
        (20000, 256, [AGAIN, SPLIT, HALF, WIDE]),
        (20000, 256, [AGAIN, SPLIT, "head.operands=bf16", WIDE]),
        (20000, 256, [AGAIN, "head.operands=fp16", WIDE]),
        (20000, 256, [KEEP, "head.operands=fp16", WIDE]),
        (20000, 256, [AGAIN, WIDE, "head.optimizer=adamw"]),
        (40000, 128, [KEEP, "optim.accumulation=4"]),
        (40000, 128, [AGAIN, WIDE, "optim.accumulation=4"]),
        (60000, 128, [KEEP, "head.sample_rate=0.1"]),
        (60000, 128, [AGAIN, SPLIT, HALF, "head.sample_rate=0.2", "head.chunk_classes=4096"]),
        (20000, 256, [AGAIN, WIDE, "compat.align_weight=10.0"]),
        (20000, 256, [AGAIN, WIDE, "compat.align_weight=10.0", "compat.centres=fp16"]),
    ],
)
def test_predicted_bytes_are_within_a_tenth_of_counted_ones(num_classes, dim, overrides):
    torch.manual_seed(0)
    aligned = any("align_weight" in key for key in overrides)
    config = config_of(256, dim, *overrides, *([] if aligned else ["compat.align_weight=0.0"]))
    shape = planning.head_shape(config, num_classes, CPU, 1)
    predicted = planning.head_memory(shape)

    with LiveBytes() as start:
        head = build_head(config.head, config.optim, num_classes, dim, 1, World(), lambda step: 0.1)
    assert planning.start_bytes(shape) == pytest.approx(start.peak, rel=0.1)

    at_rest = sum(tensor.untyped_storage().nbytes() for tensor in head.tensors().values())
    assert predicted["class rows"] + predicted["optimizer state of the rows"] == pytest.approx(at_rest, rel=1e-3)
    assert head.rows.bytes_per_class(dim) * num_classes == at_rest

    existing = list(head.tensors().values())
    if aligned:
        old = torch.nn.functional.normalize(torch.randn(num_classes, dim))
        old = old.half() if config.compat.centres == "fp16" else old
        head.anchor = OldAnchor(old, torch.full((num_classes,), 0.5), 10.0, 10.0, "cos")
        existing += [old, head.anchor.cos_boundary_S]
    with LiveBytes(existing) as counted:
        one_step(head, config, 0)
        one_step(head, config, 1)
    in_step = predicted["exponentials"] + predicted["one chunk"] + predicted["embeddings"]
    assert in_step == pytest.approx(counted.peak, rel=0.1)


def grown_bytes(num_classes: int, dim: int) -> int:
    """How much larger this process is with a head of that size than before; libraries are warm."""
    torch.set_num_threads(1)
    config = config_of(256, dim, KEEP, "compat.align_weight=0.0")
    process = psutil.Process(os.getpid())
    warm = build_head(config.head, config.optim, 2000, dim, 1, World(), lambda step: 0.1)
    one_step(warm, config, 0)
    gc.collect()
    before = process.memory_info().rss
    head = build_head(config.head, config.optim, num_classes, dim, 1, World(), lambda step: 0.1)
    one_step(head, config, 0)
    return process.memory_info().rss - before


def test_a_process_grows_by_what_is_predicted():
    shape = planning.head_shape(config_of(256, 256, KEEP), 100000, CPU, 1)
    predicted = planning.head_memory(shape)
    stays = sum(predicted[part] for part in ("class rows", "optimizer state of the rows", "exponentials"))
    # a process of its own: an older one has freed pages to use again
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(grown_bytes, (100000, 256)) == pytest.approx(stays, rel=0.1)


def test_the_rules_of_head_build_are_the_same_here():
    assert (planning.KEPT_SHARE, planning.CPU_CHUNK, planning.CUDA_CHUNK) == (
        build._KEPT_SHARE,
        build._CPU_CHUNK,
        build._CUDA_CHUNK,
    )
    config = config_of(256, 64)
    memory = build._memory_bytes(World())
    at_border = int(0.25 * memory / (4 * 256))
    machine = planning.cpu_machine(memory, 2, 1)
    for num_classes, keeps in ((at_border - 1, True), (at_border + 1, False)):
        kept = settings_of(config.head, num_classes, 256, World()).kept
        assert planning.head_shape(config, num_classes, machine, 1).keeps is keeps is (kept is not None)


def test_operations_and_kept_bytes_worked_by_hand():
    # 2,059,906 classes over 8 ranks: ceil = 257,489 rows a rank
    config = config_of(4096, 512)
    shape = planning.head_shape(config, 2059906, H200, 8)
    assert shape.local == 257489 and shape.keeps and shape.operand_bytes == 2
    assert planning.head_flop(shape) == 6 * 4096 * 257489 * 512
    assert planning.head_memory(shape)["exponentials"] == 2 * 4096 * 257489
    assert planning.head_memory(shape)["class rows"] == 4 * 512 * 257489 + 4 * 257489
    again = planning.head_shape(config_of(4096, 512, AGAIN), 2059906, H200, 8)
    assert planning.head_flop(again) == 8 * 4096 * 257489 * 512
    twice = planning.head_shape(config_of(4096, 512, AGAIN, "optim.accumulation=2"), 2059906, H200, 8)
    assert planning.head_flop(twice) == 10 * 4096 * 257489 * 512


def test_sampled_classes_are_the_drawn_and_the_other_positives():
    from lce_dist.head.sampling import active_classes

    config = config_of(2048, 64, "head.sample_rate=0.1")
    shape = planning.head_shape(config, 30000, CPU, 3)
    labels = torch.randint(30000, (2048,), generator=torch.Generator().manual_seed(0))
    counts = [len(active_classes(1, step, 0.1, 0, 10000, labels)[0]) for step in range(5)]
    assert shape.active == pytest.approx(sum(counts) / 5, rel=0.03)


def test_the_network_is_counted_as_it_is():
    cost = planning.net_cost("iresnet18", 512, 112)
    assert cost.num_parameters == num_parameters(build_net("iresnet18", 512, 112, 0))
    net, images = build_net("tiny8", 64, 48, 0).train(), torch.randn(8, 3, 48, 48)
    own = {tensor.data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    kept = {}

    def pack(value):
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        net(images)
    real = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert 8 * 4 * planning.net_cost("tiny8", 64, 48).saved_values == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("net", "size", "rows", "precision"),
    [("tiny16", 48, 64, "fp32"), ("mobilefacenet", 112, 8, "fp32"), ("iresnet18", 112, 16, "bf16")],
)
def test_a_network_needs_what_is_predicted(net, size, rows, precision):
    overrides = ["optim.zero_stage=0", f"optim.precision={precision}", f"data.image_size={size}"]
    config = config_of(rows, 512, *overrides)
    module, images = build_net(net, 512, size, 0).train(), torch.randn(rows, 3, size, size)
    with LiveBytes([*module.parameters(), *module.buffers(), images]) as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            vectors = module(images)
        forward = counted.live
        vectors.float().sum().backward()
    predicted = planning.net_memory(planning.net_cost(net, 512, size), config, CPU, 1)
    activations = predicted["activations of the network"] - 2 * images.numel() * 4  # the images are the stream's
    assert activations == pytest.approx(forward, rel=0.05)
    assert activations + predicted["gradients of the network"] == pytest.approx(counted.peak, rel=0.1)


def test_bytes_on_the_wire_worked_by_hand():
    # 8 ranks, B = 4096, D = 512, 16-bit forward, float32 back: 7/8 * 4096 * (512 * 6 + 16); sums: 2 * 7/8 * 4096 * 12
    config = config_of(4096, 512)
    cost = planning.NetCost(1000, 1.0, 1.0)
    wire = planning.wire_bytes(planning.head_shape(config, 100000, H200, 8), cost, config, H200)
    assert wire.embeddings == 7 / 8 * 4096 * 3088 and wire.row_sums == 86016
    assert wire.gradients == 7 / 8 * 1000 * 8  # bf16 all-reduce, float32 all-gather
    alone = planning.wire_bytes(planning.head_shape(config, 100000, H200, 1), cost, config, H200)
    assert (alone.embeddings, alone.row_sums, alone.gradients) == (0.0, 0.0, 0.0)


def test_more_of_anything_takes_no_less():
    def made(num_classes: int, *overrides: str) -> planning.Plan:
        return planning.plan(config_of(4096, 512, *FACES, *overrides), num_classes, 50 * num_classes, H200, 1, 8)

    plans = [made(size) for size in (1000000, 2059906, 10000000, 29000000)]
    assert all(a.step_s < b.step_s and a.step_bytes < b.step_bytes for a, b in itertools.pairwise(plans))
    # each identity beyond the last costs the same: the growth of memory is a line
    slope = [(b.step_bytes - a.step_bytes) / (b.num_classes - a.num_classes) for a, b in itertools.pairwise(plans)]
    assert max(slope) < 1.05 * min(slope)
    assert all(one.step_s >= one.floor_s for one in plans)


def test_a_fix_fits_and_is_named():
    config = config_of(4096, 512, *FACES, KEEP)
    made = planning.plan(config, 300000000, 10**10, H200, 1, 8)
    assert not made.fits
    found = planning.fixes(config, 300000000, 10**10, H200, 1, 8)
    assert found
    for fix in found:
        again = planning.plan(planning.with_settings(config, fix.settings), 300000000, 10**10, H200, fix.num_nodes, 8)
        assert again.fits and again.peak_bytes == fix.peak_bytes


def test_dense_is_refused():
    with pytest.raises(ConfigError, match=r"head\.implementation is 'dense'"):
        planning.head_shape(config_of(256, 64, "head.implementation=dense"), 1000, CPU, 1)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", str(QUICKSTART), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_typed_without_sizes_it_counts_the_synthetic_set(capsys):
    code, out, _ = run(capsys, "--gpu", "cpu", "--json", "--ranks-per-node", "2")
    values = json.loads(out)
    assert code == 0 and values["fits"]
    assert (values["num_classes"], values["num_images"], values["num_ranks"]) == (500, 6000, 2)
    assert values["step_s"] == pytest.approx(sum(values["time_s"].values()))
    assert values["epoch_s"] == pytest.approx(values["step_s"] * math.ceil(6000 / 96))
    assert values["bottleneck"] == max(values["time_s"], key=values["time_s"].get)


def test_typed_and_too_large_it_names_the_fix_and_exits_4(capsys):
    sets = [flag for key in FACES for flag in ("--set", key)] + ["--set", "optim.global_batch=4096", "--set", KEEP]
    code, out, err = run(
        capsys, *sets, "--classes", "100000000", "--images", "2060000000", "--ranks-per-node", "8", "--gpu", "a100"
    )
    assert code == 4 and "DOES NOT FIT" in out and "what would make it fit" in out
    assert err.count("\n") == 1 and "a rank of a100 can use" in err and "Use --" in err


def test_typed_with_several_sizes_it_is_a_table(capsys):
    code, out, _ = run(
        capsys,
        "--gpu",
        "l4",
        "--classes",
        "1000",
        "2000",
        "--images",
        "20000",
        "40000",
        "--set",
        "optim.global_batch=128",
    )
    lines = out.strip().splitlines()
    assert code == 0 and len(lines) == 4 and len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "10"], "--classes is given without --images"),
        (["--classes", "10", "20", "--images", "100"], "--classes has 2 numbers and --images 1"),
        (["--classes", "0", "--images", "10"], "--classes is 0; must be at least 1"),
        (["--gpu", "v100"], "--gpu is 'v100'; must be one of h200"),
        (["--calibrate"], "Use --gpu cpu"),
        (["--set", "data.synthetic=none", "--set", "data.shards=absent"], "absent is not packed yet"),
        (["--ranks-per-node", "7"], "must be a multiple of ranks * accumulation (7 * 1 = 7)"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1


def test_calibration_measures_rates_of_this_machine(capsys):
    code, out, _ = run(capsys, "--gpu", "cpu", "--calibrate", "--json")
    assert code == 0 and 0.0 < json.loads(out)["step_s"] < 60.0


def test_a_packed_set_is_counted(tmp_path: Path, capsys):
    packed = tmp_path / "faces"
    assert main(["data", "synth", str(packed), "--identities", "12", "--photos", "8", "--size", "64"]) == 0
    capsys.readouterr()
    sets = ["--set", "data.synthetic=none", "--set", f"data.shards={packed}", "--set", "data.heldout_identities=2"]
    code, out, _ = run(capsys, "--gpu", "cpu", "--json", *sets, "--set", "optim.global_batch=16")
    assert code == 0
    assert (json.loads(out)["num_classes"], json.loads(out)["num_images"]) == (10, 80)
