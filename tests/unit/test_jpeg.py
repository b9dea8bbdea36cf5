"""What passes by its bytes alone is what a decoder decodes: a JPEG damaged in any way never passes where decoding fails."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lce_dist.errors import DataError
from pipelines.images import ImageRules
from pipelines.jpeg import is_plain_jpeg, is_whole_jpeg

KINDS: tuple[dict[str, object], ...] = (
    {},
    {"optimize": True},
    {"subsampling": 0},
    {"subsampling": 1, "quality": 95},
    {"restart_marker_blocks": 2},
    {"quality": 20, "comment": b"x" * 30},
    {"exif": b"Exif\0\0" + bytes(40)},
)


def jpeg(seed: int, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def decodes(payload: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(payload)) as image:
            image.load()
    except Exception:  # noqa: BLE001
        return False
    return True


def test_what_needs_no_decoding() -> None:
    assert all(is_whole_jpeg(jpeg(1, **kind)) for kind in KINDS) and is_whole_jpeg(jpeg(1, "L"))
    others = [jpeg(1, "CMYK"), jpeg(1, progressive=True), b"", b"\xff\xd8", jpeg(1)[:-2], jpeg(1)[:200]]
    assert not any(map(is_whole_jpeg, others))
    assert is_plain_jpeg(jpeg(1, progressive=True))


@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.sampled_from(["cut", "flip", "header", "bytes"]))
@settings(max_examples=600, deadline=None)
def test_nothing_passes_that_a_decoder_refuses(seed: int, kind: dict[str, object], damage: str) -> None:
    rng = np.random.default_rng(seed)
    payload = bytearray(jpeg(seed % 50, **kind))
    header = payload.index(b"\xff\xda") + 14
    if damage == "cut":
        del payload[rng.integers(0, len(payload)) :]
    elif damage == "bytes":
        for place in rng.integers(0, len(payload), 4).tolist():
            payload[place] = rng.integers(0, 256)
    else:
        place = rng.integers(2, header) if damage == "header" else rng.integers(0, len(payload))
        payload[place] ^= 1 << rng.integers(0, 8)
    assert not is_whole_jpeg(bytes(payload)) or decodes(bytes(payload))


def test_the_three_checks() -> None:
    whole, cut, progressive = jpeg(1), jpeg(1)[:-40], jpeg(1, progressive=True)
    for check in ("quick", "full", "none"):
        rules = ImageRules(check=check)
        assert rules.apply(whole, "x") == whole and rules.apply(progressive, "x") == progressive
        if check == "none":
            assert rules.apply(cut, "x") == cut
        else:
            for look in (rules.apply, rules.inspect):
                with pytest.raises(DataError, match="image x cannot be decoded"):
                    look(cut, "x")
                with pytest.raises(DataError, match="image x cannot be decoded"):
                    look(progressive[:-400], "x")
