"""Members of tar files: the same as Python's own reader finds, in every dialect; and where a broken one breaks."""

from __future__ import annotations

import io
import itertools
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.members import END_OF_TAR, BrokenTarError, Member, member_bytes, read_members

NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1, max_size=60)


def written(files: list[tuple[str, bytes]], dialect: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=dialect) as tar:
        for name, payload in files:
            if not payload:
                folder = tarfile.TarInfo(name)
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            header = tarfile.TarInfo(name)
            header.size = len(payload)
            tar.addfile(header, io.BytesIO(payload))
    return out.getvalue()


def slow_members(tar: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return [(one.name, one.offset_data, one.size) for one in file if one.isreg()]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=5), st.binary(max_size=1500)), min_size=1, max_size=6),
    st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
)
def test_equals_the_reader_of_python(files: list[tuple[list[str], bytes]], dialect: int) -> None:
    tar = written([("/".join(parts), payload) for parts, payload in files], dialect)
    found = list(read_members(tar))
    assert [(one.name, one.offset, one.size) for one in found] == slow_members(tar)
    for before, after in itertools.pairwise(found):
        assert before.end <= after.first_byte < after.offset


def test_ustar_prefix_is_part_of_the_name() -> None:
    tar = written([("folder" * 12 + "/" + "file" * 12, b"x" * 700)], tarfile.USTAR_FORMAT)
    assert [(one.name, one.offset, one.size) for one in read_members(tar)] == slow_members(tar)


def test_a_member_of_another_walk_can_be_copied_alone() -> None:
    tar = written([("a" * 150 + ".jpg", b"1" * 10), ("b" * 300 + ".jpg", b"2" * 600)], tarfile.GNU_FORMAT)
    last = list(read_members(tar))[1]
    alone = tar[last.first_byte : last.end] + END_OF_TAR
    assert slow_members(alone) == [("b" * 300 + ".jpg", last.offset - last.first_byte, 600)]


def test_what_we_write_python_reads() -> None:
    tar = member_bytes("000000001.cls", b"7") + member_bytes("000000001.jpg", bytes(range(256)) * 3) + END_OF_TAR
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        first, second = file.getmembers()
        assert (first.name, first.mtime, first.uid) == ("000000001.cls", 0, 0)
        assert file.extractfile(second).read() == bytes(range(256)) * 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("cut", "byte", "word"),
    [
        (lambda tar: tar[:600], 0, "goes on beyond the end"),
        (lambda tar: tar[:1024], 1024, "cut off"),
        (lambda tar: tar[:1100], 1024, "cut off"),
        (lambda tar: tar[:1024] + b"\x01" + tar[1025:], 1024, "no tar header"),
        (lambda tar: b"something else" * 100, 0, "no tar header"),
        (lambda tar: b"", 0, "cut off"),
    ],
)
def test_a_broken_one_names_the_byte(cut, byte: int, word: str) -> None:
    tar = member_bytes("0.cls", b"7") + member_bytes("0.jpg", b"x" * 3000) + END_OF_TAR
    with pytest.raises(BrokenTarError, match=word) as raised:
        list(read_members(cut(tar)))
    assert raised.value.byte == byte


def test_links_have_no_contents_whatever_they_say() -> None:
    """Some writers state the size of what a hard link points at."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname, link.size = tarfile.LNKTYPE, "0.jpg", 10**6
        tar.addfile(link)
    found = read_members(member_bytes("0.jpg", b"x" * 30) + out.getvalue())
    assert [one.name for one in found] == ["0.jpg"]


def test_what_follows_the_end_is_an_error_that_names_the_place() -> None:
    tar = member_bytes("0.jpg", b"x" * 30) + END_OF_TAR
    assert len(list(read_members(tar + bytes(10_000)))) == 1
    for more in (tar, b"?", bytes(700) + b"\x01"):
        with pytest.raises(BrokenTarError, match=r"follows the end mark at byte 1024, .*tar --ignore-zeros") as raised:
            list(read_members(tar + more))
        assert raised.value.byte == len(tar) + len(more) - len(more.lstrip(b"\0"))


def test_sample_and_ending() -> None:
    one = Member("a.b/000.seg.JPG", 0, 0, 0)
    assert (one.sample, one.ending, one.is_image) == ("a.b/000", "seg.jpg", True)
    assert not Member("000.cls", 0, 0, 0).is_image
