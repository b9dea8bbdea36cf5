"""What the bytes of a JPEG say without being decoded: what it is, and whether every decoder comes to its end.

A decoder of libjpeg's family gives up on headers that are wrong and on files that end too early. Bits that are flipped among the
coded blocks change the picture and are no error to it, so that what is looked at here decides as full decoding does.
**Source**: ITU-T T.81, annex B; libjpeg-turbo jdmarker.c, jdhuff.c and jdmaster.c for what they refuse.
"""

from __future__ import annotations

import functools
import re
import struct

MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 64 * 2**20

_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_ONE_SCAN_FRAMES = (0xC0, 0xC1)
_OTHER_FRAMES = tuple(code for code in range(0xC3, 0xD0) if code not in (0xC4, 0xC8, 0xCC))
_STAND_ALONE = (0x01, *range(0xD0, 0xD9))
_NO_SEGMENT = frozenset((*_PLAIN_FRAMES, *_OTHER_FRAMES, *_STAND_ALONE, 0x00, 0xD9, 0xDA, 0xFF))
_HUFFMAN, _QUANTISERS, _RESTARTS, _SCAN, _COMMENT = 0xC4, 0xDB, 0xDD, 0xDA, 0xFE
# Pillow reads these itself: shorter ones, ICC profiles (E2), several pictures (E2) and Photoshop's (ED) are left to it.
_LEAST_BYTES = {0xE0: 14, 0xE1: 0, 0xEE: 12, **dict.fromkeys((*range(0xE3, 0xED), 0xEF, _COMMENT), 0)}
_IN_SCAN_ENDS = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)  # FF 00 is a byte of data, D0 to D7 are restarts
_MOST_BLOCKS = 10  # together in a scan of several components
_TABLES = 4


def is_plain_jpeg(payload: bytes) -> bool:
    """Whether the headers are those of an 8-bit grey or three-channel JPEG within our limits; nothing is decoded."""
    if not payload.startswith(b"\xff\xd8") or len(payload) > MAX_IMAGE_BYTES:
        return False
    at = 2
    while at + 10 <= len(payload) and payload[at] == 0xFF:
        marker = payload[at + 1]
        if marker not in _NO_SEGMENT:
            at += 2 + (payload[at + 2] << 8 | payload[at + 3])
        elif marker == 0xFF:  # fill bytes may stand before a marker
            at += 1
        elif marker in _PLAIN_FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", payload, at + 4)
            return bits == 8 and channels in (1, 3) and 0 < width * height <= MAX_IMAGE_PIXELS
        elif marker in _STAND_ALONE:
            at += 2
        else:
            return False
    return False


def is_whole_jpeg(payload: bytes) -> bool:
    """Whether it is a grey or three-channel JPEG of one scan within our limits whose tables are sound and whose end is there.

    True: decoding it succeeds. False: it is something else (progressive, another format), or damaged; decode it to know.
    """
    if not payload.startswith(b"\xff\xd8") or len(payload) > MAX_IMAGE_BYTES:
        return False
    at, end = 2, len(payload)
    frame: bytes | None = None
    huffman: frozenset[int] = frozenset()
    quantisers: frozenset[int] = frozenset()
    while at + 4 <= end and payload[at] == 0xFF:
        marker = payload[at + 1]
        after = at + 2 + (payload[at + 2] << 8 | payload[at + 3])
        segment = payload[at + 4 : after]
        if after < at + 4 or after > end:
            return False
        if marker == _SCAN:
            if frame is None or not _may_scan(frame, segment, huffman, quantisers):
                return False
            ends = _IN_SCAN_ENDS.search(payload, after)
            return ends is not None and payload[ends.start() + 1] == 0xD9
        if marker == _HUFFMAN:
            found = _huffman_tables(segment)
            if found is None:
                return False
            huffman |= found
        elif marker == _QUANTISERS:
            found = _quantisers(segment)
            if found is None:
                return False
            quantisers |= found
        elif marker in _ONE_SCAN_FRAMES:
            if frame is not None or not _is_frame(segment):
                return False
            frame = segment
        elif marker == _RESTARTS:
            if len(segment) != 2:
                return False
        elif len(segment) < _LEAST_BYTES.get(marker, 1 << 16):
            return False
        at = after
    return False


@functools.lru_cache(maxsize=256)
def _huffman_tables(segment: bytes) -> frozenset[int] | None:
    """Numbers of the tables in a segment (16 and more: AC), None where one is none."""
    found, at = set(), 0
    while at + 17 <= len(segment):
        number, counts = segment[at], segment[at + 1 : at + 17]
        symbols = segment[at + 17 : at + 17 + sum(counts)]
        if number & 15 >= _TABLES or number >> 4 > 1 or sum(counts) > 256 or len(symbols) < sum(counts):
            return None
        code = 0
        for bits, count in enumerate(counts, 1):
            code += count
            if count and code > 1 << bits:
                return None
            code <<= 1
        if number < 16 and max(symbols, default=0) > 15:
            return None
        found.add(number)
        at += 17 + sum(counts)
    return frozenset(found) if at == len(segment) else None


@functools.lru_cache(maxsize=256)
def _quantisers(segment: bytes) -> frozenset[int] | None:
    found, at = set(), 0
    while at < len(segment):
        number, precision = segment[at] & 15, segment[at] >> 4
        if number >= _TABLES or precision > 1:
            return None
        found.add(number)
        at += 65 + 64 * precision
    return frozenset(found) if at == len(segment) else None


@functools.lru_cache(maxsize=4096)
def _is_frame(segment: bytes) -> bool:
    if len(segment) < 6:
        return False
    bits, height, width, channels = struct.unpack_from(">BHHB", segment)
    if bits != 8 or channels not in (1, 3) or not 0 < width * height <= MAX_IMAGE_PIXELS:
        return False
    if len(segment) != 6 + 3 * channels or len(set(segment[6::3])) != channels:
        return False
    across, down = [one >> 4 for one in segment[7::3]], [one & 15 for one in segment[7::3]]
    if not all(1 <= side <= 4 for side in (*across, *down)):
        return False
    if any(max(sides) % side for sides in (across, down) for side in sides):
        return False
    return channels == 1 or sum(x * y for x, y in zip(across, down, strict=True)) <= _MOST_BLOCKS


@functools.lru_cache(maxsize=4096)
def _may_scan(frame: bytes, scan: bytes, huffman: frozenset[int], quantisers: frozenset[int]) -> bool:
    """Whether a scan is of all components, in their order, with tables that are there."""
    channels = frame[5]
    if len(scan) != 4 + 2 * channels or scan[0] != channels or scan[1 : 1 + 2 * channels : 2] != frame[6::3]:
        return False
    if scan[-3:] != b"\x00\x3f\x00" or not quantisers.issuperset(frame[8::3]):
        return False
    tables = scan[2 : 2 + 2 * channels : 2]
    return all(one >> 4 in huffman and 16 | (one & 15) in huffman for one in tables)
