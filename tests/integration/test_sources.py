"""Shards at a URL: a real S3 server and a plain HTTP server, with faults in between, and a cache that processes share."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import http.client
import http.server
import io
import logging
import multiprocessing
import os
import signal
import socketserver
import threading
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image

from launch.parts import cache_settings
from lce_dist.config import parse_config
from lce_dist.errors import DataError
from lce_dist.world import World
from pipelines import sources
from pipelines.cache import CacheSettings, RemoteShard, ShardCache
from pipelines.importing import ImportSettings
from pipelines.manifest import PackedDataset, Quarantined, fetch_description, shard_edges, write_quarantine
from pipelines.order import BlockOrder, EpochOrder
from pipelines.pack import pack_images
from pipelines.reading import ShardReader
from pipelines.sources import Source
from pipelines.stream import ImageStream, training_plan
from pipelines.tars import index_tars
from tests.integration.conftest import CANARY


class Faults:
    """What goes wrong between client and server: answers to spoil, and how often."""

    def __init__(self) -> None:
        self.status: list[int] = []
        self.cuts = 0
        self.wrong = 0
        self.slow_s = 0.0
        self.requests: list[str] = []
        self.lock = threading.Lock()


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on to a server, or not."""

    protocol_version = "HTTP/1.1"
    faults: Faults
    upstream: tuple[str, int]

    def do_GET(self) -> None:
        faults = self.faults
        with faults.lock:
            faults.requests.append(f"{self.command} {self.path}")
            status = faults.status.pop(0) if faults.status else 0
            is_data = self.path.endswith(".tar")
            cut, faults.cuts = bool(faults.cuts and is_data), faults.cuts - bool(faults.cuts and is_data)
            wrong, faults.wrong = bool(faults.wrong and is_data), faults.wrong - bool(faults.wrong and is_data)
        if status:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        time.sleep(faults.slow_s)
        connection = http.client.HTTPConnection(*self.upstream)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(body)))
        self.end_headers()
        if wrong and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    generator = np.random.default_rng(0)

    def images():
        for number in range(120):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(file, "JPEG")
            yield f"id{number % 12:02}", f"image{number}", file.getvalue()

    pack_images(images(), [f"id{n:02}" for n in range(12)], 120, folder / "data", "faces", "source", 60_000)
    return folder / "data"


@pytest.fixture(scope="module")
def store(packed):
    """The data set in a bucket of a real S3 server behind a proxy that can fail."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": CANARY, "AWS_REGION": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="faces")
    for path in packed.iterdir():
        client.upload_file(str(path), "faces", f"set/{path.name}")
    faults = Faults()
    handler = type("Handler", (Proxy,), {"faults": faults, "upstream": (host, port)})
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_port}"
    yield faults
    proxy.shutdown()
    server.stop()
    os.environ.clear()
    os.environ |= before


@pytest.fixture
def faults(store, monkeypatch) -> Faults:
    store.__init__()
    monkeypatch.setattr(sources, "_FIRST_PAUSE_S", 0.01)
    return store


URL = "s3://faces/set"


def shards_of(packed: Path) -> list[RemoteShard]:
    dataset = PackedDataset.open(packed)
    return [dataset.remote_shard(number) for number in range(len(dataset.manifest.shards))]


def batches(dataset: PackedDataset, order) -> list[tuple[torch.Tensor, torch.Tensor]]:
    view = dataset.select(dataset.identities)
    plan = training_plan(order, 0, 1, 0, order.steps_per_epoch + 2)
    with ImageStream(view, plan, 16, None, 1, torch.device("cpu")) as stream:
        return [(batch.images.clone(), batch.sample_ids) for batch in stream]


def test_training_reads_the_same_from_a_bucket_cold_and_warm(faults, packed, tmp_path):
    local = PackedDataset.open(packed)
    assert len(local.manifest.shards) >= 4
    folder = fetch_description(URL, tmp_path / "cache")
    remote = PackedDataset.open(folder, CacheSettings(tmp_path / "shards", 1.0))
    assert remote.is_remote and remote.fingerprint == local.fingerprint
    assert remote.sample_key(5) == local.sample_key(5)
    edges = shard_edges(local.select(local.identities))
    assert len(edges) == len(local.manifest.shards) + 1
    for order in (EpochOrder(120, 16, 3), BlockOrder(edges, 16, 3, 2, 2)):
        for (ours, ids), (truth, true_ids) in zip(batches(remote, order), batches(local, order), strict=True):
            assert torch.equal(ids, true_ids) and torch.equal(ours, truth)
    fetched = remote.cache.fetched
    assert fetched.misses == len(local.manifest.shards)
    assert fetched.bytes_fetched == sum(shard.size_bytes for shard in local.manifest.shards)
    before = len([line for line in faults.requests if line.endswith(".tar")])
    again = PackedDataset.open(folder, CacheSettings(tmp_path / "shards", 1.0))
    batches(again, EpochOrder(120, 16, 3))
    assert len([line for line in faults.requests if line.endswith(".tar")]) == before
    assert again.cache.fetched.misses == 0 and again.cache.fetched.hits >= len(local.manifest.shards)


def test_a_description_is_fetched_once_and_its_quarantine_every_time(faults, packed, tmp_path):
    folder = fetch_description(URL, tmp_path)
    faults.requests.clear()
    assert fetch_description(URL + "/", tmp_path) == folder
    assert [line.rpartition("/")[2] for line in faults.requests] == ["manifest.json", "quarantine.json"]
    write_quarantine(folder, [Quarantined(3, "key", "of another time")])
    assert len(PackedDataset.open(fetch_description(URL, tmp_path)).quarantined) == 0
    with pytest.raises(DataError, match=r"s3://faces/nothing has no manifest.json; packing writes it last"):
        fetch_description("s3://faces/nothing", tmp_path)


def test_indexed_tars_need_a_root_that_is_a_url(packed, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for path in packed.glob("*.tar"):
        (tars / path.name).write_bytes(path.read_bytes())
    index_tars(sorted(tars.glob("*.tar")), tars, tmp_path / "faces", ImportSettings(), 1)
    url, manifest = f"file://{tmp_path}/faces", tmp_path / "faces" / "manifest.json"
    text = manifest.read_text()
    for root in ("../tars", str(tars), "below/../../tars"):
        manifest.write_text(text.replace('"../tars"', f'"{root}"'))
        with pytest.raises(DataError, match=rf'faces has its shards at .*{root}.*write where they are as "root" into'):
            fetch_description(url, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    manifest.write_text(text.replace('"../tars"', f'"file://{tars}"'))
    remote = PackedDataset.open(fetch_description(url, tmp_path / "cache"), CacheSettings(tmp_path / "s", 1.0))
    ids = np.arange(remote.num_samples)
    ours, theirs = (ShardReader(one).read(ids) for one in (remote, PackedDataset.open(packed)))
    assert [one.tobytes() for one in ours] == [one.tobytes() for one in theirs]


@pytest.mark.parametrize("fault", ["503", "500s of all kinds", "cut", "wrong bytes", "slow"])
def test_what_passes_is_tried_again(faults, packed, tmp_path, fault):
    faults.status = {"503": [503, 503], "500s of all kinds": [500, 502, 503, 504, 429]}.get(fault, [])
    faults.cuts, faults.wrong, faults.slow_s = (
        2 * (fault == "cut"),
        2 * (fault == "wrong bytes"),
        0.3 * (fault == "slow"),
    )
    shard = shards_of(packed)[1]
    cache = ShardCache(Source(URL), CacheSettings(tmp_path, 1.0))
    assert cache.path(shard).read_bytes() == (packed / shard.name).read_bytes()
    assert cache.fetched.misses == 1 and not list(tmp_path.glob("*.partial"))


def test_what_does_not_pass_is_one_line_that_names_it(faults, packed, tmp_path, monkeypatch):
    shard = shards_of(packed)[0]
    cache = ShardCache(Source(URL), CacheSettings(tmp_path, 1.0))
    monkeypatch.setattr(sources, "_LONGEST_PAUSE_S", 0.02)
    faults.status = [503] * 20
    with pytest.raises(DataError, match=rf"{URL}/{shard.name} cannot be read after 6 attempts: HTTP 503") as caught:
        cache.path(shard)
    assert len(faults.status) == 14 and "\n" not in str(caught.value) and CANARY not in str(caught.value)
    faults.status = [403]
    with pytest.raises(DataError, match="may not be read with the credentials of this environment"):
        cache.path(shard)
    assert faults.status == []
    faults.wrong = 10
    with pytest.raises(DataError, match=r"came 3 times with sha256 [0-9a-f]{16}\.\.\.; the manifest says"):
        cache.path(shard)
    faults.wrong = 0
    with pytest.raises(DataError, match=f"{URL}/gone.tar does not exist; the manifest lists it"):
        cache.path(RemoteShard("gone.tar", 10, "0" * 64))
    with pytest.raises(DataError, match=r"cluster.cache_gib is .*e-07; shard .* GiB. Raise it"):
        ShardCache(Source(URL), CacheSettings(tmp_path, 1e-6)).path(shard)
    with pytest.raises(DataError, match=r"cannot be opened .* must be s3://BUCKET/FOLDER"):
        Source("ftp://somewhere/x")
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]


def test_a_plain_http_server_without_ranges(packed, tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

    with socketserver.ThreadingTCPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(packed.parent))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/data"
        remote = PackedDataset.open(fetch_description(url, tmp_path / "d"), CacheSettings(tmp_path / "s", 1.0))
        truth = batches(PackedDataset.open(packed), EpochOrder(120, 30, 1))
        for (ours, _), (theirs, _) in zip(batches(remote, EpochOrder(120, 30, 1)), truth, strict=True):
            assert torch.equal(ours, theirs)
        server.shutdown()


PARTS = 10_000  # bytes; a shard here has 60,000


@pytest.mark.parametrize("fault", ["none", "503", "cut", "wrong bytes"])
def test_a_shard_that_comes_in_parts_is_whole(faults, packed, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(sources, "_PART_BYTES", PARTS)
    faults.status = [503, 500, 503] if fault == "503" else []
    faults.cuts, faults.wrong = 3 * (fault == "cut"), fault == "wrong bytes"
    shard = shards_of(packed)[1]
    cache = ShardCache(Source(URL), CacheSettings(tmp_path, 1.0))
    assert cache.path(shard).read_bytes() == (packed / shard.name).read_bytes()
    asked = len([line for line in faults.requests if line.endswith(".tar")])
    num_parts = -(-shard.size_bytes // PARTS)
    assert num_parts >= 5
    assert asked == {"none": 1, "503": 1, "cut": 1, "wrong bytes": 2}[fault] * num_parts + 3 * (fault in ("503", "cut"))


def test_no_part_is_written_after_another_has_failed(tmp_path, monkeypatch):
    """The number of a closed descriptor may be another file's by then."""
    import obstore

    monkeypatch.setattr(sources, "_PART_BYTES", 10)
    written: list[int] = []
    pwrite = os.pwrite

    def noted(descriptor: int, payload: bytes, start: int) -> int:
        written.append(start)
        return pwrite(descriptor, payload, start)

    def get_range(store: object, name: str, *, start: int, length: int) -> bytes:
        if start == 10:
            time.sleep(0.1)
            return b"short"
        time.sleep(0.4 * (start > 0))
        return b"x" * length

    monkeypatch.setattr(os, "pwrite", noted)
    monkeypatch.setattr(obstore, "get_range", get_range)
    with pytest.raises(DataError, match="gave 5 bytes at byte 10"):
        Source("http://127.0.0.1:9/set").fetch("a.tar", tmp_path / "a.tar", 300, "0" * 64)
    before = len(written)
    time.sleep(0.8)
    assert 1 < before == len(written) < 30  # those under way ended, others never began
    assert not list(tmp_path.iterdir())


def test_a_plain_http_server_may_be_slow(tmp_path, monkeypatch):
    """As long as bytes arrive; one that stands still is asked again, and given up."""
    payload, stalls = bytes(range(256)) * 120, []

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            for start in range(0, len(payload), 2048):
                if stalls and start:
                    stalls.append(self.path)
                    time.sleep(2.5)
                    return
                self.wfile.write(payload[start : start + 2048])
                time.sleep(0.2)

        def log_message(self, *words: object) -> None:
            pass

    monkeypatch.setattr(sources, "_PART_TIMEOUT_S", 1)
    monkeypatch.setattr(sources, "_ATTEMPTS", 2)
    monkeypatch.setattr(sources, "_FIRST_PAUSE_S", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Source(f"http://127.0.0.1:{server.server_address[1]}/set")
        start_s = time.monotonic()
        source.fetch("a.tar", tmp_path / "a.tar", len(payload), hashlib.sha256(payload).hexdigest())
        assert time.monotonic() - start_s > 2 and (tmp_path / "a.tar").read_bytes() == payload
        stalls.append("from now on")
        with pytest.raises(DataError, match="cannot be read after 2 attempts"):
            source.fetch("b.tar", tmp_path / "b.tar", len(payload), hashlib.sha256(payload).hexdigest())
        server.shutdown()


def test_the_least_lately_used_goes_and_what_is_open_stays(faults, packed, tmp_path):
    shards = shards_of(packed)
    room = (shards[0].size_bytes + shards[1].size_bytes + 1000) / 2**30
    cache = ShardCache(Source(URL), CacheSettings(tmp_path, room))
    first = cache.open(shards[0])
    cache.path(shards[1])
    time.sleep(0.02)
    cache.path(shards[0])
    cache.path(shards[2])  # room for two: the second goes
    there = {path.name for path in tmp_path.iterdir() if len(path.name) == 64}
    assert there == {shards[0].sha256, shards[2].sha256}
    time.sleep(0.02)
    cache.path(shards[2])
    cache.path(shards[3])  # the first is older but open
    there = {path.name for path in tmp_path.iterdir() if len(path.name) == 64}
    assert there == {shards[0].sha256, shards[3].sha256}
    os.close(first)


def _read_all(folder: str, description: str, gib: float, ranks: int, rank: int, ready, told) -> None:
    told_words: list[str] = []
    logging.getLogger("pipelines.cache").addHandler(handler := logging.Handler())
    handler.emit = lambda record: told_words.append(record.getMessage())  # type: ignore[method-assign]
    dataset = PackedDataset.open(Path(description), CacheSettings(Path(folder), gib, ranks))
    reader = ShardReader(dataset)
    ready.wait(60)
    order = EpochOrder(dataset.num_samples, 4, rank)
    for step in range(8):
        ids = order.batch(step)
        reader.prefetch(order.batch(step + 1))
        reader.read(ids)
    reader.close()
    told.put(told_words)


def _bytes_there(folder: Path) -> int:
    there = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            there += path.stat().st_size
    return there


@pytest.mark.parametrize("knows", [True, False])
def test_ranks_of_a_node_keep_one_limit_together(faults, packed, tmp_path, knows):
    """Three ranks that know of each other; and three of one each, that are told of it."""
    description = fetch_description(URL, tmp_path / "cache")
    largest = max(shard.size_bytes for shard in shards_of(packed))
    faults.slow_s = 0.02
    limit = (6 if knows else 2) * largest
    context = multiprocessing.get_context("spawn")
    told, ready, folder = context.Queue(), context.Barrier(4), tmp_path / "shards"
    folder.mkdir()
    arguments = (str(folder), str(description), limit / 2**30, 3 if knows else 1)
    ranks = [context.Process(target=_read_all, args=(*arguments, rank, ready, told)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    ready.wait(60)
    most = 0
    while any(rank.is_alive() for rank in ranks) and told.qsize() < 3:
        most = max(most, _bytes_there(folder))
        time.sleep(0.001)
    words = [told.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    if knows:
        assert most <= limit + 100 and not any(words)  # and what locks say
    else:
        assert any("cluster.cache_gib is" in line for lines in words for line in lines)
        assert all(len(lines) <= 1 for lines in words)


def test_too_little_for_the_ranks_of_a_node_is_said_at_once(faults, packed, tmp_path):
    description = fetch_description(URL, tmp_path / "cache")
    gib = 15 * max(shard.size_bytes for shard in shards_of(packed)) / 2**30
    few, many = (PackedDataset.open(description, CacheSettings(tmp_path / "s", gib, ranks)) for ranks in (7, 8))
    assert few.cache.holds_bytes == int(gib * 2**30) // 28
    with pytest.raises(
        DataError, match=r"cluster.cache_gib is .*; 8 ranks of a node hold two shards each, .* Raise it"
    ):
        _ = many.cache
    section = {"net": "tiny8", "embedding_dim": 8}
    config = parse_config(
        {"data": {"shards": "x"}, "old": section, "new": section, "head": {"loss": "softmax"}}, "test", json_mode=True
    )
    assert cache_settings(config).ranks == 1 and cache_settings(config, World(3, 16, 2)).ranks == 8


def _fetch_all(folder: str, shards: list[RemoteShard], counts) -> None:
    cache = ShardCache(Source(URL), CacheSettings(Path(folder), 1.0))
    for shard in shards:
        cache.prefetch(shard)
    for shard in shards:
        os.close(cache.open(shard))
    counts.put((cache.fetched.hits, cache.fetched.misses))


def test_ranks_of_a_node_fetch_each_shard_once(faults, packed, tmp_path):
    faults.slow_s = 0.05
    shards = shards_of(packed)
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    ranks = [context.Process(target=_fetch_all, args=(str(tmp_path), shards, counts)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    told = [counts.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    assert sum(misses for _, misses in told) == len(shards)
    assert all(hits + misses == len(shards) for hits, misses in told)


def test_a_killed_rank_leaves_nothing_that_is_taken_for_whole(faults, packed, tmp_path):
    faults.slow_s = 0.4
    shards = shards_of(packed)
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    rank = context.Process(target=_fetch_all, args=(str(tmp_path), shards, counts))
    rank.start()
    deadline_s = time.monotonic() + 30
    while not any(".partial" in path.name for path in tmp_path.iterdir()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    faults.slow_s = 0.0
    whole = {path.name for path in tmp_path.iterdir() if len(path.name) == 64}
    assert all(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == name for name in whole)
    cache = ShardCache(Source(URL), CacheSettings(tmp_path, 1.0))
    for shard in shards:
        assert cache.path(shard).read_bytes() == (packed / shard.name).read_bytes()
    for lock in tmp_path.glob("*.lock"):
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more


def test_the_cache_keeps_its_limit_while_an_epoch_is_read(faults, packed, tmp_path):
    local = PackedDataset.open(packed)
    sizes = [shard.size_bytes for shard in local.manifest.shards]
    limit = 3 * max(sizes)
    folder = fetch_description(URL, tmp_path / "cache")
    remote = PackedDataset.open(folder, CacheSettings(tmp_path / "shards", limit / 2**30))
    order = BlockOrder(shard_edges(remote.select(remote.identities)), 16, 3, 1, 1)
    view = remote.select(remote.identities)
    most = 0
    with ImageStream(view, training_plan(order, 0, 1, 0, 12), 16, None, 1, torch.device("cpu")) as stream:
        for _ in stream:
            lies = 0
            for path in (tmp_path / "shards").iterdir():
                with contextlib.suppress(FileNotFoundError):  # it made room in between
                    lies += path.stat().st_size
            most = max(most, lies)
    assert 0 < most <= limit < sum(sizes)
