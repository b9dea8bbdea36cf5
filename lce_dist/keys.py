"""Hashes that stand for keys of samples and identities, so that nobody has to keep, or read, the keys themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def hash_keys(keys: Sequence[str]) -> npt.NDArray[np.uint64]:
    """(n, 2) two independent halves of 128 bits: that two of 10^7 keys agree in both has a chance of 1e-25."""
    hashes = b"".join(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest() for key in keys)
    return np.frombuffer(hashes, dtype="<u8").astype(np.uint64).reshape(len(keys), 2)
