"""How much host memory may still be taken, and how much is page cache, by machine and control group. Torch-free."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

NO_LIMIT = 1 << 60
"""Version 1 of control groups says so with the largest number of whole pages."""


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes that processes here can still have: what the kernel says is available, within the group's limit.

    Page cache counts as free on both sides. A limit above what the machine has now is believed: such machines are
    virtual and get more as they use it.
    """
    free, whole = (_field(meminfo, f"Mem{name}:") * 1024 for name in ("Available", "Total"))
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        most, now = _number(cgroup / limit), _number(cgroup / used)
        if most is not None and now is not None:
            cached = _field(cgroup / stat, "inactive_file") + _field(cgroup / stat, "active_file")
            left = max(0, most - now + cached)
            free = left if whole < most < NO_LIMIT else min(free, left)
    return free


def page_cache_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes of files that the control group's processes keep in memory; the machine's without a group.

    All files count, not only those of experts. Shared memory does not: the kernel reports it inside the same sum.
    """
    for stat, files, shared in (
        (cgroup / "memory.stat", "file", "shmem"),
        (cgroup / "memory/memory.stat", "total_cache", "total_shmem"),
    ):
        if stat.exists():
            return max(0, _field(stat, files) - _field(stat, shared))
    return max(0, _field(meminfo, "Cached:") - _field(meminfo, "Shmem:")) * 1024


def _number(path: Path) -> int | None:
    """The file's only number; None without the file or a limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int:
    """The first number after `name` at a line's start; 0 without it."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
