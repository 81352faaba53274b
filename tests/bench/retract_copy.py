"""Retract and resume on a GPU: one launch and one copy against torch indexing. `python -m tests.bench.retract_copy`.

Pools have V4-Flash shapes (43 layers, 21 C4, 20 C128; fp8) and more than 2^31 bytes each where it matters; pages are
scattered. Host memory is pinned before, as a tier's slab is, and the header is planned before, as a reservation does.

Floor. Bytes of 32,768 tokens: 130 MB. The host link moves 54 GB/s (pinned, 2 GiB; shared measurements): 2.4 ms either
way. The gather reads and writes device memory once: 260 MB at 4.2 TB/s, 0.06 ms; it is hidden behind the link except
for the first block. Predicted: retract 2.9 ms at 32K (planning 0.4 ms on the host), 85 % of the link, more at 128K,
less at 1K, where 15 us launches and 0.1 ms of planning stand against 0.35 ms. Torch indexing makes 167 (layer,
pool) pairs of 2-3 launches, 4-6 ms whatever the context, so the gather alone should be 20x-60x faster up to 32K.
Decode of the rest loses the gather's memory traffic and the link's: 0.06 + 0.03 ms in each 2.6 ms of copying, 2-4 %,
while a copy runs.

# measured: one H200, 2026-11-21, torch 2.11, triton 3.6 (table in RESULTS.md). 32K tokens: out 2.99 ms, in 2.91 ms, 83
and 85 % of the link; 128K: 89 and 88 %. Gather alone 168x, 76x, 23x at 1K, 8K, 32K on the device; with the copy to the
host 24x, 12x, 23x. Decode +0.84 % while copying out and +1.00 % while copying in without a pause: half of the
prediction, because a copy lasts 3 ms of each 4 ms step and its gather runs for 0.1 ms of them. The staging ring was
first 128 MiB, which cuts 32K tokens in three: gather 0.130 ms; at 192 MiB 0.112 ms. Tiles of 8 to 32 KiB and 2 to 8
warps differ by 7 %.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from kvstore.ids import PageId, SlotId
from kvstore.image import KVImage
from kvstore.pools.aggregate import KVPools, PoolSizes
from kvstore.sequence_kv import SequenceIndices
from kvstore.spec import IndexSpace
from kvstore.tiers.base import planned_header
from tests.kvstore.layouts import flash_spec

CONTEXTS = (1024 + 77, 8192 + 77, 32768 + 77, 131072 + 77)
SIZES = PoolSizes(full_pages=3000, window_pages=360, slots=220)
SEED = 3


def scattered(n: int, generator: torch.Generator, parity: int) -> SequenceIndices:
    """Random places, of one parity, so that sources and targets never meet; the last unit of each space is used."""

    def units(count: int, total: int) -> list[int]:
        own = torch.arange(parity, total, 2)
        chosen = own[torch.randperm(len(own), generator=generator)[:count]].tolist()
        chosen[-1] = int(own[-1]) if int(own[-1]) not in chosen else chosen[-1]
        return chosen

    pages = -(-n // 256)
    window: list[PageId | None] = [None] * pages
    first = max(0, n - 128) // 256
    for logical, unit in zip(range(first, pages), units(pages - first, SIZES.window_pages), strict=True):
        window[logical] = PageId(unit)
    full = tuple(PageId(unit) for unit in units(pages, SIZES.full_pages))
    return SequenceIndices(full, tuple(window), SlotId(SIZES.slots - 2 + parity), n)


def wall_ms(action: Callable[[], object], repeats: int = 10, warmup: int = 2) -> float:
    """Median wall time with the device idle before and after."""
    times = []
    for i in range(repeats + warmup):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        if i >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def device_ms(action: Callable[[], object], repeats: int = 10) -> float:
    """Median time between events; a long kernel before hides the host's share."""
    times = []
    filler = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(8):
            filler.random_()
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def reserved(pools: KVPools, n: int) -> KVImage:
    header = planned_header(pools.spec, n, request_id="bench")
    return KVImage(header, torch.empty(header.payload_bytes, dtype=torch.uint8, pin_memory=True))


class Indexed:
    """The straightforward way: for each pool and layer, torch indexing with precomputed units and offsets."""

    def __init__(self, pools: KVPools, indices: SequenceIndices) -> None:
        self.pairs = []
        for pool in pools.pools:
            at = pool.locations(pool.spec.live_rows(indices.num_tokens), indices)
            if len(at):
                self.pairs.append((pool, *pool._address(at)))

    def gather(self, to_host: bool = False) -> list[torch.Tensor]:
        out = []
        for pool, unit, offset in self.pairs:
            for layer in range(len(pool.spec.layers)):
                for plane in pool._planes:
                    rows = plane[layer][unit, offset]
                    out.append(rows.cpu() if to_host else rows)
        return out

    def scatter(self, host: list[torch.Tensor]) -> None:
        each = iter(host)
        for pool, unit, offset in self.pairs:
            for layer in range(len(pool.spec.layers)):
                for plane in pool._planes:
                    plane[layer].index_put_((unit, offset), next(each).to(plane.device))


def link(report: dict[str, Any]) -> None:
    """(a): pinned copies."""
    size = 512 << 20
    host, device = (
        torch.empty(size, dtype=torch.uint8, pin_memory=True),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    device.random_()
    out = size / 1e6 / wall_ms(lambda: host.copy_(device, non_blocking=True), 5)
    into = size / 1e6 / wall_ms(lambda: device.copy_(host, non_blocking=True), 5)
    report["link"] = {"d2h_gb_s": out, "h2d_gb_s": into}
    print(f"pinned link, 512 MiB: D2H {out:.1f} GB/s, H2D {into:.1f} GB/s", flush=True)


def exactness(pools: KVPools, report: dict[str, Any]) -> None:
    """Round trips into other, poisoned places; the whole of every pool is compared with the plain path's."""
    generator = torch.Generator().manual_seed(SEED)
    checked = []
    for n in (1, 127, 128, 255, 256, 257, 5003, 32768 + 77, 131072 + 77):
        source, target = scattered(n, generator, 0), scattered(n, generator, 1)
        image = pools.start_cpu_copy(source, reserved(pools, n)).image()
        for segment in image.header.segments:
            expected = pools.export_rows(segment.place, source)
            assert torch.equal(image.segment_rows(segment, pools.spec), expected), (n, segment.place)
        pools.poison(target)
        whole = {pool.spec.name: pool.data.clone() for pool in pools.pools}
        load = pools.start_load(image, target)
        load.wait()
        for pool in pools.pools:
            rows = pool.spec.live_rows(n)
            moved, result = pool.gather(pool.locations(rows, source)), pool.data.clone()
            pool.data.copy_(whole[pool.spec.name])
            if pool.spec.space is IndexSpace.SLOT:
                pool.reset(torch.tensor([target.slot], device="cuda"))
            pool.scatter(pool.locations(rows, target), moved)
            assert torch.equal(result, pool.data), (n, pool.spec.name)
            del result
        del whole
        checked.append(n)
    largest = max(pool.nbytes for pool in pools.pools)
    report["exact"] = {"contexts": checked, "largest_pool_bytes": largest, "beyond_2_31": largest > 1 << 31}
    print(f"round trips bitwise equal at n = {checked}; largest pool {largest / 2**31:.2f} x 2^31 bytes", flush=True)


def copies(pools: KVPools, report: dict[str, Any]) -> None:
    """Retract and resume of one request."""
    generator = torch.Generator().manual_seed(SEED + 1)
    rows = report["copies"] = []
    print("   context      MB | retract ms  GB/s  %link | resume ms  GB/s  %link | gather: device ms, wall ms,")
    print("                   | torch gather ms (x device, x wall) | torch to host ms (x) | torch resume ms (x)")
    for n in CONTEXTS:
        rows.append(one_copy(pools, n, generator, report))


def one_copy(pools: KVPools, n: int, generator: torch.Generator, report: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    indices, image = scattered(n, generator, 0), reserved(pools, n)
    places = [segment.place for segment in image.header.segments]
    out = wall_ms(lambda: pools.start_cpu_copy(indices, image).image())
    back = wall_ms(lambda: pools.start_load(image, indices).wait())
    gather_wall = wall_ms(lambda: pools.mover().gather_only(places, indices))
    gather = device_ms(lambda: pools.mover().gather_only(places, indices))
    host_share = host_ms(lambda: pools.mover()._blocks(places, indices))
    plain = Indexed(pools, indices)
    torch_gather = wall_ms(plain.gather, 5)
    torch_host = wall_ms(lambda: plain.gather(True), 3, 1)
    held = plain.gather(True)
    torch_back = wall_ms(lambda: plain.scatter(held), 3, 1)
    size = image.header.payload_bytes / 1e6
    d2h, h2d = report.get("link", {}).get("d2h_gb_s", 54.9), report.get("link", {}).get("h2d_gb_s", 54.4)
    row = {
        "tokens": n,
        "mb": size,
        "retract_ms": out,
        "retract_gb_s": size / out,
        "retract_of_link": size / out / d2h,
        "resume_ms": back,
        "resume_gb_s": size / back,
        "resume_of_link": size / back / h2d,
        "gather_device_ms": gather,
        "gather_wall_ms": gather_wall,
        "plan_ms": host_share,
        "torch_gather_ms": torch_gather,
        "torch_host_ms": torch_host,
        "torch_resume_ms": torch_back,
        "gather_speedup_device": torch_gather / gather,
        "gather_speedup_wall": torch_gather / gather_wall,
        "host_speedup": torch_host / out,
        "resume_speedup": torch_back / back,
    }
    print(
        f"{n:10d} {size:7.1f} | {out:9.3f} {size / out:6.1f} {100 * size / out / d2h:5.0f}% |"
        f" {back:8.3f} {size / back:6.1f} {100 * size / back / h2d:5.0f}% | {gather:.3f} {gather_wall:.3f}"
        f" (cut {host_share:.3f})"
        f" | {torch_gather:.2f} ({torch_gather / gather:.0f}x, {torch_gather / gather_wall:.0f}x)"
        f" | {torch_host:.1f} ({torch_host / out:.1f}x) | {torch_back:.1f} ({torch_back / back:.1f}x)",
        flush=True,
    )
    return row


def host_ms(action: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def fake_decode() -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A decode step: 32 memory-bound kernels of 512 MB of traffic each, about 4 ms, in one graph."""
    weights = [torch.randn(64 << 20, device="cuda") for _ in range(4)]  # 256 MB each
    result = torch.empty_like(weights[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.mul(weights[0], 1.5, out=result)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(32):
            torch.mul(weights[i % 4], 1.5, out=result)
    return graph, [*weights, result]


def steps(graph: torch.cuda.CUDAGraph, count: int, between: Callable[[], None]) -> list[float]:
    """Time of each step; the host runs one step ahead, as a scheduler does."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for i in range(count):
        graph.replay()
        events[i + 1].record()
        between()
        if i:
            events[i].synchronize()
    torch.cuda.synchronize()
    return [events[i].elapsed_time(events[i + 1]) for i in range(3, count)]


def disturbance(pools: KVPools, report: dict[str, Any]) -> None:
    """Decode steps of the others: undisturbed, and while copies run one after another without a pause."""
    generator = torch.Generator().manual_seed(SEED + 2)
    n = 32768 + 77
    source, target = scattered(n, generator, 0), scattered(n, generator, 1)
    image = pools.start_cpu_copy(source, reserved(pools, n)).image()
    graph, _memory = fake_decode()
    pending: list[Any] = []
    moved = 0

    def again(start: Callable[[], Any]) -> Callable[[], None]:
        def between() -> None:
            nonlocal moved
            if not pending or pending[-1].done():
                pending[:] = [start()]
                moved += 1

        return between

    cases: dict[str, Callable[[], None]] = {
        "undisturbed": lambda: None,
        "retract": again(lambda: pools.start_cpu_copy(source, image)),
        "resume": again(lambda: pools.start_load(image, target)),
        "undisturbed again": lambda: None,
    }
    found: dict[str, Any] = {}
    for name, between in cases.items():
        moved = 0
        pending.clear()
        times = steps(graph, 150, between)
        base = found.get("undisturbed", {}).get("mean", statistics.mean(times))
        found[name] = {"mean": statistics.mean(times), "p50": statistics.median(times), "copies": moved}
        found[name]["p99"] = sorted(times)[int(0.99 * len(times))]
        found[name]["added"] = statistics.mean(times) / base - 1
        print(
            f"decode step, {name:18s}: mean {found[name]['mean']:.3f} p50 {found[name]['p50']:.3f}"
            f" p99 {found[name]['p99']:.3f} ms, {100 * found[name]['added']:+.2f} %,"
            f" {moved} copies in {len(times)} steps",
            flush=True,
        )
    report["disturbance"] = found


def main() -> None:
    """Every section, whatever becomes of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    report: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        report["triton"] = triton.__version__
        report["device"] = torch.cuda.get_device_name()
        print(report, flush=True)
        started = time.perf_counter()
        pools = KVPools(flash_spec(), SIZES, "cuda")
        for pool in pools.pools:
            pool.data.random_()
        torch.cuda.synchronize()
        print(f"pools of {pools.nbytes / 1e9:.1f} GB in {time.perf_counter() - started:.1f} s", flush=True)
    except Exception:
        traceback.print_exc()
        print(json.dumps(report))
        return
    sections: list[Callable[[], None]] = [
        lambda: link(report),
        lambda: copies(pools, report),
        lambda: disturbance(pools, report),
        lambda: exactness(pools, report),
    ]
    failures = report["failures"] = []
    for section in sections:
        try:
            section()
        except Exception as exc:
            failures.append(repr(exc)[:300])
            traceback.print_exc()
    print(json.dumps(report), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file)


if __name__ == "__main__":
    main()
