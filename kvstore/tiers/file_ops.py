"""`FileOps`: the operating system calls of the disk tier, as one object that tests replace to make a disk fail.

Owns nothing. Every method raises `OSError` like the call it stands for.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_NOT_SUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


class FileOps:
    """Straight to the operating system."""

    def create(self, path: Path, *, direct: bool) -> int:
        """Descriptor of a new file; fails if it exists. `direct` is dropped where the file system cannot do it."""
        return self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, direct=direct)

    def open(self, path: Path, *, direct: bool) -> int:
        """Descriptor for reading."""
        return self._open(path, os.O_RDONLY, direct=direct)

    def _open(self, path: Path, flags: int, *, direct: bool) -> int:
        if direct and _O_DIRECT:
            try:
                return os.open(path, flags | _O_DIRECT | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                if exc.errno not in _NOT_SUPPORTED:
                    raise
                if flags & os.O_CREAT:
                    path.unlink(missing_ok=True)
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def preallocate(self, fd: int, length: int) -> None:
        """Take the file's blocks now, so that a full disk shows before any byte is written."""
        try:
            os.posix_fallocate(fd, 0, length)
        except OSError as exc:
            if exc.errno not in _NOT_SUPPORTED:
                raise

    def write_at(self, fd: int, data: Buffer, offset: int) -> int:
        """Write some of `data`; returns how many bytes. Releases the GIL."""
        return os.pwrite(fd, data, offset)

    def read_at(self, fd: int, into: Buffer, offset: int) -> int:
        """Fill some of `into`; returns how many bytes, 0 at the end of the file. Releases the GIL."""
        return os.preadv(fd, [into], offset)

    def size(self, fd: int) -> int:
        """Length of the file."""
        return os.fstat(fd).st_size

    def sync(self, fd: int) -> None:
        """Until the file's bytes are on stable storage."""
        os.fsync(fd)

    def sync_folder(self, folder: Path) -> None:
        """Until a rename in the folder is on stable storage."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self, fd: int) -> None:
        """Close the descriptor."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic rename within the folder."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove the file; no error when it is gone."""
        path.unlink(missing_ok=True)
