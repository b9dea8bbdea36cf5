"""Pair files: what pickle writes is read as it was, what could run is refused and does not; lists name file and line."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.protocol_files import Known, read_pairs, read_people, read_templates
from lce_dist.errors import DataError
from pipelines.pairs import read_pair_bin, unpack_pair_bin

PROTOCOLS = range(6)
# every byte, both quotes, line breaks and backslashes: what text protocols have to escape
IMAGES = [b"\xff\xd8\xff" + bytes(range(256)), b"\xff\xd8\xff'\"\n\\\r", b"\xff\xd8\xffc", b"\xff\xd8\xff\\xff\\u0041"]
ANSWERS = [True, False]
# by CPython 2.7.18: pickle.dumps((["\xff\xd8\xff'x", "\xff\xd8\xff\"y\r\n\\"], [True]), protocol)
PYTHON_2 = {
    0: b"((lp0\nS\"\\xff\\xd8\\xff'x\"\np1\naS'\\xff\\xd8\\xff\"y\\r\\n\\\\'\np2\na(lp3\nI01\natp4\n.",
    1: b"(]q\x00(U\x05\xff\xd8\xff'xq\x01U\x08\xff\xd8\xff\"y\r\n\\q\x02e]q\x03I01\natq\x04.",
    2: b"\x80\x02]q\x00(U\x05\xff\xd8\xff'xq\x01U\x08\xff\xd8\xff\"y\r\n\\q\x02e]q\x03\x88a\x86q\x04.",
}
# as numpy under Python 2 writes one array of bytes, and one bool of its own
_PYTHON_2_ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR"
    b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'%s'\ntb"
)
_PYTHON_2_BOOL = (
    b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'b1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbS'\\x01'\ntR"
)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def arrays(images: list[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(image, dtype=np.uint8).copy() for image in images]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("images", "answers"),
    [
        (IMAGES, ANSWERS),
        (tuple(IMAGES), tuple(ANSWERS)),
        (arrays(IMAGES), ANSWERS),
        ([image[:, None] for image in arrays(IMAGES)], [np.bool_(answer) for answer in ANSWERS]),
        ([image[None] for image in arrays(IMAGES)], np.array(ANSWERS)),
        ([image.repeat(2)[::2] for image in arrays(IMAGES)], ANSWERS),  # not contiguous
        ([IMAGES[0]] * 4, ANSWERS),  # one object in four places
    ],
    ids=["bytes", "tuples", "arrays", "columns and numpy bools", "rows and an array", "strided", "shared"],
)
def test_what_python_3_writes(tmp_path, protocol, images, answers):
    path = written(tmp_path / "pairs.bin", pickle.dumps((images, answers), protocol))
    found = read_pair_bin(path)
    assert found.images == [image if isinstance(image, bytes) else image.tobytes() for image in images]
    assert found.is_genuine.tolist() == ANSWERS
    assert found.is_genuine.dtype == np.bool_


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_what_python_2_wrote(tmp_path, protocol):
    found = read_pair_bin(written(tmp_path / "pairs.bin", PYTHON_2[protocol]))
    assert found.images == [b"\xff\xd8\xff'x", b'\xff\xd8\xff"y\r\n\\']
    assert found.is_genuine.tolist() == [True]


def test_arrays_of_python_2(tmp_path):
    both = [_PYTHON_2_ARRAY % (3, rb"\xff\xd8\x00"), _PYTHON_2_ARRAY % (4, rb"\xff\xd8\n" + rb"\\")]
    path = written(
        tmp_path / "pairs.bin", b"((l" + b"".join(one + b"a" for one in both) + b"(l" + _PYTHON_2_BOOL + b"at."
    )
    found = read_pair_bin(path)
    assert found.images == [b"\xff\xd8\x00", b"\xff\xd8\n\\"]
    assert found.is_genuine.tolist() == [True]


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02](C\x01aq\x00h\x00e]\x88a\x86.",
        b"\x80\x02](C\x01ar\x09\x00\x00\x00j\x09\x00\x00\x00e]\x88a\x86.",
        b"((lp1\nS'a'\np2\nag2\na(lI01\nat.",
        b"\x80\x02](T\x01\x00\x00\x00aT\x01\x00\x00\x00ae]\x88a\x86.",
        b"\x80\x04](\x8e\x01\x00\x00\x00\x00\x00\x00\x00aC\x01ae]\x88a\x86.",
        b"\x80\x05](\x96\x01\x00\x00\x00\x00\x00\x00\x00aC\x01ae]\x88a\x86.",
        b"\x80\x04]\x94(C\x01a\x94h\x01e]\x94\x88a\x86.",
    ],
    ids=["BINGET", "LONG_BINGET", "GET", "BINSTRING", "BINBYTES8", "BYTEARRAY8", "MEMOIZE"],
)
def test_instructions_that_are_seldom_written(tmp_path, content):
    assert pickle.loads(content, encoding="bytes") == ([b"a", b"a"], [True])
    assert read_pair_bin(written(tmp_path / "pairs.bin", content)).images == [b"a", b"a"]


def test_many_and_long_entries(tmp_path):
    images = [bytes([number % 256]) * (1 + 3 * number) for number in range(2000)]
    for protocol in PROTOCOLS:
        found = read_pair_bin(written(tmp_path / "pairs.bin", pickle.dumps((images, [True] * 1000), protocol)))
        assert found.images == images


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Callable, *arguments: object, state: object = None) -> None:
        self._made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self._made


class Remembers:
    def __setstate__(self, state: str) -> None:
        Path(state).touch()


def _calls(canary: Path) -> dict[str, object]:
    line = f"touch '{canary}'"
    code = f"open({str(canary)!r}, 'w')"
    return {
        "os.system": Runs(os.system, line),
        "eval": Runs(eval, code),
        "exec": Runs(exec, code),
        "open": Runs(open, str(canary), "w"),
        "state": Runs(Remembers, state=str(canary)),
        "array of objects": np.array([Runs(eval, code)], dtype=object),
        "dtype with a call": Runs(np.dtype, Runs(eval, f"{code} and 'u1'"), False, True),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("attack", list(_calls(Path())))
@pytest.mark.parametrize("place", ["alone", "image", "answers", "memo"])
def test_nothing_is_executed(tmp_path, protocol, attack, place):
    canary = tmp_path / "canary"
    bad = _calls(canary)[attack]
    whole = {
        "alone": bad,
        "image": ([*IMAGES[:3], bad], ANSWERS),
        "answers": (IMAGES, [True, bad]),
        "memo": ([[bad], *IMAGES], ANSWERS),
    }[place]
    content = pickle.dumps(whole, protocol)
    _loaded(content)
    assert canary.exists()  # so the file is dangerous
    canary.unlink()
    with pytest.raises(DataError, match=r"at byte \d+, .*Nothing was executed") as refused:
        read_pair_bin(written(tmp_path / "pairs.bin", content))
    assert not canary.exists()
    assert "\n" not in str(refused.value)


def _loaded(content: bytes) -> None:
    with contextlib.suppress(TypeError, ValueError, AttributeError, pickle.UnpicklingError):
        pickle.loads(content)  # after the call, what it returned may not fit


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'touch CANARY'\ntR.",
        b"(S'touch CANARY'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch CANARY'\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch CANARY\x85R.",
        b"\x80\x02cbuiltins\neval\nq\x000h\x00U\x13open('CANARY','wb')\x85R.",
        b"\x80\x02cbuiltins\nopen\nU\x06CANARYU\x01w\x86\x81.",
        b"\x80\x04cbuiltins\nopen\nU\x06CANARYU\x01w\x86}\x92.",
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch CANARY'\ntR.",
    ],
    ids=["GLOBAL", "INST", "OBJ", "STACK_GLOBAL", "memo", "NEWOBJ", "NEWOBJ_EX", "getattr"],
)
def test_hand_written_programs_do_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    _loaded(content)
    dangerous = Path("CANARY").exists()
    Path("CANARY").unlink(missing_ok=True)
    assert dangerous or b"\x81" in content or b"\x92" in content  # a function has no __new__ for these two
    with pytest.raises(DataError, match=r"at byte \d+"):
        read_pair_bin(written(tmp_path / "pairs.bin", content))
    assert not Path("CANARY").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "at byte 0, the file ends in the middle"),
        (b"\x80\x04", "at byte 2, the file ends in the middle"),
        (b"Psomebody\n.", "PERSID is not an instruction for data"),
        (b"\x80\x02Nq\x00Q.", "BINPERSID is not"),
        (b"\x80\x02\x82\x01.", "EXT1 is not"),
        (b"\x80\x05\x97.", "NEXT_BUFFER is not"),
        (b"}.", "EMPTY_DICT is not"),
        (b"G" + bytes(8) + b".", "BINFLOAT is not"),
        (b"\xff.", r"at byte 0, b'\\xff' is no instruction"),
        (b".", "STOP: nothing is on the stack"),
        (b"(.", "STOP: nothing is on the stack"),
        (b"t.", "TUPLE: no mark"),
        (b"]a.", "APPEND: nothing is on the stack"),
        (b"NNa.", "APPEND: None is no list"),
        (b"h\x07.", "BINGET: nothing was kept as 7"),
        (b"N0.", "POP is not"),
        (b"]N.", "values are left over"),
        (b"N.N.", "2 bytes follow after the end"),
        (b"\x8e" + (2**62).to_bytes(8, "little") + b"abc.", "BINBYTES8 cannot be read .*only 4 remain"),
        (b"\x8d" + (2**62).to_bytes(8, "little") + b"abc.", "BINUNICODE8 cannot be read .*only 4 remain"),
        (b"\x96" + (2**63 - 1).to_bytes(8, "little") + b"abc.", "BYTEARRAY8 cannot be read"),
        (b"\x8e" + (2**64 - 1).to_bytes(8, "little") + b"abc.", "BINBYTES8 cannot be read"),
        (b"B\xff\xff\xff\xffabc.", "BINBYTES cannot be read"),
        (b"T\xff\xff\xff\xffabc.", "BINSTRING cannot be read"),
        (b"\x8b\xff\xff\xff\xffabc.", "LONG4 cannot be read"),
        (b"Sno quotes\n.", "STRING cannot be read"),
        (b"S'cut", "STRING cannot be read"),
        (b"S'a\"\n.", "STRING cannot be read"),
        (b"S'\\x'\n.", "STRING cannot be read"),
        (b"I1" + b"0" * 5000 + b"\n.", "INT cannot be read"),
        (b"V\\u2028\n.", r"UNICODE: text of characters above U\+00FF"),
        (b"cnumpy\nload\n.", "'numpy load' is neither"),
        (b"cnumpy dtype\n\n.", "is neither"),
        (b"c_codecs\nencode\n(Vabc\nVrot13\ntR.", "REDUCE: bytes come from text in latin1"),
        (b"c_codecs\nencode\n(Vabc\ntR.", "REDUCE: encode of 1 values; must be of 2"),
        (b"cbuiltins\nbytes\n(I99999999999\ntR.", "REDUCE: bytes of 1 values; must be of 0"),
        (b"cnumpy\ndtype\n(S'O'\nI0\nI1\ntR.", "arrays are of 'O'"),
        (b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR.", "arrays are of 'f8'"),
        (b"cnumpy\nndarray\n(I99999999999\ntR.", "the name ndarray of a tuple is not how"),
        (b"cnumpy\nndarray\n(dNtb.", "DICT is not"),
        (b"cnumpy\nndarray\nNb.", "BUILD: the name ndarray has no state of None"),
        (b"]Nb.", "BUILD: a list has no state of None"),
        (b"N.", "holds None; must be a pickle of"),
        (b"NN\x86.", "its images are None"),
        (b"](NNe]\x88a\x86.", "image 1 is None"),
        (b"](X\x01\x00\x00\x00aC\x01ae]\x88a\x86.", "image 1 is text"),
        (b"](C\x01aC\x00e]\x88a\x86.", "image 2 is empty"),
        (b"](C\x01aC\x01ae]K\x01a\x86.", "answer 1 is a number; must be True or False"),
        (b"](C\x01aC\x01ae](\x88Ne\x86.", "answer 2 is None"),
        (b"](C\x01aC\x01aC\x01ae]\x88a\x86.", "3 images for 1 pairs; must be two a pair"),
        (b"]]\x86.", "0 images for 0 pairs"),
        (b"]]]\x87.", "holds a tuple"),
    ],
)
def test_what_is_not_a_pair_file_is_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(DataError, match=words) as refused:
        read_pair_bin(written(tmp_path / "pairs.bin", content))
    assert "pairs.bin" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), r"image 1 is an array of u1 of shape \(8, 8, 3\)"),
        (np.zeros((4, 5), np.float32), "arrays are of 'f4'"),
        ([np.zeros(5, bool)] * 4, r"image 1 is an array of b1"),
        (IMAGES[:3], "3 images for 2 pairs"),
    ],
)
def test_arrays_that_are_no_files_are_refused(tmp_path, images, words):
    for protocol in PROTOCOLS:
        with pytest.raises(DataError, match=words):
            read_pair_bin(written(tmp_path / "pairs.bin", pickle.dumps((list(images), ANSWERS), protocol)))


def test_an_array_that_claims_more_than_it_has_is_refused(tmp_path):
    content = b"((l" + _PYTHON_2_ARRAY % (4, b"abc") + b"a(lI01\nat."
    with pytest.raises(DataError, match="BUILD: an array whose bytes do not fit its shape"):
        read_pair_bin(written(tmp_path / "pairs.bin", content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_cut_off_anywhere_are_refused(tmp_path, protocol):
    content = pickle.dumps(([*arrays(IMAGES[1:]), IMAGES[1]], np.array(ANSWERS)), protocol)
    for end in range(len(content)):
        with pytest.raises(DataError):
            read_pair_bin(written(tmp_path / "pairs.bin", content[:end]))


def test_damaged_files_are_refused_or_still_images(tmp_path):
    rng = np.random.default_rng(0)
    refused = 0
    for protocol in (0, 2, 5):
        whole = pickle.dumps(([*arrays(IMAGES[1:]), IMAGES[1]], ANSWERS), protocol)
        for _ in range(400):
            content = bytearray(whole)
            content[rng.integers(len(content))] = rng.integers(256)
            try:
                assert len(read_pair_bin(written(tmp_path / "pairs.bin", bytes(content))).images) == 4
            except DataError:
                refused += 1
    assert 300 < refused < 1200


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", [bytes, np.ndarray])
def test_memory_is_about_the_file(tmp_path, protocol, kind):
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, 100_000, dtype=np.uint8) for _ in range(100)]
    total = sum(map(len, images))
    given = images if kind is np.ndarray else [image.tobytes() for image in images]
    path = written(tmp_path / "pairs.bin", pickle.dumps((given, [True] * 50), protocol))
    tracemalloc.start()
    found = read_pair_bin(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.images) == 100
    assert peak < total + (4 << 20)


def test_memory_of_a_file_of_instructions_alone(tmp_path):
    path = written(tmp_path / "pairs.bin", b"]" * (8 << 20) + b".")  # as lists, 512 MB
    tracemalloc.start()
    with pytest.raises(DataError, match="too many for images"):
        read_pair_bin(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_path_that_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.bin"):
        with pytest.raises(DataError, match="cannot be read"):
            read_pair_bin(path)


def encoded(kind: str, colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 10, 10)).save(buffer, kind)
    return buffer.getvalue()


def test_unpack_writes_images_and_pairs(tmp_path):
    images = [encoded(kind, 40 * n) for n, kind in enumerate(("JPEG", "PNG", "BMP", "GIF", "WEBP", "JPEG"))]
    path = written(tmp_path / "pairs.bin", pickle.dumps((images, [True, False, True])))
    assert unpack_pair_bin(path, tmp_path / "a" / "out") == (6, 3)
    names = ["000000.jpg", "000001.png", "000002.bmp", "000003.gif", "000004.webp", "000005.jpg"]
    out = tmp_path / "a" / "out"
    assert sorted(one.name for one in out.iterdir()) == [*names, "pairs.csv"]
    assert [(out / name).read_bytes() for name in names] == images
    known = Known("out", {name: row for row, name in enumerate(names)})
    found = read_pairs(out / "pairs.csv", known, known)
    assert found.first_P.tolist() == [0, 2, 4]
    assert found.second_P.tolist() == [1, 3, 5]
    assert found.genuine_P.tolist() == [True, False, True]
    with pytest.raises(DataError, match="exists"):
        unpack_pair_bin(path, out)
    bad = written(tmp_path / "bad.bin", pickle.dumps(([*images, b"MZ.exe", images[0]], [True] * 4)))
    with pytest.raises(DataError, match="image 7 begins with 4d5a2e657865; must be a JPEG"):
        unpack_pair_bin(bad, tmp_path / "b")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "bad.bin", "pairs.bin"]


KNOWN = Known("new.npz", {name: row for row, name in enumerate("abcd")})


def listed(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_pairs_of_two_files(tmp_path):
    other = Known("old.npz", {"x, 1": 5, "y": 6})
    path = listed(tmp_path / "p.csv", '\ufefffirst,second,genuine\r\na,"x, 1",1\r\n\r\nb,y,0\r\na,y,0\r\n')
    found = read_pairs(path, KNOWN, other)
    assert (found.first_P.tolist(), found.second_P.tolist()) == ([0, 1, 0], [5, 6, 6])
    assert found.genuine_P.tolist() == [True, False, False]
    assert found.fold_P is None


HEAD = "first,second,genuine\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "p.csv has no rows"),
        (HEAD, "p.csv has no rows"),
        ("a,b,1\n", "p.csv:1: the first line must be first,second,genuine"),
        (HEAD + "a,b,1\na,c\n", "p.csv:3: 2 fields, 0 of them empty; must be 3"),
        (HEAD + "a,,1\n", "p.csv:2: 3 fields, 1 of them empty"),
        (HEAD + "a,b,yes\n", "p.csv:2: the third field, genuine, is neither 0 nor 1"),
        (HEAD + "a,b,1\n\nq,b,1\n", "p.csv:4: its first is not in new.npz"),
        (HEAD + "a,q,1\n", "p.csv:2: its second is not in new.npz"),
        (HEAD + "a,a,1\n", "p.csv:2: the pair is of an image with itself"),
        (HEAD + "a,b,1\nb,a,1\nc,a,0\na,b,0\n", r"p.csv:5: the pair of line 2 again \(1 such"),
        (HEAD + "a,b,1\nc,a,0\nc,a,0\na,b,1\n", r"p.csv:4: the pair of line 3 again \(2 such"),
        (HEAD + 'a,"b,1\n', "p.csv:2: not CSV"),
        (HEAD + 'a,b,1\n"c,d,1\n' + "e,f,0\n" * 20, r"p.csv:3: not CSV \(a quote that is not closed"),
    ],
)
def test_lists_of_pairs_that_are_wrong(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        read_pairs(listed(tmp_path / "p.csv", text), KNOWN, KNOWN)


def test_lists_that_are_not_text(tmp_path):
    for content in (b"first,second,genuine\n\xff\xfe,b,1\n", b"1 1\n\xff 1 2\nA 1 B 1\n"):
        with pytest.raises(DataError, match="not UTF-8 text"):
            read_pairs(written(tmp_path / "p.csv", content), KNOWN, KNOWN)
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(tmp_path, KNOWN, KNOWN)


LFW = "2\t1\nAnna_Lee\t1\t12\nAnna_Lee\t1\tBo\t3\nBo\t3\t4\nBo\t4\tAnna_Lee\t12\n"
LFW_KNOWN = Known(
    "lfw.npz",
    {key: row for row, key in enumerate(f"{n}/{n}_{i:04}.png" for n in ("Anna_Lee", "Bo") for i in range(1, 13))},
)


def test_pairs_of_lfw(tmp_path):
    found = read_pairs(listed(tmp_path / "pairs.txt", LFW), LFW_KNOWN, LFW_KNOWN, ".png")
    assert (found.first_P.tolist(), found.second_P.tolist()) == ([0, 0, 14, 15], [11, 14, 15, 11])
    assert found.genuine_P.tolist() == [True, False, True, False]
    assert found.fold_P is not None
    assert found.fold_P.tolist() == [0, 0, 1, 1]
    one_block = read_pairs(
        listed(tmp_path / "dev.txt", "2\nBo 1 2\nBo 1 3\nBo 1 Anna_Lee 1\nBo 1 Anna_Lee 2\n"), *[LFW_KNOWN] * 2, ".png"
    )
    assert one_block.genuine_P.tolist() == [True, True, False, False]
    assert one_block.fold_P is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LFW + "Bo 1 2\n", r"has 5 pairs; its first line asks for 2 \* 2 \* 1"),
        ("0 0\n", "has 0 pairs"),
        (LFW.replace("Bo\t3\t4", "Bo\t3"), "pairs.txt:4: 2 words; must be NAME n m"),
        (LFW.replace("Bo\t3\t4", "Bo\t3\tx"), "pairs.txt:4: 3 words; must be NAME n m"),
        (LFW.replace("1\tBo\t3\n", "1\tAnna_Lee\t3\n"), "pairs.txt:3: a pair of two people has one name"),
        (LFW.replace("Bo\t3\t4", "Bo\t3\t3"), "pairs.txt:4: .* with itself"),
        (LFW.replace("Bo\t3\t4", "Bo\t3\t44"), "pairs.txt:4: its second is not in lfw.npz"),
    ],
)
def test_lists_of_lfw_that_are_wrong(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        read_pairs(listed(tmp_path / "pairs.txt", text), LFW_KNOWN, LFW_KNOWN, ".png")


def test_templates(tmp_path):
    path = listed(tmp_path / "t.csv", "template_id,media_id,key,weight\n7,1,a,0.5\n3,1,b,1\n7,2,c,0\n7,1,b,2e-1\n")
    found = read_templates(path)
    assert found.number_of == {"7": 0, "3": 1}
    assert found.template_R.tolist() == [0, 1, 0, 0]
    assert found.media_R.tolist() == [0, 1, 2, 0]  # media 1 of template 3 is another one
    assert found.weight_R is not None
    assert found.weight_R.tolist() == [0.5, 1.0, 0.0, 0.2]
    assert found.rows(np.array([3, 0]), KNOWN).tolist() == [1, 0]
    with pytest.raises(DataError, match=r"t\.csv:4: its key is not in small\.npz"):
        found.rows(np.arange(4), Known("small.npz", {"a": 0, "b": 1}))
    assert read_templates(listed(tmp_path / "u.csv", "template_id,media_id,key\n7,1,a\n")).weight_R is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("7,1,a,-1", "t.csv:3: the weight is '-1'; must be a number of at least 0"),
        ("7,1,a,nan", "t.csv:3: the weight is 'nan'"),
        ("7,1,a,inf", "t.csv:3: the weight is 'inf'"),
        ("7,1,a,much", "t.csv:3: the weight is 'much'"),
        ("7,1,a", "t.csv:3: 3 fields"),
        ("7,2,b,1", "t.csv:3: the image of a template of line 2 again"),
    ],
)
def test_templates_that_are_wrong(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        read_templates(listed(tmp_path / "t.csv", f"template_id,media_id,key,weight\n7,1,b,1\n{row}\n"))


def test_people(tmp_path):
    found = read_people(listed(tmp_path / "p.csv", "key,identity,camera\nc,Ann,1\na,-1,2\n"), KNOWN)
    assert (found.row_N.tolist(), found.identities, found.cameras) == ([2, 0], ["Ann", "-1"], ["1", "2"])
    assert read_people(listed(tmp_path / "q.csv", "key,identity\nc,Ann\n"), KNOWN).cameras is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("key,identity\na,Ann\nb,Bo\na,Ann\n", "p.csv:4: the key of line 2 again"),
        ("key,identity\nz,Ann\n", "p.csv:2: its key is not in new.npz"),
        ("key,identity,camera\na,Ann\n", "p.csv:2: 2 fields"),
        ("key,person\na,Ann\n", "p.csv:1: the first line must be key,identity or key,identity,camera"),
    ],
)
def test_people_that_are_wrong(tmp_path, text, words):
    with pytest.raises(DataError, match=words) as refused:
        read_people(listed(tmp_path / "p.csv", text), KNOWN)
    assert "Ann" not in str(refused.value)
