"""Files at a URL (s3://, gs://, http://, https://): fetched in parts with retries, checked by size and hash on arrival.

The door to obstore. Credentials come from the environment (AWS_..., GOOGLE_...) and are repeated nowhere.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from lce_dist.errors import DataError

_PART_BYTES = 8 << 20
_CONNECTIONS = 8
_ATTEMPTS = 6
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_PART_TIMEOUT_S = 60
_WHOLE_TIMEOUT_S = 86_400  # of a file that comes in one answer: it may take long, as long as bytes arrive
_ANEW = 3  # times a file that arrives with other bytes is fetched

T = TypeVar("T")


class Source:
    """A folder at a URL. Safe to use from several threads. Errors: DataError for a URL of no kind that is known."""

    def __init__(self, url: str) -> None:
        from obstore.store import from_url

        self.url = url.rstrip("/")
        options: dict[str, Any] = {"connect_timeout": "10s", "read_timeout": f"{_PART_TIMEOUT_S}s"}
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "") if url.startswith("s3://") else url
        if endpoint.startswith("http://"):
            options["allow_http"] = True
        # what comes back broken is asked for again here, where attempts are counted and told
        retries: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=_PART_TIMEOUT_S)}
        try:
            self._store, self._slow_store = (
                from_url(self.url, client_options={**options, "timeout": f"{timeout_s}s"}, retry_config=retries)  # type: ignore[call-overload]
                for timeout_s in (_PART_TIMEOUT_S, _WHOLE_TIMEOUT_S)
            )
        except Exception as error:  # noqa: BLE001 - obstore raises errors of several kinds for what a URL lacks
            raise DataError(
                f"{self.url} cannot be opened ({_words(error)}); must be s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or "
                "http(s)://HOST/FOLDER, with credentials in the environment"
            ) from None
        self._pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="fetch")

    def read(self, name: str) -> bytes | None:
        """A small file whole; None when it is not there. Errors: DataError."""
        import obstore

        def get() -> bytes | None:
            try:
                return bytes(obstore.get(self._store, name).bytes())
            except FileNotFoundError:
                return None

        return self._again(name, get)

    def size(self, name: str) -> int:
        """Bytes of a file. Errors: DataError."""
        import obstore

        return self._again(name, lambda: int(obstore.head(self._store, name)["size"]))

    def fetch(self, name: str, to: Path, size_bytes: int, sha256: str) -> None:
        """Write the file to ``to``, replacing what is there once all of it is known to be right.

        Errors: DataError when it is not there, may not be read, keeps breaking off, or keeps arriving with other bytes.
        """
        partial = to.with_name(f"{to.name}.{os.getpid()}.partial")
        try:
            for _ in range(_ANEW):
                self._write(name, partial, size_bytes)
                with partial.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found == sha256:
                    partial.replace(to)
                    return
            raise DataError(
                f"{self.url}/{name} came {_ANEW} times with sha256 {found[:16]}...; the manifest says {sha256[:16]}..., so it "
                "was changed there. Restore it, or pack again"
            )
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, name: str, to: Path, size_bytes: int) -> None:
        import obstore
        from obstore.exceptions import NotSupportedError

        starts = range(0, size_bytes, _PART_BYTES)
        with to.open("wb") as file:
            descriptor = file.fileno()

            def part(start: int) -> None:
                length = min(_PART_BYTES, size_bytes - start)

                def get() -> Any:
                    return obstore.get_range(self._store, name, start=start, length=length)

                got = self._again(name, get)
                if len(got) != length:
                    raise DataError(
                        f"{self.url}/{name} gave {len(got)} bytes at byte {start}; the manifest says that it has {size_bytes}. "
                        "Restore it, or pack again"
                    )
                rest = memoryview(got)
                while rest:  # a disk that is nearly full takes a part
                    rest = rest[os.pwrite(descriptor, rest, start + length - len(rest)) :]

            try:
                part(0)
            except NotSupportedError:  # a plain HTTP server: all of it, one connection
                self._again(name, lambda: self._write_whole(name, to))
                return
            parts = [self._pool.submit(part, start) for start in starts[1:]]
            try:
                for done in parts:
                    done.result()
            finally:  # nobody may write to this descriptor's number once it is another file's
                wait([one for one in parts if not one.cancel()])

    def _write_whole(self, name: str, to: Path) -> None:
        import obstore

        with to.open("wb") as file:
            for chunk in obstore.get(self._slow_store, name).stream(min_chunk_size=_PART_BYTES):
                file.write(chunk)

    def _again(self, name: str, get: Callable[[], T]) -> T:
        """The value of ``get``, which is called again after what may pass. Errors: DataError."""
        from obstore import exceptions

        pause_s = _FIRST_PAUSE_S
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return get()
            except FileNotFoundError:
                raise DataError(
                    f"{self.url}/{name} does not exist; the manifest lists it. Restore it or pack again"
                ) from None
            except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
                raise DataError(
                    f"{self.url}/{name} may not be read with the credentials of this environment; correct them "
                    "(AWS_..., GOOGLE_...), or the rights there"
                ) from None
            except exceptions.NotSupportedError:
                raise
            except (exceptions.BaseError, OSError, ValueError) as error:
                if attempt == _ATTEMPTS:
                    raise DataError(
                        f"{self.url}/{name} cannot be read after {_ATTEMPTS} attempts: {_words(error)}. Look at the store, and at "
                        "the way to it"
                    ) from None
                time.sleep(pause_s * (0.5 + random.random()))  # noqa: S311 - so that ranks do not come back together
                pause_s = min(2.0 * pause_s, _LONGEST_PAUSE_S)
        raise AssertionError("unreachable")


def _words(error: Exception) -> str:
    """What an error says, in one line, without what a query carried."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if status := re.search(r"status code: (\d{3} [A-Za-z ]+)", said):
        return f"HTTP {status.group(1).strip()}"
    return re.sub(r"\?[^\s\"')]*", "", said)[:300]
