"""The Triton kernels against float64 formulas, torch.optim and their PyTorch twins: no GPU is needed.

Triton's interpreter runs them in a worker process (it must be chosen before the module is imported). Tensors reach
the worker in shared memory, so what a kernel writes is seen here.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lce_dist.head import chunked
from lce_dist.head.margins import HardNegatives
from lce_dist.head.noise import noise_bits, round_stochastically, step_word
from lce_dist.head.optimizer import SGD, RowGradient
from lce_dist.head.rows import inverse_norm
from lce_dist.head.tables import SplitTable

triton = pytest.importorskip("triton")

Call = Callable[..., Any]
OUT = {torch.float32: torch.float32, torch.float16: torch.bfloat16, torch.bfloat16: torch.bfloat16}
CUT = 2.0**-7  # the interpreter cuts what it stores as bfloat16; a GPU rounds (see the compiled code below)


def _call(name: str, *args: Any) -> Any:
    from lce_dist.head import kernels

    return getattr(kernels, name)(*args)


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:  # the worker alone is to interpret
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            pool.submit(os.getpid).result(timeout=120)
        yield lambda name, *args: pool.submit(_call, name, *args).result(timeout=120)


class Chunk:
    """A batch and a chunk of classes, with targets whose cosines are near 1: the largest terms, to be left out."""

    def __init__(self, b: int, k: int, d: int, dtype: torch.dtype, num_targets: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.row_P = torch.randperm(b, generator=draw)[:num_targets]
        self.column_P = torch.randint(0, k, (self.row_P.shape[0],), generator=draw)
        rows_KD = torch.randn(k, d, generator=draw)
        emb_BD = torch.randn(b, d, generator=draw)
        emb_BD[self.row_P] = rows_KD[self.column_P] + 0.1 * emb_BD[self.row_P]
        self.emb_BD = F.normalize(emb_BD).to(dtype)
        self.rows_KD = rows_KD.to(dtype)
        self.column_K = 1.0 / rows_KD.norm(dim=1)
        self.threshold_B = 0.3 * torch.rand(b, generator=draw) - 0.1
        self.out_BK = torch.full((b, k), 7.0, dtype=OUT[dtype])

    def truth(
        self, scale: float, offset: float, hard: HardNegatives | None, conflict_cos: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums and out, one class of one row at a time, in float64."""
        emb, rows, column = self.emb_BD.double(), self.rows_KD.double(), self.column_K.double()
        targets = set(zip(self.row_P.tolist(), self.column_P.tolist(), strict=True))
        sum_B, out_BK = (
            torch.zeros(len(emb), dtype=torch.float64),
            torch.zeros(len(emb), len(rows), dtype=torch.float64),
        )
        for i in range(len(emb)):
            for j, cos in enumerate(((rows @ emb[i]) * column).tolist()):
                if (i, j) in targets or (conflict_cos is not None and cos > conflict_cos):
                    continue
                value, slope = cos, 1.0
                if hard is not None and cos > float(hard.threshold_B[i]):
                    value, slope = cos * (hard.shift + cos), hard.shift + 2.0 * cos
                sum_B[i] += math.exp(scale * value - offset)
                out_BK[i, j] = math.exp(scale * value - offset) * slope * float(column[j])
        return sum_B, out_BK


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 70, 64), (37, 1, 33), (16, 32, 32), (37, 70, 45)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exponentials_follow_the_formula(call: Call, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Tails of B, K and D in every position; hard negatives, the conflict filter and the column factor at once."""
    chunk = Chunk(*shape, dtype, num_targets=(shape[0] + 1) // 2)
    hard = HardNegatives(chunk.threshold_B, 0.4)
    settings = (64.0, 0.0, hard, 0.35)
    args = (chunk.emb_BD, chunk.rows_KD, chunk.column_K, *settings, chunk.row_P, chunk.column_P, chunk.out_BK)
    sum_B = call("exp_cosines", *args)
    true_sum_B, true_out_BK = chunk.truth(*settings)
    assert sum_B.dtype == torch.float32
    torch.testing.assert_close(sum_B.double(), true_sum_B, rtol=2e-5, atol=0.0)
    rounding = CUT if chunk.out_BK.dtype == torch.bfloat16 else 0.0
    # a slope shift + 2 cos may cancel: what is left is rounded as cos is
    torch.testing.assert_close(chunk.out_BK.double(), true_out_BK, rtol=rounding + 3e-5, atol=1e-6)


@pytest.mark.parametrize("use_hard", [False, True])
@pytest.mark.parametrize("conflict_cos", [None, 0.1])
@pytest.mark.parametrize("use_column", [False, True])
def test_every_combination_agrees_with_the_twin(
    call: Call, use_hard: bool, conflict_cos: float | None, use_column: bool
) -> None:
    chunk = Chunk(21, 40, 24, torch.float32, num_targets=7)
    if not use_column:
        chunk.rows_KD = F.normalize(chunk.rows_KD)
    hard = HardNegatives(chunk.threshold_B, 0.7) if use_hard else None
    column_K = chunk.column_K if use_column else None
    args = (chunk.emb_BD, chunk.rows_KD, column_K, 30.0, 0.0, hard, conflict_cos, chunk.row_P, chunk.column_P)
    twin_out_BK = torch.empty_like(chunk.out_BK)
    twin_sum_B = chunked.exp_cosines(*args, twin_out_BK)
    sum_B = call("exp_cosines", *args, chunk.out_BK)
    torch.testing.assert_close(sum_B, twin_sum_B, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(chunk.out_BK, twin_out_BK, rtol=2e-5, atol=1e-7)


def test_a_slice_of_a_wider_tensor_is_filled_and_nothing_beside_it(call: Call) -> None:
    chunk = Chunk(19, 45, 40, torch.bfloat16, num_targets=4)
    wide = torch.full((19, 100), 7.0, dtype=torch.bfloat16)
    settings = (64.0, 0.0, None, None)
    # operands are slices too, column after column and row after row; what lies behind them must not be used
    emb_BD = torch.cat([chunk.emb_BD.T, torch.full((24, 19), torch.nan).bfloat16()])[:40].T
    rows_KD = torch.cat([chunk.rows_KD, torch.full((45, 24), torch.nan).bfloat16()], 1)[:, :40]
    sum_B = call("exp_cosines", emb_BD, rows_KD, chunk.column_K, *settings, chunk.row_P, chunk.column_P, wide[:, 30:75])
    true_sum_B, true_out_BK = chunk.truth(*settings)
    torch.testing.assert_close(sum_B.double(), true_sum_B, rtol=2e-5, atol=0.0)
    torch.testing.assert_close(wide[:, 30:75].double(), true_out_BK, rtol=CUT + 3e-5, atol=0.0)
    assert (wide[:, :30] == 7.0).all() and (wide[:, 75:] == 7.0).all()


def test_a_chunk_of_one_target_sums_to_zero_and_an_offset_keeps_large_scales_finite(call: Call) -> None:
    chunk = Chunk(1, 1, 5, torch.float32, num_targets=1)
    none = torch.empty(0, dtype=torch.int64)
    settings = (128.0, 64.0, None, None)
    args = (chunk.emb_BD, chunk.rows_KD, chunk.column_K, *settings)
    assert call("exp_cosines", *args, chunk.row_P, chunk.column_P, chunk.out_BK).tolist() == [0.0]
    assert chunk.out_BK.tolist() == [[0.0]]
    sum_B = call("exp_cosines", *args, none, none, chunk.out_BK)
    cos = float(chunk.emb_BD[0].double() @ chunk.rows_KD[0].double() * chunk.column_K[0].double())
    assert cos > 0.9  # e^128 would be infinite
    assert float(sum_B) == pytest.approx(math.exp(128.0 * cos - 64.0), rel=3e-5)


def test_a_broken_row_shows_in_its_own_sum_only(call: Call) -> None:
    chunk = Chunk(18, 40, 8, torch.float32, num_targets=3)
    chunk.emb_BD[17, 2] = torch.nan  # the last row, which the padding of its tile reads again
    args = (chunk.emb_BD, chunk.rows_KD, chunk.column_K, 64.0, 0.0, None, 0.2, chunk.row_P, chunk.column_P)
    sum_B = call("exp_cosines", *args, chunk.out_BK)
    assert sum_B.isnan().nonzero().flatten().tolist() == [17]


def test_sums_repeat_bit_for_bit(call: Call) -> None:
    chunk = Chunk(37, 200, 45, torch.float16, num_targets=9)
    hard = HardNegatives(chunk.threshold_B, 0.4)
    args = (chunk.emb_BD, chunk.rows_KD, chunk.column_K, 64.0, 0.0, hard, 0.35, chunk.row_P, chunk.column_P)
    other_out_BK = torch.zeros_like(chunk.out_BK)
    assert torch.equal(call("exp_cosines", *args, chunk.out_BK), call("exp_cosines", *args, other_out_BK))
    assert torch.equal(chunk.out_BK, other_out_BK)


class Update:
    """Rows with everything that an update reads."""

    def __init__(self, num_rows: int = 23, dim: int = 37, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(deviation: float) -> torch.Tensor:
            return deviation * torch.randn(num_rows, dim, generator=draw)

        self.weight_SD, self.product_KD, self.extra_KD = normal(0.01), normal(0.3), normal(0.1)
        self.old_KD = F.normalize(normal(1.0))
        self.align_K = 0.2 * torch.rand(num_rows, generator=draw)
        # exact in bfloat16, so that both formats start from the same numbers
        self.first_SD = normal(0.5).bfloat16().float()
        self.second_SD = normal(0.5).square().bfloat16().float()
        self.inv_norm_S = inverse_norm(self.weight_SD)

    def gradient(self, weight_SD: torch.Tensor, old: bool, extra: bool) -> torch.Tensor:
        """dL/dw by autograd in float64, of L = sum product . w/|w| + align (1 - w/|w| . old) + extra . w."""
        w = weight_SD.double().requires_grad_()
        unit = F.normalize(w, eps=0.0)
        loss = (unit * self.product_KD).sum()
        if old:
            loss = loss + (self.align_K * (1.0 - (unit * self.old_KD).sum(1))).sum()
        if extra:
            loss = loss + (w * self.extra_KD).sum()
        loss.backward()
        assert w.grad is not None
        return w.grad

    def sgd(
        self, call: Call, weight: tuple[torch.Tensor, torch.Tensor | None], state: torch.Tensor, **changes: Any
    ) -> Any:
        """One update with ``changes`` to the arguments."""
        arguments: dict[str, Any] = {
            "product": self.product_KD,
            "scaled": False,
            "place": None,
            "old": self.old_KD,
            "align": self.align_K,
            "extra": None,
            "lr": 0.05,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "key": 12345,
            "step": 678,
            "first_row": (1 << 33) + 7,
        } | changes
        return call("update_rows_sgd", *weight, state, self.inv_norm_S, *arguments.values())


def _near(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """To 1e-6 of the row's largest value: a small entry is a difference of large ones."""
    error = (ours.double() - truth.double()).abs().amax(1) / truth.double().abs().amax(1)
    assert float(error.max()) < 1e-6


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("old", "extra"), [(False, False), (True, False), (True, True)])
def test_sgd_is_torchs_on_the_gradient_of_autograd(call: Call, scaled: bool, old: bool, extra: bool) -> None:
    update = Update()
    weight = torch.nn.Parameter(update.weight_SD.double())
    optimizer = torch.optim.SGD([weight], lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer.state[weight]["momentum_buffer"] = update.first_SD.double()
    weight.grad = update.gradient(update.weight_SD, old, extra)
    cos_K = (F.normalize(update.weight_SD.double(), eps=0.0) * update.old_KD).sum(1)
    optimizer.step()
    product_KD = update.product_KD * update.inv_norm_S[:, None] if scaled else update.product_KD
    old_cos_K = update.sgd(
        call,
        (update.weight_SD, None),
        update.first_SD,
        product=product_KD,
        scaled=scaled,
        old=update.old_KD if old else None,
        align=update.align_K if old else None,
        extra=update.extra_KD if extra else None,
    )
    _near(update.weight_SD, weight.detach())
    _near(update.first_SD, optimizer.state[weight]["momentum_buffer"])
    torch.testing.assert_close(update.inv_norm_S.double(), 1.0 / weight.detach().norm(dim=1), rtol=1e-6, atol=0.0)
    if old:
        torch.testing.assert_close(old_cos_K.double(), cos_K, rtol=0.0, atol=1e-6)
    else:
        assert old_cos_K is None


def test_sgd_agrees_with_the_twin_in_float32(call: Call) -> None:
    update = Update()
    weight_KD, velocity_KD, inv_K = update.weight_SD.clone(), update.first_SD.clone(), update.inv_norm_S.clone()
    cos_K = (update.old_KD * weight_KD).sum(1) * inv_K
    along_K = -((update.product_KD * weight_KD).sum(1)) * inv_K**3 + update.align_K * inv_K**2 * cos_K
    gradient = RowGradient(update.product_KD, inv_K, along_K, update.old_KD, -update.align_K * inv_K, None)
    SGD(0.9, 5e-4).apply(weight_KD, {"momentum": velocity_KD}, gradient, 0.05, 0)
    update.sgd(call, (update.weight_SD, None), update.first_SD)
    _near(update.weight_SD, weight_KD)
    _near(update.first_SD, velocity_KD)


@pytest.mark.parametrize("old_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_storage_formats_change_no_bit_of_the_arithmetic(call: Call, old_dtype: torch.dtype) -> None:
    """Split rows equal float32 rows; a bfloat16 momentum is the float32 one rounded with the noise of its place."""
    plain, packed = Update(), Update()
    table, half_SD = SplitTable(packed.weight_SD), packed.first_SD.bfloat16()
    old_KD = plain.old_KD.to(old_dtype)
    cos_K = plain.sgd(call, (plain.weight_SD, None), plain.first_SD, old=old_KD.float())
    packed_cos_K = packed.sgd(call, (table.upper_SD, table.lower_SD), half_SD, old=old_KD)
    assert torch.equal(table.load(slice(None)), plain.weight_SD)
    assert torch.equal(table.upper_SD, plain.weight_SD.bfloat16())
    assert torch.equal(packed.inv_norm_S, plain.inv_norm_S)
    assert torch.equal(packed_cos_K, cos_K)
    numbers_S = torch.arange(23) + (1 << 33) + 7
    expected_SD = round_stochastically(plain.first_SD, noise_bits(12345, 678, numbers_S, 37))
    assert torch.equal(half_SD.view(torch.int16), expected_SD.view(torch.int16))
    elsewhere_SD = round_stochastically(plain.first_SD, noise_bits(12345, 678, numbers_S - (1 << 32), 37))
    assert not torch.equal(half_SD.view(torch.int16), elsewhere_SD.view(torch.int16))


def test_chosen_rows_are_updated_where_they_lie(call: Call) -> None:
    whole, chosen = Update(40), Update(40)
    place_K = torch.tensor([39, 3, 17, 0, 8])
    half_SD = chosen.first_SD.bfloat16()
    before_SD, before_half_SD = chosen.weight_SD.clone(), half_SD.clone()
    whole_half_SD = whole.first_SD.bfloat16()
    whole.sgd(call, (whole.weight_SD, None), whole_half_SD)
    chosen.sgd(
        call,
        (chosen.weight_SD, None),
        half_SD,
        product=chosen.product_KD[place_K],
        place=place_K,
        old=chosen.old_KD[place_K],
        align=chosen.align_K[place_K],
    )
    before_SD[place_K], before_half_SD[place_K] = whole.weight_SD[place_K], whole_half_SD[place_K]
    assert torch.equal(chosen.weight_SD, before_SD)
    assert torch.equal(half_SD, before_half_SD)
    assert torch.equal(chosen.inv_norm_S[place_K], whole.inv_norm_S[place_K])


def test_rounding_keeps_finite_numbers_finite_and_others_as_they_are(call: Call) -> None:
    update = Update(64, 4)
    update.weight_SD.zero_()
    update.inv_norm_S.copy_(inverse_norm(update.weight_SD))
    largest = torch.finfo(torch.float32).max  # above the largest bfloat16
    extra_KD = torch.tensor([largest, -largest, torch.inf, -torch.inf]).repeat(64, 1)
    extra_KD[63] = torch.nan
    half_SD = torch.zeros(64, 4, dtype=torch.bfloat16)
    update.product_KD.zero_()
    update.sgd(call, (update.weight_SD, None), half_SD, old=None, align=None, extra=extra_KD, lr=0.0)
    top = torch.finfo(torch.bfloat16).max
    assert torch.equal(half_SD[:63].float(), torch.tensor([top, -top, torch.inf, -torch.inf]).repeat(63, 1))
    assert half_SD[63].isnan().all()
    assert update.inv_norm_S.isnan().all()  # 0 * inf: a broken row is not taken for a short one


def test_a_row_without_length_gets_the_twins_inverse(call: Call) -> None:
    update = Update(3, 5)
    update.weight_SD[1] = 0.0
    zero_SD = torch.zeros(3, 5)
    update.sgd(call, (update.weight_SD, None), zero_SD, product=zero_SD, old=None, align=None, lr=0.0)
    torch.testing.assert_close(update.inv_norm_S, inverse_norm(update.weight_SD), rtol=3e-7, atol=0.0)
    assert float(update.inv_norm_S[1]) == pytest.approx(1e12, rel=1e-6)


def test_adamw_is_torchs_and_formats_change_no_bit_of_its_arithmetic(call: Call) -> None:
    plain, packed = Update(), Update()
    weight = torch.nn.Parameter(plain.weight_SD.double())
    optimizer = torch.optim.AdamW([weight], lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    optimizer.state[weight] = {
        "step": torch.tensor(6.0),
        "exp_avg": plain.first_SD.double(),
        "exp_avg_sq": plain.second_SD.double(),
    }
    weight.grad = plain.gradient(plain.weight_SD, old=True, extra=True)
    optimizer.step()
    table = SplitTable(packed.weight_SD)
    first_half_SD, second_half_SD = packed.first_SD.bfloat16(), packed.second_SD.bfloat16()
    for update, tensors in (
        (plain, (plain.weight_SD, None, plain.first_SD, plain.second_SD)),
        (packed, (table.upper_SD, table.lower_SD, first_half_SD, second_half_SD)),
    ):
        rest = (False, None, update.old_KD, update.align_K, update.extra_KD)
        settings = (0.05, 0.9, 0.99, 1e-8, 0.1, (5, 6), 12, 7, 100)
        call("update_rows_adamw", *tensors, update.inv_norm_S, update.product_KD, *rest, *settings)
    _near(plain.weight_SD, weight.detach())
    _near(plain.first_SD, optimizer.state[weight]["exp_avg"])
    _near(plain.second_SD, optimizer.state[weight]["exp_avg_sq"])
    assert torch.equal(table.load(slice(None)), plain.weight_SD)
    assert torch.equal(packed.inv_norm_S, plain.inv_norm_S)
    for key, half_SD, exact_SD in ((5, first_half_SD, plain.first_SD), (6, second_half_SD, plain.second_SD)):
        expected_SD = round_stochastically(exact_SD, noise_bits(key, 12, torch.arange(23) + 100, 37))
        assert torch.equal(half_SD.view(torch.int16), expected_SD.view(torch.int16))


def test_noise_is_the_formula_of_its_docstring() -> None:
    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    assert mix(1) == 0x514E28B7  # published value of MurmurHash3's finalizer
    key, step, rows = 99, 1_000_003, [0, 5, (1 << 32) + 5, (1 << 40) - 1]
    bits = noise_bits(key, step, torch.tensor(rows), 3)
    assert step_word(key, step) == mix((99 + 1_000_003 * 0x85EBCA77) % 2**32)
    for k, row in enumerate(rows):
        word = mix((row % 2**32 * 0x9E3779B1 + step_word(key, step) + (row >> 32)) % 2**32)
        assert bits[k].tolist() == [mix(word ^ j * 0xC2B2AE3D % 2**32) >> 16 for j in range(3)]


def _assembly(kernel: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int) -> str:
    """PTX for a Hopper GPU; its assembler is run too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature.get(name, "fp32") for name in names}
    values = {(place,): constants[name] for place, name in enumerate(names) if name in constants}
    wide = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name].startswith("*") or name.endswith(("_stride_b", "_stride_k"))
    }
    source = ASTSource(
        fn=kernel, signature=types, constexprs=values, attrs={k: v for k, v in wide.items() if k not in values}
    )
    options = {"num_warps": num_warps, "num_stages": 3, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return str(compiled.asm["ptx"])


@pytest.mark.parametrize("operand", ["bf16", "fp16", "fp32"])
def test_the_exponentials_compile_for_hopper(operand: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The interpreter accepts what the compiler does not. 16-bit operands are on tensor cores, float32 is not TF32."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from lce_dist.head import kernels

    config = next(c for c in kernels._CONFIGS if (c.kwargs["BLOCK_D"] == 32) == (operand == "fp32"))
    flags = {"D": 520, "HARD": operand == "bf16", "CONFLICT": True}  # 520: a tail
    constants = flags | config.kwargs | {"emb_stride_d": 1, "rows_stride_d": 1, "out_stride_k": 1}
    if not flags["HARD"]:
        constants["threshold"] = None
    signature = {"emb": f"*{operand}", "rows": f"*{operand}", "column": "*fp32", "threshold": "*fp32", "target": "*i32"}
    signature |= {"out": "*fp32" if operand == "fp32" else "*bf16", "partial": "*fp32"}
    counts = ("num_rows", "num_classes", "emb_stride_b", "rows_stride_k", "out_stride_b")
    signature |= dict.fromkeys(counts, "i32")
    ptx = _assembly(kernels._exp_cosines_kernel.fn, signature, constants, 8)
    assert ("wgmma.mma_async" in ptx) == (operand != "fp32")
    assert ("cvt.rn.bf16" in ptx) == (operand != "fp32")  # stored rounded to nearest
    assert "tf32" not in ptx


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_updates_compile_for_hopper(
    rule: str, packed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from lce_dist.head import kernels

    table = "*i16" if packed else "*fp32"
    signature = dict.fromkeys(("weight", "lower", "state", "first", "second"), table)
    signature |= dict.fromkeys(("inv_norm", "product", "align", "extra", "old_cos"), "*fp32")
    signature |= {"place": "*i64", "old": "*fp16", "num_rows": "i32", "first_row": "i64"}
    signature |= dict.fromkeys(("word", "first_word", "second_word"), "i32")
    constants: dict[str, Any] = {"D": 512, "SCALED": packed, "BLOCK_K": 4, "BLOCK_D": 512}
    if not packed:
        constants |= dict.fromkeys(("lower", "place", "old", "align", "extra", "old_cos"))
    kernel = kernels._sgd_kernel if rule == "sgd" else kernels._adamw_kernel
    ptx = _assembly(kernel, signature, constants, 4)
    assert "ld.global.v4" in ptx  # whole words
