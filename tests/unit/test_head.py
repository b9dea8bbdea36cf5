"""The head in one process: float32 and 16-bit accuracy, memory, awkward inputs, and what the settings choose."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lce_dist.config import HeadConfig, OptimConfig
from lce_dist.errors import ConfigError
from lce_dist.head.build import build_head, margin_of, settings_of
from lce_dist.head.dense import dense_margin_softmax
from lce_dist.head.rows import initial_rows
from lce_dist.world import World

MARGINS = {
    "arcface": {"loss": "arcface", "margin_rad": 0.5},
    "cosface": {"loss": "cosface", "margin_cos": 0.35},
    "softmax": {"loss": "softmax"},
    "combined": {"loss": "combined", "margin_factor": 1.1, "margin_rad": 0.3, "margin_cos": 0.1},
    "curricularface": {"loss": "curricularface", "margin_rad": 0.5},
}
ONE_STEP = OptimConfig(weight_decay=0.0, momentum=0.0)  # with a learning rate of 1, a step is the gradient


def head_of(keys, weight, kept=None, operand=None):
    config = HeadConfig.model_validate({"scale": 64.0, "chunk_classes": 999} | keys)
    head = build_head(config, ONE_STEP, *weight.shape, 0, World(), lambda step: 1.0, None, weight.clone())
    operand = operand or weight.dtype
    head.settings = replace(head.settings, operand=operand, kept=kept)
    return head


def ours(keys, emb, weight, labels, kept=None, operand=None):
    """Loss, gradient of raw embeddings, gradient of rows; float64 copies."""
    head = head_of(keys, weight, kept, operand)
    emb = emb.clone().requires_grad_()
    head.begin_step(0, labels, 1.0)
    row_weight = torch.full((len(labels),), 1.0 / len(labels), dtype=emb.dtype)
    terms = head(F.normalize(emb), labels, row_weight, only_micro_batch=True)
    terms.total.backward()
    before = weight.clone()
    head.step()
    return terms.total.detach().double(), emb.grad.double(), (before - head.rows.weight.load(slice(None))).double()


def textbook(keys, emb, weight, labels):
    config = HeadConfig.model_validate({"scale": 64.0} | keys)
    emb, weight = emb.clone().requires_grad_(), weight.clone().requires_grad_()
    row_weight = torch.full((len(labels),), 1.0 / len(labels), dtype=emb.dtype)
    margin = margin_of(config)
    loss = dense_margin_softmax(emb, weight, labels, row_weight, None, margin, config.scale, None, World())
    loss.backward()
    return loss.detach().double(), emb.grad.double(), weight.grad.double()


def problem(classes=5000, dim=32, rows=64):
    torch.manual_seed(0)
    emb, weight, labels = torch.randn(rows, dim), initial_rows(0, classes, dim, 3), torch.randint(classes, (rows,))
    emb[:8] = weight[labels[:8]] * 50 + 0.01 * torch.randn(8, dim)  # nearly solved rows
    return emb, weight, labels


@pytest.mark.parametrize("kept", [None, torch.float32])
@pytest.mark.parametrize("name", MARGINS)
def test_float32_is_as_close_to_the_truth_as_dense_float32(name, kept):
    emb, weight, labels = problem()
    truth = textbook(MARGINS[name], emb.double(), weight.double(), labels)
    naive = textbook(MARGINS[name], emb, weight, labels)
    found = ours(MARGINS[name], emb, weight, labels, kept)
    for t, n, o in zip(truth, naive, found, strict=True):
        assert (o - t).abs().max() <= 2 * (n - t).abs().max() + 2e-6 * t.abs().max()
    positives = torch.zeros(len(weight), dtype=torch.bool).index_fill(0, labels, True)
    for part in (positives, ~positives):  # a norm over all rows would hide the loss of the second
        error = (found[2] - truth[2])[part].norm() / truth[2][part].norm()
        assert error < 1e-5


@pytest.mark.parametrize("rows_format", ["fp32", "split"])
@pytest.mark.parametrize("operand", [torch.float16, torch.bfloat16])
def test_16_bit_operands_are_no_worse_than_the_naive_16_bit_form(operand, rows_format):
    emb, weight, labels = problem(3000, 64)
    keys = {"loss": "cosface", "margin_cos": 0.4, "rows": rows_format}
    if rows_format == "split" and operand == torch.float16:
        pytest.skip("split rows are multiplied as bfloat16")
    truth = textbook(keys, emb.double(), weight.double(), labels)
    naive = naive_16_bit(emb, weight, labels, operand)
    for kept in (None, torch.bfloat16):
        found = ours(keys, emb, weight, labels, kept, operand)
        for t, n, o in zip(truth, naive, found, strict=True):
            assert (o - t).norm() <= 1.1 * (n - t).norm()


def naive_16_bit(emb, weight, labels, dtype):
    """CosFace 0.4, s = 64: operands, logits and the logits' gradient in 16 bits, the softmax in float32."""
    emb, weight = emb.clone().requires_grad_(), weight.clone().requires_grad_()
    e, w = F.normalize(emb), F.normalize(weight)
    e16, w16 = e.detach().to(dtype), w.detach().to(dtype)
    cos = (e16.float() @ w16.float().T).to(dtype).float().requires_grad_()
    margins = 0.4 * F.one_hot(labels, len(weight))
    loss = F.cross_entropy(64.0 * (cos - margins), labels)
    (grad,) = torch.autograd.grad(loss, cos)
    grad16 = grad.to(torch.bfloat16).float()
    torch.autograd.backward([e, w], [grad16 @ w16.float(), grad16.T @ e16.float()])
    return loss.detach().double(), emb.grad.double(), weight.grad.double()


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("cos", [-1.0, 1.0])
@pytest.mark.parametrize("scale", [16.0, 64.0, 80.0])
@pytest.mark.parametrize("operand", [torch.float32, torch.float16, torch.bfloat16])
def test_no_nan_at_the_poles_and_for_equal_rows(name, cos, scale, operand):
    direction = F.normalize(torch.arange(1.0, 9.0), dim=0)
    weight = torch.stack([direction, direction, -direction])
    emb = (cos * direction).repeat(3, 1)
    keys = MARGINS[name] | {"scale": scale, "chunk_classes": 2}
    kept = torch.bfloat16 if operand.itemsize == 2 else None
    for value in ours(keys, emb, weight, torch.tensor([0, 1, 2]), kept, operand):
        assert torch.isfinite(value).all()


def test_every_logit_at_the_lowest_end_still_counts():
    # s = 64 and all cosines -1: nothing may be flushed to zero. The loss is ln 3 without a margin.
    weight = torch.eye(4)[:1].repeat(3, 1)
    loss, _, _ = ours({"loss": "softmax"}, -torch.eye(4)[:1], weight, torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(3.0), rel=1e-6)


def test_two_classes_worked_by_hand():
    # cos to class 0 is 0.6, to class 1 is 0.8; CosFace, m = 0.1, s = 10: z = (5, 8), loss = log(1 + e^3)
    emb, weight = torch.tensor([[0.6, 0.8]]), torch.eye(2) * 3
    keys = {"loss": "cosface", "margin_cos": 0.1, "scale": 10.0, "chunk_classes": 1}
    loss, _, grad_weight = ours(keys, emb, weight, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(3.0)), rel=1e-6)
    # d loss / d cos_1 = 10 p_1; the row's tangent is (0.6, 0), its length 3
    p1 = math.exp(3.0) / (1 + math.exp(3.0))
    assert grad_weight[1].tolist() == pytest.approx([10 * p1 * 0.6 / 3, 0.0], rel=1e-5, abs=1e-6)


def test_split_rows_train_bit_for_bit_like_float32_rows():
    emb, weight, labels = problem(500, 16)
    heads = [head_of(MARGINS["arcface"] | {"rows": form}, weight) for form in ("fp32", "split")]
    for step in range(5):
        for head in heads:
            head.begin_step(step, labels, 0.1)
            local = emb.roll(step, 1).requires_grad_()
            head(F.normalize(local), labels, torch.full((64,), 1 / 64)).total.backward()
            head.step()
    plain, split = (head.rows.weight.load(slice(None)) for head in heads)
    assert torch.equal(plain, split) and not torch.equal(plain, weight)
    upper = heads[1].rows.weight.upper_SD
    assert torch.equal(upper, plain.to(torch.bfloat16))


def test_bf16_momentum_follows_float32_without_drift():
    emb, weight, labels = problem(500, 16)
    ends = []
    for state in ("fp32", "bf16"):
        config = HeadConfig(loss="cosface", margin_cos=0.2, scale=16.0, state=state)
        head = build_head(config, OptimConfig(), 500, 16, 0, World(), lambda step: 0.1, None, weight.clone())
        for step in range(60):
            head.begin_step(step, labels, 0.1)
            head(F.normalize(emb.roll(step, 1)).requires_grad_(), labels, torch.full((64,), 1 / 64)).total.backward()
            head.step()
        ends.append(head.rows.weight.load(slice(None)))
    moved = (ends[0] - weight).norm()
    assert (ends[1] - ends[0]).norm() < 0.02 * moved


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once in tensors made under this mode."""

    def __init__(self, inputs):
        super().__init__()
        self.alive, self.peak, self.seen = 0, 0, set()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.seen and storage._cdata not in self.inputs:
                    self.seen.add(storage._cdata)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key, size):
        if key in self.seen:
            self.seen.discard(key)
            self.alive -= size


def step_peak(classes, batch, kept, operand=torch.float32, keys=None):
    dim = 32
    emb, labels = F.normalize(torch.randn(batch, dim)).requires_grad_(), torch.randint(classes, (batch,))
    weight = initial_rows(0, classes, dim, 1)
    head = head_of({"loss": "cosface", "margin_cos": 0.3, "chunk_classes": 256} | (keys or {}), weight, kept, operand)
    with PeakBytes([*head.rows.tensors().values(), emb, labels]) as peak:
        head.begin_step(0, labels, 0.1)
        head(emb, labels, torch.full((batch,), 1 / batch), only_micro_batch=True).total.backward()
        head.step()
    return peak.peak


@pytest.mark.parametrize(
    ("kept", "operand", "bytes_per_logit"),
    [(None, torch.float32, 0.0), (torch.float32, torch.float32, 4.0), (torch.bfloat16, torch.float16, 2.0)],
)
def test_memory_above_rows_and_state_follows_its_law(kept, operand, bytes_per_logit):
    batch, sizes = 64, (2048, 4096, 8192)
    peaks = [step_peak(classes, batch, kept, operand) for classes in sizes]
    slopes = [(b - a) / (batch * (hi - lo)) for a, b, lo, hi in zip(peaks, peaks[1:], sizes, sizes[1:], strict=False)]
    # one number a class remains in recompute mode at most: none of them a logit
    assert slopes == pytest.approx([bytes_per_logit] * 2, abs=0.07)


@pytest.mark.parametrize(
    ("keys", "per_value", "extra"),
    [
        ({}, 8, 4),
        ({"state": "bf16"}, 6, 4),
        ({"rows": "split", "state": "bf16"}, 6, 4),
        ({"optimizer": "adamw"}, 12, 4),
        ({"optimizer": "adamw", "rows": "split", "state": "bf16"}, 8, 4),
        ({"sample_rate": 0.5}, 8, 8),
    ],
)
def test_bytes_of_a_class_are_what_is_stored(keys, per_value, extra):
    head = head_of(MARGINS["cosface"] | keys, initial_rows(0, 100, 24, 1))
    assert head.rows.bytes_per_class(24) == per_value * 24 + extra
    assert sum(t.numel() * t.element_size() for t in head.tensors().values()) == 100 * (per_value * 24 + extra)


def test_initial_rows_depend_on_the_class_alone():
    whole = initial_rows(0, 70_000, 5, seed=3)
    for first, last in ((0, 1), (17, 18), (65_530, 65_545), (69_999, 70_000), (4, 4)):
        assert torch.equal(initial_rows(first, last, 5, seed=3), whole[first:last])
    assert not torch.equal(initial_rows(0, 10, 5, seed=4), whole[:10])
    assert whole.std().item() == pytest.approx(0.01, rel=0.01)
    assert whole.mean().item() == pytest.approx(0.0, abs=1e-4)


def test_what_is_chosen_automatically():
    config = HeadConfig(loss="softmax")
    assert settings_of(config, 1000, 64, World()).kept == torch.float32
    assert settings_of(config, 10**9, 4096, World()).kept is None  # 16 TB would not fit
    assert settings_of(config, 10**9, 4096, World(size=2**20, num_nodes=2**20)).kept == torch.float32
    cuda = World(device=torch.device("cuda"))
    if torch.cuda.is_available():
        assert settings_of(config, 1000, 64, cuda).operand == torch.float16
    forced = HeadConfig(loss="softmax", exponentials="keep", operands="bf16")
    assert settings_of(forced, 10**9, 4096, World()).kept == torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"loss": "combined", "margin_rad": 0.3}, "margin_factor is not set"),
        ({"loss": "arcface", "margin_rad": 0.3, "norm_lower": 1.0}, "norm_lower is 1.0; loss = 'arcface' does not use"),
        ({"loss": "softmax", "rows": "split", "operands": "fp16"}, "operands is 'fp16'; split rows"),
        ({"loss": "softmax", "sample_rate": 0.1, "optimizer": "adamw"}, "sample_policy is 'lazy'"),
    ],
)
def test_settings_that_do_not_go_together_are_named(keys, says):
    with pytest.raises(ValueError, match=says):
        HeadConfig.model_validate(keys)


def test_triton_is_refused_where_it_cannot_run():
    config = HeadConfig(loss="softmax", implementation="triton")
    with pytest.raises(ConfigError, match=r"head\.implementation is 'triton'"):
        settings_of(config, 1000, 64, World())
