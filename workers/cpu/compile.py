"""How the CPU kernels are compiled and where the machine code is kept.

Owns: the two `jit` decorators and the cache folder. Compiled code is cached per content of this package: numba checks
only the file of the outermost function, so a folder named by the digest of all sources keeps an edited helper from
being linked from an old build. The folder is the checkout's `.numba_cache`, or the user's cache folder when the
checkout is read-only, or a temporary one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

PACKAGE = Path(__file__).resolve().parent


def source_digest() -> str:
    """16 hex digits of every source file of this package."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _candidates() -> list[Path]:
    user = Path(os.path.expanduser("~")) / ".cache" / "dsv4-cluster"
    return [PACKAGE.parents[1] / ".numba_cache", user / "numba", Path(tempfile.gettempdir()) / "dsv4-cluster-numba"]


def cache_folder(candidates: list[Path] | None = None) -> Path | None:
    """The first writable candidate's folder of this build, or `None`: then every start compiles anew."""
    for base in candidates if candidates is not None else _candidates():
        folder = base / source_digest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


CACHE_FOLDER = cache_folder()
if CACHE_FOLDER is not None:
    numba.config.CACHE_DIR = str(CACHE_FOLDER)


def _jit(fastmath: set[str] | bool) -> Callable[[Callable[..., Any]], Any]:
    caching = CACHE_FOLDER is not None
    return numba.njit(nogil=True, cache=caching, error_model="numpy", boundscheck=False, fastmath=fastmath)


jit = _jit(False)
"""Strict IEEE arithmetic: number formats and everything that must match the reference bit for bit."""

jit_sums = _jit({"reassoc", "contract", "nnan", "nsz"})
"""Sums and maxima may be split over vector lanes. The split depends on the length alone, never on the batch."""
