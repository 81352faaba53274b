"""The one payload checksum: XXH3 with 64 bits, named in every header that carries it. Torch-free.

XXH3 runs at memory speed on one core and xxhash releases the GIL on large buffers, so it can run in a side thread while
the event loop moves the next segment. Not a defence against tampering.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHECKSUM_NAME = "xxh3_64"
"""Goes into headers; a reader refuses any other name."""


def checksum(data: Buffer) -> int:
    """Unsigned 64-bit XXH3 of the bytes."""
    return xxhash.xxh3_64_intdigest(data)
