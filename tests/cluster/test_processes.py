"""Processes are named by pid and start time, and ending them is verified."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.processes import ProcessRef, descendants, end_all, wait_gone

IGNORES_TERM = (
    "import signal,sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
)
PARENT = f"import subprocess,sys; subprocess.run([sys.executable, '-c', {IGNORES_TERM!r}])"


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", IGNORES_TERM], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_process_that_ignores_sigterm_is_killed(stubborn: subprocess.Popen[bytes]) -> None:
    ref = ProcessRef.of(stubborn.pid)
    assert ref.is_alive
    assert end_all([ref], grace_s=0.0) == ()
    assert not ref.is_alive


def test_another_process_with_the_same_pid_is_not_touched(stubborn: subprocess.Popen[bytes]) -> None:
    ref = ProcessRef.of(stubborn.pid)
    older = ProcessRef(ref.pid, ref.created - 100.0)
    assert not older.is_alive
    assert end_all([older], grace_s=0.0) == ()
    assert ref.is_alive


def test_grandchildren_are_found() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"up\n"
    found = [ref for ref in descendants(os.getpid()) if ref.pid != parent.pid]
    own = descendants(parent.pid)
    assert own and set(own) <= set(found)
    assert end_all([ProcessRef.of(parent.pid), *own], grace_s=0.0) == ()
    parent.wait()
    parent.stdout.close()


def test_waiting_returns_those_that_still_run(stubborn: subprocess.Popen[bytes]) -> None:
    ref = ProcessRef.of(stubborn.pid)
    assert wait_gone([ref], timeout_s=0.0) == (ref,)


def test_a_pid_that_never_was_has_no_reference() -> None:
    assert ProcessRef.of(2**22 + 5) is None


def test_an_orphan_of_a_dead_child_is_ended_too() -> None:
    script = (
        "import subprocess, sys\n"
        "from cluster.processes import adopt_orphans, end_descendants\n"
        "adopt_orphans()\n"
        "child = subprocess.run(['sh', '-c', 'sleep 60 >/dev/null & echo $!'], stdout=subprocess.PIPE, text=True)\n"
        "assert end_descendants((), grace_s=0.0) == ()\n"
        "sys.stdout.write(child.stdout)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=30, check=True)
    orphan = ProcessRef.of(int(done.stdout))
    assert orphan is None or not orphan.is_alive
