"""Workers of one host share their bank: filled once, the same pages, alive as long as one of them is."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from workers.errors import BadConfig
from workers.experts.bank import HostBank, Progress
from workers.experts.share import Share
from workers.experts.shared_bank import open_bank

PAIRS, BYTES = 24, 52_224  # dsv4-nano's experts are not whole pages
CONTEXT = multiprocessing.get_context("spawn")


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: a socket's path is at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dsv4-") as name:
        yield Path(name) / "share"


def everything() -> range:
    return range(PAIRS)


def fill(bank: HostBank, note: Progress) -> None:
    for pair in range(PAIRS):
        if bank.holds(pair):
            bank.expert(pair).fill_(pair + 1)
        note((pair + 1) * BYTES, PAIRS * BYTES)


def never(bank: HostBank, note: Progress) -> None:
    raise AssertionError("the bank was filled already")


def owner(folder: str, gate: multiprocessing.connection.Connection, dies_after: int | None) -> None:
    """Another worker: fills, says so, and lives until it is killed."""

    def slowly(bank: HostBank, note: Progress) -> None:
        for pair in range(PAIRS):
            if pair == dies_after:
                gate.send("half")
                time.sleep(60)
            bank.expert(pair).fill_(pair + 1)
            note((pair + 1) * BYTES, PAIRS * BYTES)

    share = Share(Path(folder), "first")
    open_bank(share, "m", everything, PAIRS, BYTES, slowly)
    gate.send("filled")
    time.sleep(60)


def num_open_banks() -> int:
    """Descriptors of banks in this process."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum("dsv4-experts" in os.readlink(link) for link in links if link.is_symlink())


def start_owner(folder: Path, dies_after: int | None = None) -> tuple[multiprocessing.process.BaseProcess, str]:
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=owner, args=(str(folder), there, dies_after), daemon=True)
    process.start()
    assert here.poll(60)
    return process, here.recv()


def is_right(bank: HostBank) -> bool:
    return all(bool((bank.expert(pair) == pair + 1).all()) for pair in range(PAIRS))


def test_the_second_worker_finds_the_first_ones_pages_and_keeps_them_when_it_is_killed(folder: Path) -> None:
    process, said = start_owner(folder)
    assert said == "filled"
    second = Share(folder, "second")
    bank = open_bank(second, "m", everything, PAIRS, BYTES, never)
    assert not bank.is_first and is_right(bank)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert is_right(bank), "the mapping outlives whoever made it"

    third = Share(folder, "third")
    again = open_bank(third, "m", everything, PAIRS, BYTES, never)
    again.expert(5).fill_(77)
    assert bool((bank.expert(5) == 77).all()), "one copy in memory"
    for share in (second, third):
        share.close()
    for other in (bank, again):
        other.close()


def test_the_next_worker_fills_when_the_first_dies_over_it(folder: Path) -> None:
    process, said = start_owner(folder, dies_after=5)
    assert said == "half"
    share, seen = Share(folder, "second"), list[tuple[int, int]]()

    def tell(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 1:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    bank = open_bank(share, "m", everything, PAIRS, BYTES, fill, tell)
    process.join()
    assert seen[0] == (5 * BYTES, PAIRS * BYTES), "the holder's progress, while we wait"
    assert seen[-1] == (PAIRS * BYTES, PAIRS * BYTES)
    assert bank.is_first and is_right(bank)
    bank.close()
    share.close()


def test_whoever_makes_the_bank_chooses_its_experts_and_other_models_have_their_own(folder: Path) -> None:
    first, second = Share(folder, "first"), Share(folder, "second")
    bank = open_bank(first, "m", lambda: range(6), PAIRS, BYTES, fill)
    found = open_bank(second, "m", everything, PAIRS, BYTES, never)
    assert np.array_equal(found.place, bank.place) and found.capacity == 6
    before = num_open_banks()
    with pytest.raises(BadConfig, match="24 experts of 52224 bytes"):
        open_bank(second, "m", everything, PAIRS + 1, BYTES, never)
    assert num_open_banks() == before >= 2, "what was refused is not kept"
    other = open_bank(second, "another model", everything, PAIRS, BYTES, fill)
    assert other.capacity == PAIRS
    for share in (first, second):
        share.close()
    for each in (bank, found, other):
        each.close()


def test_without_a_share_the_bank_is_private() -> None:
    bank = open_bank(None, "m", everything, PAIRS, BYTES, fill)
    assert bank.is_first and is_right(bank)
    bank.close()


def test_a_failed_fill_reaches_the_caller_and_frees_the_lock(folder: Path) -> None:
    share = Share(folder, "only")

    def broken(bank: HostBank, note: Progress) -> None:
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        open_bank(share, "m", everything, PAIRS, BYTES, broken)
    bank = open_bank(share, "m", everything, PAIRS, BYTES, fill)
    assert is_right(bank)
    bank.close()
    share.close()


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_caller_that_wants_no_bank_any_more_gets_its_memory_back(folder: Path, is_shared: bool) -> None:
    share = Share(folder, "only") if is_shared else None

    def stop(done: int, total: int) -> None:
        raise InterruptedError(f"{done} of {total}")

    before = num_open_banks()
    with pytest.raises(InterruptedError, match=f"{BYTES} of {PAIRS * BYTES}"):
        open_bank(share, "m", everything, PAIRS, BYTES, fill, stop)
    assert num_open_banks() == before
    if share is not None:
        share.close()


def test_a_damaged_descriptor_is_not_read_beyond_its_end(folder: Path) -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, BYTES)
    with pytest.raises(OSError, match="a bank of 2 experts"):
        HostBank.attach(fd, np.array([0, 1]), BYTES)
    os.close(fd)
    bank = HostBank(range(2), 2, BYTES)
    with pytest.raises(OSError):
        os.ftruncate(bank.fd, 0)
    bank.close()


# -- the share itself ---------------------------------------------------------------------------------------------


def test_an_offer_ends_with_its_owner_or_when_it_is_taken_back(folder: Path) -> None:
    first, second = Share(folder, "first"), Share(folder, "second")
    assert second.take("first", "slab") is None and second.take("nobody", "slab") is None
    fd = os.memfd_create("slab")
    os.write(fd, b"bytes")
    first.offer("slab", fd, {"pairs": list(range(9000))})
    os.close(fd)
    taken = second.take("first", "slab")
    assert taken is not None and taken.facts["pairs"][-1] == 8999 and os.pread(taken.fd, 5, 0) == b"bytes"
    assert not taken.is_gone(0.05)
    first.withdraw("slab")
    assert taken.is_gone(5.0) and os.pread(taken.fd, 5, 0) == b"bytes"
    taken.close()
    taken.close()
    first.close()
    first.close()
    second.close()


def test_a_restarted_worker_offers_under_its_old_name(folder: Path) -> None:
    second = Share(folder, "second")
    process, _ = start_owner(folder)
    taken = second.take("first", "bank-m")
    assert taken is not None and process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert taken.is_gone(5.0)
    process.join()
    assert second.take("first", "bank-m") is None
    again = Share(folder, "first")
    again.offer("bank-m", taken.fd, {})
    taken.close()
    found = second.find("bank-m")
    assert found is not None and found.owner == "first"
    found.close()
    for share in (again, second):
        share.close()


def test_notes_wait_for_their_writer_and_outlive_it(folder: Path) -> None:
    first, second = Share(folder, "first"), Share(folder, "second")
    assert second.wait("first", "slots", 0.1) is None
    threading.Timer(0.1, first.post, ("slots", 9600)).start()
    assert second.wait("first", "slots", 5.0) == 9600
    first.close()
    assert second.wait("first", "slots", 0.0) == 9600
    second.close()
    assert (folder.stat().st_mode & 0o777) == 0o700
