"""Which importer a file or folder is for, found out from what is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lce_dist.errors import ConfigError, DataError
from pipelines.folders import refuse_folder
from pipelines.importable import Source, Texts, digest, file_stamp
from pipelines.order import Int64Array
from pipelines.pairs import PAIRS_FILE, PairBin, read_pair_bin

FORMATS = ("folder", "zip", "recordio", "webdataset", "parquet", "csv", "pairs")

_OF_SUFFIX = {
    ".zip": "zip",
    ".rec": "recordio",
    ".idx": "recordio",
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".csv": "csv",
    ".bin": "pairs",
}
_IN_FOLDERS = (".rec", ".tar", ".parquet")


@dataclass(frozen=True)
class SourceOptions:
    """What may be said of a source beyond its path; None: the format's own."""

    image_column: str | None = None
    label_column: str | None = None
    labels: Path | None = None
    root: Path | None = None
    label_key: str | None = None


@dataclass(frozen=True, eq=False)
class PairSource:
    """The images of an LFW-style .bin file, each an identity of its own, in their order; pairs.csv says which are genuine."""

    stamp: str
    identities: Texts
    label_N: Int64Array
    bytes_N: Int64Array
    path: str
    is_genuine_P: npt.NDArray[np.bool_]
    kind: str = "pairs"
    group_N: None = None
    in_order: bool = True
    read_once: dict[str, PairBin] = field(default_factory=dict)  # of this process alone

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "read_once": {}}

    def expect(self, numbers: Int64Array) -> None:
        pass

    def read(self, number: int) -> bytes:
        if not self.read_once:
            self.read_once[self.path] = read_pair_bin(Path(self.path))
        return self.read_once[self.path].images[number]

    def name(self, number: int) -> str:
        return self.identities[number]

    def companions(self, order_M: Int64Array) -> Mapping[str, str]:
        is_kept_N = np.zeros(len(self.label_N), dtype=np.bool_)
        is_kept_N[order_M] = True
        rows = [
            f"{self.name(2 * pair)},{self.name(2 * pair + 1)},{int(genuine)}\n"
            for pair, genuine in enumerate(self.is_genuine_P.tolist())
            if is_kept_N[2 * pair] and is_kept_N[2 * pair + 1]
        ]
        return {PAIRS_FILE: "first,second,genuine\n" + "".join(rows)}


def open_pairs(path: Path) -> PairSource:
    """A pair file as a source; nothing in it is executed. Errors: DataError of :func:`pipelines.pairs.read_pair_bin`."""
    pairs = read_pair_bin(path)
    count = len(pairs.images)
    return PairSource(
        digest("pairs", file_stamp(path)),
        Texts.of(f"{number:09d}" for number in range(count)),
        np.arange(count, dtype=np.int64),
        np.array([len(image) for image in pairs.images], dtype=np.int64),
        str(path),
        pairs.is_genuine,
        read_once={str(path): pairs},
    )


def find_format(source: Path) -> str:
    """One of ``FORMATS``, by the ending of a file, or by what a folder holds, or else the folders in it.

    Errors: DataError where nothing is; ConfigError where it cannot be told.
    """
    if source.is_file():
        found = _OF_SUFFIX.get(source.suffix.lower())
        if found is None:
            raise ConfigError(
                f"{source} ends in {source.suffix!r}; must be one of {', '.join(_OF_SUFFIX)}, or say --format"
            )
        return found
    if not source.is_dir():
        raise DataError(f"{source} does not exist; name a folder or a file of images")
    entries = list(source.iterdir())
    kinds = _kinds_in(entries)
    if not kinds:  # a set of identities has millions of folders: the first few tell
        folders = sorted(entry for entry in entries if entry.is_dir() and not entry.name.startswith("."))[:8]
        kinds = _kinds_in(file for folder in folders for file in folder.iterdir())
    if len(kinds) > 1:
        raise ConfigError(f"{source} holds files of {' and '.join(sorted(kinds))}; say which with --format")
    return kinds.pop() if kinds else "folder"


def open_source(
    source: Path,
    kind: str,
    options: SourceOptions,
    progress: Callable[[int, int], None] | None = None,
    skip_bad: bool = False,
) -> tuple[Source, list[str]]:
    """The images of ``source``, of any format but webdataset's, and notes about it.

    skip_bad: files that are gone and folders without images do not stop it.
    Errors: DataError and ConfigError, naming the file, the rule and the fix.
    """
    refuse_foreign(kind, options)
    if kind in ("folder", "zip"):
        from pipelines.folders import open_folder

        found = open_folder(source, skip_bad)
        return found, [*_passed_over(found.others), *_passed_over_empty(found.empty)]
    if kind == "recordio":
        from pipelines.recordio import open_records

        path = (
            _only(source, ".rec")
            if source.is_dir()
            else source.with_suffix(".rec")
            if source.suffix.lower() == ".idx"
            else source
        )
        return open_records(path, options.labels, progress)
    if kind == "parquet":
        from pipelines.tables import open_parquet

        return open_parquet(files_below(source, ".parquet"), options.image_column, options.label_column), []
    if kind == "csv":
        from pipelines.tables import open_csv

        path = _only(source, ".csv") if source.is_dir() else source
        columns = options.image_column or "path", options.label_column or "identity"
        return open_csv(path, options.root, *columns, skip_bad), []
    if kind == "pairs":
        return open_pairs(source), []
    raise ConfigError(f"--format is {kind!r}; must be one of {', '.join(FORMATS)}")


def _passed_over(others: Mapping[str, int]) -> list[str]:
    if not others:
        return []
    most = sorted(others.items(), key=lambda one: (-one[1], one[0]))
    shown = ", ".join(f"{ending} ({count:,})" for ending, count in most[:6]) + (", ..." if len(most) > 6 else "")
    return [f"{sum(others.values()):,} files that are no images were passed over: {shown}"]


def _passed_over_empty(empty: Sequence[str]) -> list[str]:
    if not empty:
        return []
    shown = ", ".join(empty[:6]) + (", ..." if len(empty) > 6 else "")
    return [f"{len(empty):,} folders without images were passed over: {shown}"]


def files_below(source: Path, suffix: str) -> list[Path]:
    """The file itself, or all files of that ending below a folder, sorted. Errors: DataError where there is none."""
    if source.is_file():
        return [source]
    found = sorted(
        Path(directory) / file
        for directory, _, files in os.walk(source, onerror=refuse_folder)
        for file in files
        if file.lower().endswith(suffix) and not file.startswith(".")
    )
    if not found:
        raise DataError(f"{source} holds no {suffix} file; name the folder that does")
    return found


def _kinds_in(paths: Iterable[Path]) -> set[str]:
    return {_OF_SUFFIX[path.suffix.lower()] for path in paths if path.suffix.lower() in _IN_FOLDERS}


def _only(folder: Path, suffix: str) -> Path:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == suffix)
    if len(found) != 1:
        raise DataError(f"{folder} holds {len(found)} {suffix} files; name the one that is meant")
    return found[0]


def refuse_foreign(kind: str, options: SourceOptions) -> None:
    """Errors: ConfigError for an option that this format has no use for."""
    allowed = {"recordio": {"labels"}, "parquet": {"image_column", "label_column"}}
    allowed |= {"webdataset": {"label_key"}}
    allowed["csv"] = {"image_column", "label_column", "root"}
    for name, value in vars(options).items():
        if value is not None and name not in allowed.get(kind, set()):
            kinds = " or ".join(one for one, names in allowed.items() if name in names)
            raise ConfigError(f"--{name.replace('_', '-')} is {str(value)!r}; it is for {kinds}, and this is {kind}")
