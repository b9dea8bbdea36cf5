"""The members of a tar file: where the bytes of each lie, and the bytes that make a new one."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipelines.images import IMAGE_SUFFIXES

BLOCK_BYTES = 512
END_OF_TAR = bytes(2 * BLOCK_BYTES)
IMAGE_ENDINGS = frozenset(ending[1:] for ending in IMAGE_SUFFIXES)

_ZEROS = bytes(BLOCK_BYTES)
_STARTS: tuple[tuple[bytes, str], ...] = (
    *((b"\x89PNG", "png"), (b"RIFF", "webp"), (b"BM", "bmp"), (b"GIF8", "gif"), (b"II*\0", "tif"), (b"MM\0*", "tif")),
    *((b"\0\0\0\x0cjP", "jp2"), (b"P6", "ppm"), (b"P5", "pgm")),
)
_MOST_NAME_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name, where its bytes begin, how many they are, and where its header begins."""

    name: str
    offset: int
    size: int
    first_byte: int

    @property
    def sample(self) -> str:
        """What all members of one sample share: the name up to the first dot of its last part."""
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    @property
    def ending(self) -> str:
        """The name after that dot, in small letters."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()

    @property
    def is_image(self) -> bool:
        return self.ending.rpartition(".")[2] in IMAGE_ENDINGS

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + padded(self.size)


def image_ending(payload: bytes) -> str:
    """The ending for an image file, from its first bytes; jpg where they say nothing."""
    if payload.startswith(b"\xff\xd8"):
        return "jpg"
    return next((ending for start, ending in _STARTS if payload.startswith(start)), "jpg")


class BrokenTarError(Exception):
    """A tar file is no tar, or ends too early; ``byte`` says where."""

    def __init__(self, byte: int, reason: str) -> None:
        super().__init__(f"at byte {byte}: {reason}")
        self.byte = byte


def padded(size: int) -> int:
    """``size`` rounded up to whole blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def read_members(tar: mmap.mmap | bytes) -> Iterator[Member]:
    """The regular files of a ustar, GNU or pax archive, in order; only headers are read.

    Errors: BrokenTarError, when the walk arrives there, for a header that is none and for a file that was cut off.
    **Source**: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block".
    """
    position = first = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = tar[position : position + BLOCK_BYTES]
        if len(header) < BLOCK_BYTES:
            raise BrokenTarError(position, "the file ends without an end mark, so it was cut off")
        if header == _ZEROS:
            return
        stated = _number(header[148:156])
        if stated is None or stated != sum(header) - sum(header[148:156]) + 8 * 32:
            raise BrokenTarError(position, "no tar header begins here")
        size = _number(header[124:136]) if long_size is None else long_size
        kind, offset = header[156:157], position + BLOCK_BYTES
        if size is None or size < 0:
            raise BrokenTarError(position, "the header has no size")
        if offset + padded(size) > len(tar):
            raise BrokenTarError(position, f"a member of {size} bytes goes on beyond the end of the file")
        if kind in (b"L", b"x", b"K", b"g"):
            if kind in (b"L", b"x") and size > _MOST_NAME_BYTES:
                raise BrokenTarError(position, f"a name of {size} bytes is too long")
            if kind == b"L":
                long_name = tar[offset : offset + size].rstrip(b"\0").decode("utf-8", errors="replace")
            elif kind == b"x":
                records = _pax_records(tar[offset : offset + size])
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if records.get("size", "").isdecimal() else None
        else:
            if kind in (b"0", b"\0", b"7"):
                yield Member(_name(header) if long_name is None else long_name, offset, size, first)
            else:
                size = 0 if kind in (b"1", b"2", b"3", b"4", b"5", b"6") else size
            long_name = long_size = None
            first = offset + padded(size)
        position = offset + padded(size)


def in_samples(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Members that are one sample: neighbours of one key, up to the first ending that comes again.

    A key that occurs twice in a tar gives two samples, so that nobody gets what lies beside the other image.
    """
    sample: list[Member] = []
    for member in members:
        if sample and (member.sample != sample[0].sample or any(member.ending == one.ending for one in sample)):
            yield sample
            sample = []
        sample.append(member)
    if sample:
        yield sample


def member_bytes(name: str, payload: bytes) -> bytes:
    """Header, payload and padding of a member: no time, no owner, so that the same content is the same bytes.

    name: at most 100 bytes of ASCII; payload: below 8 GiB.
    """
    named = name.encode("ascii")
    assert len(named) <= 100, "names are made here, of digits"
    fields = (
        named.ljust(100, b"\0"),
        b"0000444\0",
        b"0000000\0",
        b"0000000\0",
        b"%011o\0" % len(payload),
        b"00000000000\0",
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar\x0000",
        bytes(64),
        b"0000000\x000000000\0",
    )
    header = b"".join(fields).ljust(BLOCK_BYTES, b"\0")
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    return header + payload + bytes(padded(len(payload)) - len(payload))


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", errors="replace")


def _number(field: bytes) -> int | None:
    if field[0] & 0x80:  # GNU: large numbers in base 256
        return int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")
    digits = field.strip(b"\0 ")
    if not digits:
        return 0
    return int(digits, 8) if all(48 <= digit <= 55 for digit in digits) else None


def _pax_records(block: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    while block:
        length, _, _ = block.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(block):
            break
        key, _, value = block[len(length) + 1 : int(length)].partition(b"=")
        records[key.decode("utf-8", errors="replace")] = value.rstrip(b"\n").decode("utf-8", errors="replace")
        block = block[int(length) :]
    return records
