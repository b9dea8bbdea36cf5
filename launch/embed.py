"""Images to a file of vectors, in blocks that are kept as they come, so that the same command goes on after a stop."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from launch.embedder import Embedder
from launch.image_set import ImageSet
from launch.progress import RunProgress
from lce_dist.compat.artefact import map_rows, read_bridge, read_card
from lce_dist.embedding import embed_batches
from lce_dist.errors import DataError, RunError
from lce_dist.vector_files import Block, write_vectors
from pipelines.stream import ImageStream, block_plan

_ROWS = "rows.f32"
_BLOCK_ROWS = 128  # as evaluation has them: the same rows meet in the same matrix product
_WRITE_ROWS = 1 << 14
_MOST_THREADS = 8
_LENGTH_TOLERANCE = 1e-3

Rows = npt.NDArray[np.float32]


def work_folder(out: Path) -> Path:
    """Where everything is until ``out`` is whole."""
    return out.with_name(f"{out.name}.partial")


@contextlib.contextmanager
def working(out: Path) -> Iterator[Path]:
    """The work folder, to one process; kept for the next try when the block fails with rows in it, else removed. Errors: RunError."""
    work = work_folder(out)
    before = os.umask(0o077)  # templates of people
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise RunError(f"{work} cannot be made: {error}. Choose another place") from None
    finally:
        os.umask(before)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is at work on {out} ({work} is locked); wait for it") from None
        done = False
        try:
            yield work
            done = True
        finally:
            if done or not (work / _ROWS).exists():
                shutil.rmtree(work, ignore_errors=True)


def embed_images(embedder: Embedder, images: ImageSet, device: torch.device, work: Path, progress: RunProgress) -> Rows:
    """(N, D) unit rows in the order of the view, mapped from ``work``; what an earlier try left there is not computed again.

    Errors: DataError for an image that cannot be decoded; RunError for a vector without a direction, or a full disk.
    **Memory**: batches of 128 images.
    """
    view, dim = images.view, embedder.embedding_dim
    rows_file, total = work / _ROWS, view.num_samples
    state = {"space": embedder.space, "data": view.fingerprint, "dim": dim, "device": device.type}
    first = _go_on(work, rows_file, state, total, dim)
    if first:
        progress.note(f"going on after {first:,} of {total:,} images")
    plan = block_plan(total, 0, 1, _BLOCK_ROWS, first)
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    done, start_s = first, time.monotonic()
    try:
        with (
            rows_file.open("ab") as file,
            ImageStream(view, plan, embedder.image_size, None, 0, device, threads) as stream,
        ):
            for some in embed_batches(embedder.network, stream, dim):
                unit_bD = some.unit_bD.cpu().numpy()
                _check(unit_bD, images.keys, done)
                file.write(np.ascontiguousarray(unit_bD, dtype=np.float32).tobytes())
                done += len(unit_bD)
                speed = (done - first) / max(1e-6, time.monotonic() - start_s)
                minutes, seconds = divmod(round((total - done) / speed), 60)
                progress.count("embedding", done, total, f"{speed:5.0f} images/s  ETA {minutes}:{seconds:02d}")
    except OSError as error:
        raise RunError(f"{rows_file} cannot be written: {error}. Free space and run the same command again") from None
    return np.memmap(rows_file, np.float32, "r", shape=(total, dim))


def _go_on(work: Path, rows_file: Path, state: dict[str, Any], total: int, dim: int) -> int:
    """How many rows of the same model and images are there, in whole blocks; the file is cut to them."""
    state_file = work / "state.json"
    try:
        before = json.loads(state_file.read_text())
    except (OSError, ValueError):
        before = None
    if before != state or not rows_file.exists():
        rows_file.unlink(missing_ok=True)
        state_file.write_text(json.dumps(state))
        return 0
    rows = rows_file.stat().st_size // (4 * dim)
    rows = total if rows >= total else rows // _BLOCK_ROWS * _BLOCK_ROWS
    os.truncate(rows_file, rows * 4 * dim)
    return rows


def _check(unit_bD: Rows, keys: list[str], first: int) -> None:
    length_b = np.linalg.norm(unit_bD, axis=1)
    wrong = np.flatnonzero(~(np.abs(length_b - 1.0) <= _LENGTH_TOLERANCE))
    if wrong.size:
        raise RunError(
            f"the model gives a vector without a direction (zero or not finite) for the image {keys[first + int(wrong[0])]}; look at "
            "the image, and at the model's mean and std"
        )


def check_bridge(bridge_dir: Path, embedder: Embedder) -> None:
    """Refuse a map that begins at another model. Errors: DataError; CheckpointError of a damaged one."""
    card = read_card(bridge_dir)
    begins = card.get("from_space")
    if card["dim_in"] != embedder.embedding_dim or begins not in (None, embedder.space):
        raise DataError(
            f"the map {bridge_dir} begins at {card['dim_in']} values of space {begins or 'not said'!r}; the model gives "
            f"{embedder.embedding_dim} of {embedder.space!r}. Give the map that was fitted to this model"
        )


def write_embedded(
    out: Path, rows_ND: Rows, images: ImageSet, embedder: Embedder, bridge_dir: Path | None, progress: RunProgress
) -> int:
    """Write keys, vectors, identities and space in the order of the keys, through the map where there is one; returns D."""
    bridge = None if bridge_dir is None else read_bridge(bridge_dir)
    space: str | None = embedder.space if bridge_dir is None else read_card(bridge_dir).get("to_space")
    order = np.array(sorted(range(len(images.keys)), key=images.keys.__getitem__), dtype=np.int64)
    dim = rows_ND.shape[1] if bridge is None else bridge.dim_out

    def blocks() -> Iterator[Block]:
        for low in range(0, len(order), _WRITE_ROWS):
            places = order[low : low + _WRITE_ROWS]
            rows_bD = np.array(rows_ND[places])
            if bridge is not None:
                rows_bD = map_rows(bridge, torch.from_numpy(rows_bD)).numpy()
            who = None if images.identities is None else [images.identities[place] for place in places]
            yield Block([images.keys[place] for place in places], rows_bD, who)
            progress.count("writing", min(low + _WRITE_ROWS, len(order)), len(order))

    write_vectors(out, dim, len(order), blocks(), space)
    return dim
