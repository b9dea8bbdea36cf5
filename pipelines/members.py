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
_MOST_NAME_BYTES = 1 << 20
_LOOKED_AT_ONCE = 1 << 20


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
    """The regular files of a v7, ustar, GNU or pax archive, in order; only headers are read.

    Errors: BrokenTarError, when the walk arrives there, for a header that is none, for a file that was cut off, and for
    anything but zeros behind the end mark, such as another archive.
    **Source**: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic tar format".
    """
    position = first = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = tar[position : position + BLOCK_BYTES]
        if len(header) < BLOCK_BYTES:
            raise BrokenTarError(position, f"the file ends at byte {len(tar)} without an end mark; it is cut off")
        if header == _ZEROS:
            _refuse_more(tar, position)
            return
        stated = _number(header[148:156])
        if stated is None or stated != sum(header) - sum(header[148:156]) + 8 * 32:
            raise BrokenTarError(position, "no tar header begins here; the file is damaged")
        kind, offset = header[156:157], position + BLOCK_BYTES
        is_about_next = kind in (b"L", b"x", b"K", b"g")
        size = _number(header[124:136])
        if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            size = 0  # links, devices and folders have no contents, whatever they say
        elif long_size is not None and not is_about_next:
            size = long_size
        if size is None:
            raise BrokenTarError(position, "the header has no size; the file is damaged")
        if offset + padded(size) > len(tar):
            raise BrokenTarError(
                position,
                f"a member of {size} bytes goes on beyond the end of the file at byte {len(tar)}; it is cut off",
            )
        position = offset + padded(size)
        if is_about_next:
            if kind in (b"L", b"x") and size > _MOST_NAME_BYTES:
                raise BrokenTarError(offset, f"a name of {size} bytes is too long; the file is damaged")
            if kind == b"L":
                long_name = _text(tar[offset : offset + size].partition(b"\0")[0])
            elif kind == b"x":
                records = _pax_records(tar[offset : offset + size], offset)
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if records.get("size", "").isdecimal() else long_size
            continue
        if kind in (b"0", b"\0", b"7"):
            yield Member(_name(header) if long_name is None else long_name, offset, size, first)
        long_name = long_size = None
        first = position


def _refuse_more(tar: mmap.mmap | bytes, end: int) -> None:
    """Errors: BrokenTarError where a byte behind the end mark is not zero: who reads one archive does not see what is there."""
    for at in range(end, len(tar), _LOOKED_AT_ONCE):
        piece = tar[at : at + _LOOKED_AT_ONCE]
        rest = piece.lstrip(b"\0")
        if rest:
            raise BrokenTarError(
                at + len(piece) - len(rest),
                f"something follows the end mark at byte {end}, such as another tar; if they were concatenated, unpack it "
                "with tar --ignore-zeros and pack again, or join them with tar --concatenate",
            )


def in_samples(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Members that are one sample: neighbours of one key, up to the first ending that comes again.

    A key that occurs twice in a tar gives two samples, so that nobody gets what lies beside the other image. Where the tar
    breaks, what was read of the last sample comes before the error.
    """
    sample: list[Member] = []
    try:
        for member in members:
            if sample and (member.sample != sample[0].sample or any(member.ending == one.ending for one in sample)):
                yield sample
                sample = []
            sample.append(member)
    except BrokenTarError:
        if sample:
            yield sample
        raise
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
    return _text(prefix + b"/" + name if prefix else name)


def _text(raw: bytes) -> str:
    """What is no UTF-8 stays what it is, so that two names never become one."""
    return raw.decode("utf-8", errors="surrogateescape")


def _number(field: bytes) -> int | None:
    """Octal digits, or GNU's form for large numbers; None for neither, and below zero."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if not digits:
        return 0
    return int(digits, 8) if all(48 <= digit <= 55 for digit in digits) else None


def _pax_records(block: bytes, offset: int) -> dict[str, str]:
    records: dict[str, str] = {}
    at = 0
    while at < len(block) and block[at] != 0:
        length, _, rest = block[at : at + _MOST_NAME_BYTES].partition(b" ")
        end = at + int(length) if length.isdigit() and len(length) <= 9 else 0
        keyword, equals, value = rest[: max(0, end - at - len(length) - 2)].partition(b"=")
        if not equals or end > len(block):
            raise BrokenTarError(offset + at, "the pax header is damaged")
        records[_text(keyword)] = _text(value)
        at = end
    return records
