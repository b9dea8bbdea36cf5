"""Lists of evaluation protocols: pairs, templates, and who is searched and enrolled; every error names the file and line.

    pairs       first,second,genuine (keys or template ids; 0 or 1), or LFW's pairs.txt
    templates   template_id,media_id,key or template_id,media_id,key,weight
    people      key,identity or key,identity,camera (a key, or a template id)

All are CSV in UTF-8 with that first line. Errors never show a key.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError

Ints = npt.NDArray[np.int64]

PAIRS = ("first", "second", "genuine")
TEMPLATES = ("template_id", "media_id", "key")
PEOPLE = ("key", "identity")


@dataclass(frozen=True)
class Known:
    """What a list may name: keys, or template ids, and the row that each has; source: where they are, for errors."""

    source: str
    row_of: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class PairList:
    """Rows (P,) of the first and second of each pair, whether they are of one person, and the fold where a list has them."""

    first_P: Ints
    second_P: Ints
    genuine_P: npt.NDArray[np.bool_]
    fold_P: Ints | None


@dataclass(frozen=True, eq=False)
class TemplateList:
    """R entries: key, line in the file, template and media numbers (R,), and weights (R,) or None.

    number_of: the number of each template id. Keys are looked up by :meth:`rows`, for the templates that are needed.
    """

    path: Path
    keys: list[str]
    line_R: Ints
    template_R: Ints
    media_R: Ints
    weight_R: npt.NDArray[np.float64] | None
    number_of: dict[str, int]

    def rows(self, entries: Ints, known: Known) -> Ints:
        """The row of each entry's image. Errors: DataError for an image that ``known`` lacks."""
        found = array("q")
        for entry in entries.tolist():
            found.append(_row(self.path, int(self.line_R[entry]), "key", self.keys[entry], known))
        return _ints(found)


@dataclass(frozen=True, eq=False)
class PeopleList:
    """Rows (N,) of the keys, the identity of each, and the camera of each, or none."""

    row_N: Ints
    identities: list[str]
    cameras: list[str] | None


def read_pairs(path: Path, first: Known, second: Known, suffix: str = ".jpg") -> PairList:
    """A list of pairs: of ``first``'s keys with ``second``'s. LFW's ``NAME 7`` is the key ``NAME/NAME_0007`` and ``suffix``.

    Errors: DataError for what is not as it must be, an unknown key, an image with itself, or a pair that comes twice.
    """
    if _is_lfw(path):
        rows, folds = _lfw_rows(path, suffix)
    else:
        rows, folds = ((line, *_pair(path, line, row)) for line, row in _table(path, PAIRS)), None
    line_P, first_P, second_P, genuine_P = (array("q") for _ in range(4))
    for line, one, other, genuine in rows:
        if one == other:
            raise DataError(f"{path}:{line}: the pair is of an image with itself; must be two images. Leave it out")
        line_P.append(line)
        first_P.append(_row(path, line, "first", one, first))
        second_P.append(_row(path, line, "second", other, second))
        genuine_P.append(genuine)
    found = PairList(
        _ints(first_P), _ints(second_P), _ints(genuine_P).astype(bool), None if folds is None else _ints(folds)
    )
    _refuse_twice(path, found.first_P * (int(found.second_P.max()) + 1) + found.second_P, _ints(line_P), "pair")
    return found


def read_templates(path: Path) -> TemplateList:
    """Which image is in which template, from which media; a media is of its template alone.

    Errors: DataError for what is not as it must be, a weight that is not a number of at least 0, or an image that is twice in
    a template.
    """
    number_of: dict[str, int] = {}
    media_of: dict[tuple[int, str], int] = {}
    key_of: dict[str, int] = {}
    keys, weights = [], array("d")
    line_R, template_R, media_R, image_R = (array("q") for _ in range(4))
    for line, row in _table(path, TEMPLATES, "weight"):
        template = number_of.setdefault(row[0], len(number_of))
        keys.append(row[2])
        line_R.append(line)
        template_R.append(template)
        media_R.append(media_of.setdefault((template, row[1]), len(media_of)))
        image_R.append(key_of.setdefault(row[2], len(key_of)))
        if len(row) > len(TEMPLATES):
            weights.append(_weight(path, line, row[3]))
    found = TemplateList(
        path,
        keys,
        _ints(line_R),
        _ints(template_R),
        _ints(media_R),
        np.frombuffer(weights, dtype=np.float64) if weights else None,
        number_of,
    )
    _refuse_twice(path, found.template_R * len(key_of) + _ints(image_R), found.line_R, "image of a template")
    return found


def refuse_shared_images(listed: TemplateList, probe_T: Ints, enrolled_T: Ints) -> None:
    """Refuse an image that is in templates of both ``probe_T`` and ``enrolled_T``. Errors: DataError."""
    line_of: dict[str, int] = {}
    for entry in np.flatnonzero(np.isin(listed.template_R, probe_T)).tolist():
        line_of.setdefault(listed.keys[entry], int(listed.line_R[entry]))
    entries = np.flatnonzero(np.isin(listed.template_R, enrolled_T)).tolist()
    shared = [entry for entry in entries if listed.keys[entry] in line_of]
    if shared:
        raise DataError(
            f"{listed.path}:{listed.line_R[shared[0]]}: the image is enrolled, and in a probe's template by line "
            f"{line_of[listed.keys[shared[0]]]} ({len({listed.keys[entry] for entry in shared})} such images); must be in one of the "
            "two. Leave it out of one template"
        )


def read_people(path: Path, known: Known) -> PeopleList:
    """Who is on which image, or template, and seen by which camera.

    Errors: DataError for what is not as it must be, an unknown key, or one that comes twice.
    """
    row_N, line_N = array("q"), array("q")
    identities, cameras = [], []
    for line, row in _table(path, PEOPLE, "camera"):
        line_N.append(line)
        row_N.append(_row(path, line, "key", row[0], known))
        identities.append(row[1])
        cameras += row[2:]
    found = PeopleList(_ints(row_N), identities, cameras or None)
    _refuse_twice(path, found.row_N, _ints(line_N), "key")
    return found


def _table(path: Path, columns: tuple[str, ...], optional: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """Line and fields of each row below the head; empty lines are passed over."""
    heads = [columns] if optional is None else [columns, (*columns, optional)]
    wanted = " or ".join(",".join(head) for head in heads)
    num_fields, num_rows = 0, 0
    for line, row in _csv(path):
        if not num_fields:
            if tuple(row) not in heads:
                raise DataError(f"{path}:{line}: the first line must be {wanted}; write the names of the columns there")
            num_fields = len(row)
            continue
        if len(row) != num_fields or not all(row):
            raise DataError(
                f"{path}:{line}: {len(row)} fields, {sum(not field for field in row)} of them empty; must be {num_fields}, "
                f"none of them empty: {wanted}"
            )
        num_rows += 1
        yield line, row
    if not num_rows:
        raise DataError(f"{path} has no rows; must have the line {wanted} and at least one below it")


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            ended = 0
            try:
                for row in reader:
                    ended = reader.line_num
                    if row:
                        yield reader.line_num, row
            except csv.Error as error:
                # an open quote swallows all lines below it: the row began below the last one that ended
                where = f"{path}:{ended + 1}" if "unexpected end" in str(error) else f"{path}:{reader.line_num}"
                why = "a quote that is not closed" if "unexpected end" in str(error) else str(error)
                raise DataError(f"{where}: not CSV ({why}); put quotes around fields with commas") from None
    except UnicodeDecodeError:
        raise _not_text(path) from None
    except OSError as error:
        raise DataError(f"list {path} cannot be read: {error.strerror}. Name a file") from None


def _not_text(path: Path) -> DataError:
    return DataError(f"{path} is not UTF-8 text; save it as UTF-8")


def _pair(path: Path, line: int, row: Sequence[str]) -> tuple[str, str, int]:
    if row[2] not in ("0", "1"):
        raise DataError(
            f"{path}:{line}: the third field, genuine, is neither 0 nor 1; must be 1 (one person) or 0 (two)"
        )
    return row[0], row[1], int(row[2])


def _weight(path: Path, line: int, word: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not 0.0 <= weight < math.inf:
        raise DataError(f"{path}:{line}: the weight is {word[:20]!r}; must be a number of at least 0")
    return weight


def _is_lfw(path: Path) -> bool:
    """Whether the first line is numbers alone."""
    for _, row in _csv(path):
        words = ",".join(row).split()
        return 1 <= len(words) <= 2 and all(_is_number(word) for word in words)
    return False


def _is_number(word: str) -> bool:
    return len(word) < 10 and word.isascii() and word.isdigit()


def _lfw_rows(path: Path, suffix: str) -> tuple[Iterator[tuple[int, str, str, int]], array[int] | None]:
    """Rows, and their folds where there are several: each is n pairs of one person, then n of two."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _not_text(path) from None
    lines = [(number, line.split()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    head = [int(word) for word in lines[0][1]]
    num_folds, each = (1, head[0]) if len(head) == 1 else head
    body = lines[1:]
    if num_folds < 1 or each < 1 or len(body) != 2 * num_folds * each:
        raise DataError(
            f"{path} has {len(body)} pairs; its first line asks for {num_folds} * 2 * {each}, and at least 1. Is it cut off?"
        )

    def rows() -> Iterator[tuple[int, str, str, int]]:
        for place, (line, words) in enumerate(body):
            genuine = place // each % 2 == 0
            numbers = (words[1], words[-1]) if len(words) == (3 if genuine else 4) else ()
            if not numbers or not all(_is_number(number) for number in numbers):
                what = "NAME n m (one person)" if genuine else "NAME n NAME m (two people)"
                raise DataError(f"{path}:{line}: {len(words)} words; must be {what}")
            names = (words[0], words[0] if genuine else words[2])
            if not genuine and names[0] == names[1]:
                raise DataError(f"{path}:{line}: a pair of two people has one name twice; must be two names")
            one, other = (f"{name}/{name}_{int(n):04}{suffix}" for name, n in zip(names, numbers, strict=True))
            yield line, one, other, int(genuine)

    folds = array("q", (place // (2 * each) for place in range(len(body)))) if num_folds > 1 else None
    return rows(), folds


def _row(path: Path, line: int, column: str, key: str, known: Known) -> int:
    row = known.row_of.get(key)
    if row is None:
        raise DataError(
            f"{path}:{line}: its {column} is not in {known.source}; must be there. Embed it, or leave the line out"
        )
    return row


def _refuse_twice(path: Path, code_N: Ints, line_N: Ints, what: str) -> None:
    order_N = np.argsort(code_N, kind="stable")
    again = np.flatnonzero(code_N[order_N][1:] == code_N[order_N][:-1])
    if again.size:
        first = again[np.argmin(order_N[again + 1])]
        before, line = line_N[order_N[first]], line_N[order_N[first + 1]]
        raise DataError(
            f"{path}:{line}: the {what} of line {before} again ({again.size} such lines); must be there once"
        )


def _ints(values: array[int]) -> Ints:
    return np.frombuffer(values, dtype=np.int64)
