"""A store over HTTP with a limit: all connections together get so many bytes a second, as a network card or a bucket gives them."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PIECE_BYTES = 64 << 10


class Limit:
    """Hands out the right to send bytes, at ``bytes_per_s`` over all who ask."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = time.monotonic()
        self._lock = threading.Lock()

    def wait(self, count: int) -> None:
        """Returns when ``count`` bytes may be sent."""
        with self._lock:
            now_s = time.monotonic()
            self._free_at_s = max(self._free_at_s, now_s) + count / self._bytes_per_s
            pause_s = self._free_at_s - now_s
        time.sleep(pause_s)


@contextmanager
def store(folder: Path, bytes_per_s: float) -> Iterator[str]:
    """The URL at which the files of ``folder`` are, whole or in ranges of bytes, while the block lasts."""
    limit = Limit(bytes_per_s)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = folder / Path(self.path).name
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = path.stat().st_size
            first, last = 0, size - 1
            asked = self.headers.get("Range")
            if asked is not None:
                low, _, high = asked.removeprefix("bytes=").partition("-")
                first, last = int(low), min(int(high), size - 1) if high else size - 1
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
            self.end_headers()
            if not with_body:
                return
            with path.open("rb") as file:
                file.seek(first)
                left = last - first + 1
                while left:
                    piece = file.read(min(_PIECE_BYTES, left))
                    limit.wait(len(piece))
                    self.wfile.write(piece)
                    left -= len(piece)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
