"""Routed FP4 experts at decode with a share of them in another process's slab, on another GPU when there are two.

    python -m tests.bench.kernels.experts_peer [--tokens 1 8 32 64 128] [--shares 0 12 25 50 100]

Owner: a process on the last GPU in sight, whose slab is mapped here as in serving (`workers/gpu/peer_slab.py`). Absent
experts are read in place on sm_90 and pass through scratch elsewhere. Floor: the larger of the local bytes at copy
bandwidth and the peer's bytes at the speed of a plain copy from there. Outputs of the routed experts are compared bit
for bit with those of local ones; only the table differs between rows. Result (two H200s, 2026-11-21, plain copy 395
GB/s): 235, 321 and 331 GB/s from the peer at 1, 8 and 32 tokens with a quarter of the experts there (through scratch
229, 326, 353).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys

import torch

from tests.bench.kernels.experts_decode import CHOICES, EXPERTS, LAYOUT, Step, random_ids, random_slab, steps_of
from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, report
from workers.experts.layout import ExpertSlab, Tier, code_of
from workers.gpu.peer_slab import PeerWindow, SharedSlab

SEED = 7
COPIED = 64
"""Experts of one plain copy from the peer: 0.9 GB."""


def own(link: socket.socket, device: int) -> None:
    """The other process: the same random experts, on another device."""
    torch.cuda.set_device(device)
    slab = SharedSlab(EXPERTS * LAYOUT.expert_bytes, f"cuda:{device}")
    torch.manual_seed(SEED)
    size = EXPERTS * LAYOUT.expert_bytes
    slab.memory[:size].copy_(random_slab(2 * EXPERTS).base[:size])
    torch.cuda.synchronize()
    fd = slab.export()
    socket.send_fds(link, [json.dumps(slab.block_bytes).encode()], [fd])
    link.recv(1)


def start_owner(device: int) -> tuple[subprocess.Popen[bytes], socket.socket, int, int]:
    """Its process, our end of the socket (closing it ends the process), descriptor and bytes of its slab."""
    here, there = socket.socketpair()
    command = [sys.executable, "-m", __spec__.name, "own", str(there.fileno()), str(device)]
    process = subprocess.Popen(command, pass_fds=[there.fileno()])
    there.close()
    told, fds, _, _ = socket.recv_fds(here, 100, 1)
    return process, here, fds[0], json.loads(told)


def rows_of(tokens: int, shares: list[int], slab: ExpertSlab, peer_rate: float, local_rate: float) -> list[Row]:
    """Every share (percent) at one batch size; rates in bytes a second. Raises AssertionError when a bit differs."""
    steps: list[Step] = steps_of(slab, lambda: random_ids(tokens), 8 if tokens == 1 else 4)
    calls = [call for step in steps for call in (step.gate_up, step.down)]
    order, rows, expected = torch.randperm(EXPERTS), [], None
    for share in shares:
        there = order[: round(share / 100 * EXPERTS)]
        slab.table.copy_(torch.arange(EXPERTS, dtype=torch.int32))
        slab.table[there.cuda()] = (there.int() + code_of(Tier.PEER, 0)).cuda()
        ms = 2 * graph_ms(calls, replays=5)
        found = [step.out[:, :CHOICES].clone() for step in steps]
        expected = expected or found
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "bits differ"
        total = sum(step.gate_up_bytes + step.down_bytes for step in steps) / len(steps)
        read = sum(int(torch.isin(step.ids.unique().cpu(), there).sum()) for step in steps) / len(steps)
        far = read * LAYOUT.expert_bytes
        floor = max(far / peer_rate, (total - far) / local_rate) * 1e3
        note = (
            f"{read:.1f} of {steps[0].num_active} experts there, {far / ms / 1e6:.0f} GB/s of it, floor {floor:.3f} ms"
        )
        rows.append(Row(f"T={tokens}, {share} % at the peer", ms, total, note=note))
        print(f"{rows[-1].name}: {ms:.3f} ms, {note}", flush=True)
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--shares", type=int, nargs="+", default=[0, 12, 25, 50, 100])
    chosen = parser.parse_args()
    device = torch.cuda.device_count() - 1
    torch.cuda.set_device(0)
    process, link, fd, block_bytes = start_owner(device)
    window = PeerWindow("cuda:0")
    window.open(fd, block_bytes)
    os.close(fd)
    torch.manual_seed(SEED)
    local = random_slab(2 * EXPERTS)
    # The bank is there as in serving, and nobody is in it.
    slab = dataclasses.replace(
        local,
        table=local.table[:EXPERTS],
        host=torch.zeros(LAYOUT.expert_bytes, dtype=torch.uint8).pin_memory(),
        peer=window.memory,
        first_scratch=EXPERTS,
        num_scratch=EXPERTS,
    )
    staging = torch.empty(COPIED * LAYOUT.expert_bytes, dtype=torch.uint8, device="cuda")
    copy_ms = graph_ms([lambda: staging.copy_(window.memory[: staging.numel()], non_blocking=True)] * 3)
    peer_rate, local_rate = staging.numel() / copy_ms * 1e3, copy_bandwidth()
    print(f"owner on cuda:{device} of {device + 1}; plain copy from it {peer_rate / 1e9:.0f} GB/s")
    rows = [
        row for tokens in chosen.tokens for row in rows_of(tokens, chosen.shares, slab, peer_rate, local_rate * 1e9)
    ]
    report(rows, local_rate)
    link.close()
    process.wait()
    window.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["own"]:
        own(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
    else:
        main()
