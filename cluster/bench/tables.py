"""Results as tables for a terminal. Torch-free: also draws what another machine measured."""

from __future__ import annotations

from rich.table import Table

from cluster.bench.results import DecodeRow, InvarianceRow, KernelRow, LongPrompt, PrefillRow, Results

MIB, GIB = 1 << 20, 1 << 30


def all_tables(results: Results) -> list[Table]:
    """What there is to show, in reading order."""
    tables = [conditions(results)]
    for phase in ("decode", "prefill"):
        keys = sorted({(r.tokens, r.context) for r in results.kernels if r.phase == phase})
        for tokens, context in keys:
            rows = [r for r in results.kernels if (r.phase, r.tokens, r.context) == (phase, tokens, context)]
            tables.append(kernel_table(rows))
    if results.decode:
        tables.append(decode_table(results, results.decode))
    if results.prefill:
        tables.append(prefill_table(results, results.prefill))
    for batch in sorted({row.batch for row in results.invariance}):
        tables.append(invariance_table([row for row in results.invariance if row.batch == batch]))
    return tables


def conditions(results: Results) -> Table:
    """Machine, model, ceilings, memory, start, peer."""
    r, m, s = results.rates, results.machine, results.setup
    table = _table("", "conditions", left=2)
    versions = ", ".join(f"{name} {version}" for name, version in m.versions.items())
    table.add_row("machine", f"{m.gpu}, {m.gpu_bytes / GIB:.0f} GiB; {versions}; {m.date}")
    table.add_row("model", f"{s.preset}, synthetic weights; {_scope(results)}")
    fp8 = "" if r.fp8_tflop_s is None else f", FP8 product {r.fp8_tflop_s:,.0f} TFLOP/s"
    table.add_row("ceilings", f"copy {r.copy_gb_s:,.0f} GB/s, bf16 product {r.bf16_tflop_s:,.0f} TFLOP/s{fp8}")
    if (memory := results.memory) is not None:
        parts = (("weights", memory.weights), ("pools", memory.pools), ("activations", memory.activations))
        sizes = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts)
        table.add_row("memory", f"{sizes}; peak {memory.peak / GIB:.2f} of {memory.total / GIB:.0f} GiB")
    if (start := results.start) is not None:
        found = f"{start.compiled} of {start.kernels} kernels compiled in {start.compile_s:.1f} s, others in the cache"
        table.add_row("start", f"{start.seconds:.1f} s to all graphs; {found}")
    if (long := results.long_prompt) is not None:
        table.add_row(f"{long.tokens:,}-token prompt", _long_line(long))
    table.add_row("peer", _peer_line(results))
    return table


def _long_line(long: LongPrompt) -> str:
    prefill = f"prefill {long.prefill_s:.2f} s in chunks of {long.chunk_tokens:,}"
    moved = f"hand-off of {long.handoff_bytes / 1e6:.0f} MB {1e3 * long.out_s:.1f} + {1e3 * long.in_s:.1f} ms"
    bits = "the same logits" if long.same_logits else "OTHER LOGITS"
    decode = f"{long.new_tokens} tokens more in {long.decode_s:.2f} s"
    memory = f"reserved {long.reserved_bytes / GIB:.2f} GiB, peak {long.peak_bytes / GIB:.2f}"
    return f"{prefill}, {moved} ({bits}), {decode}; {memory}"


def kernel_table(rows: list[KernelRow]) -> Table:
    """Ops of one step; the sum is of the kernels timed alone, without what overlaps in a step."""
    first = rows[0]
    plural = "" if first.tokens == 1 else "s"
    decode = f"decode, {first.tokens} sequence{plural} at {first.context:,} tokens"
    title = decode if first.phase == "decode" else f"prefill, one prompt of {first.tokens:,} tokens"
    table = _table(title, "op", "layers", "calls", "us", "us a step", "MB", "GB/s", "TFLOP/s", "share of floor", left=2)
    for row in rows:
        table.add_row(
            row.op,
            row.kind,
            str(row.calls),
            f"{1e3 * row.ms:,.1f}",
            f"{1e3 * row.ms * row.calls:,.0f}",
            f"{row.nbytes / 1e6:,.2f}",
            f"{row.gb_s:,.0f}",
            f"{row.tflop_s:,.1f}",
            f"{row.share:.0%}",
        )
    total, floor = sum(r.ms * r.calls for r in rows), sum(r.floor_ms * r.calls for r in rows)
    calls = str(sum(r.calls for r in rows))
    table.add_section()
    table.add_row("sum", "", calls, "", f"{1e3 * total:,.0f}", "", "", "", f"{floor / total:.0%}")
    return table


def decode_table(results: Results, rows: list[DecodeRow]) -> Table:
    """Milliseconds per step and tokens per second."""
    whole = results.setup.whole
    full = "ms, all layers" if whole else f"ms, {results.setup.all_layers} layers (extrapolated)"
    headings = ["batch", "context", full, "tokens/s", "share of floor", "experts a layer"]
    if not whole:
        headings.insert(2, f"ms, {results.setup.layers} layers")
    table = _table("decode", *headings)
    for row in rows:
        experts = "" if row.experts_per_layer is None else f"{row.experts_per_layer:.1f}"
        cells = [str(row.batch), f"{row.context:,}", f"{row.full_ms:.3f}", f"{row.tokens_per_s:,.0f}"]
        if not whole:
            cells.insert(2, f"{row.ms:.3f}")
        table.add_row(*cells, f"{row.share:.0%}", experts)
    return table


def prefill_table(results: Results, rows: list[PrefillRow]) -> Table:
    """Tokens per second by chunk size."""
    whole = results.setup.whole
    rate = "tokens/s" if whole else f"tokens/s, {results.setup.all_layers} layers (extrapolated)"
    table = _table("prefill", "tokens", "prompts", "ms", rate, "TFLOP/s", "share of bf16 floor", "peak GiB")
    for row in sorted(rows, key=lambda r: (r.sequences, r.tokens)):
        table.add_row(
            f"{row.tokens:,}",
            str(row.sequences),
            f"{row.ms:,.1f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.tflop_s:,.0f}",
            f"{row.floor_ms / row.ms:.0%}",
            f"{row.peak_bytes / GIB:.2f}",
        )
    return table


def invariance_table(rows: list[InvarianceRow]) -> Table:
    """Ops of a layer and the head; the last line is a layer in the fastest forms against ours."""
    first = rows[0]
    forms = sorted({name for row in rows for name in row.free})
    title = f"cost of batch invariance, {first.batch} sequences at {first.context:,} tokens, us"
    table = _table(title, "op", "calls", "ours", *forms, "cost", left=1)
    for row in rows:
        others = [f"{1e3 * row.free[name]:,.1f}" if name in row.free else "" for name in forms]
        table.add_row(row.op, str(row.calls or ""), f"{1e3 * row.ms:,.1f}", *others, f"{row.ms / row.fastest - 1:.0%}")
    total = sum(row.calls * row.ms for row in rows)
    fastest = sum(row.calls * row.fastest for row in rows)
    table.add_section()
    table.add_row("layer", "", f"{1e3 * total:,.1f}", *("" for _ in forms), f"{total / fastest - 1:.0%}")
    return table


def _scope(results: Results) -> str:
    s = results.setup
    layers = f"all {s.layers} layers" if s.whole else f"{s.layers} of {s.all_layers} layers"
    if s.experts_held == s.experts:
        return f"{layers}, all {s.experts} experts of a layer in memory"
    return (
        f"{layers}, {s.experts_held} different experts a layer in memory; the other {s.experts - s.experts_held} share"
    )


def _peer_line(results: Results) -> str:
    peer = results.peer
    if peer is None:
        return "not measured"
    if peer.failure or not peer.ran:
        return f"transformers {peer.version}: {peer.failure}"
    decode, prefill = (
        ", ".join(f"{name} {ms:.1f}" for name, ms in sorted(found.items(), key=lambda item: item[1]))
        for found in (peer.decode_ms, peer.prefill_ms)
    )
    text = (
        f"transformers {peer.version}, bf16, {len(peer.layer_kinds)} layers, ms a layer: "
        f"decode at {peer.context:,} tokens {decode}; prefill of {peer.prefill_tokens:,} {prefill}"
    )
    layers = results.setup.all_layers
    own = [row for row in results.decode if row.batch == 1 and row.context == peer.context]
    if own:
        text += f"; decode here is {_times(peer.decode_ms, layers, own[0].full_ms)}"
    prompts = [r for r in results.prefill if (r.tokens, r.sequences, r.start) == (peer.prefill_tokens, 1, 0)]
    if prompts:
        text += f", prefill {_times(peer.prefill_ms, layers, prompts[0].full_ms)}"
    return text


def _times(found: dict[str, float], layers: int, own_ms: float) -> str:
    """How many times as fast as the fastest implementation, and as the default one."""
    text = f"{min(found.values()) * layers / own_ms:.0f}x as fast"
    eager = found.get("eager", 0.0)
    return f"{text} ({eager * layers / own_ms:.0f}x as eager)" if eager > min(found.values()) else text


def _table(title: str, *headings: str, left: int = 0) -> Table:
    """A heading a column; the first `left` columns hold text. "conditions" is a table without headings."""
    table = Table(title=title or None, title_justify="left", show_edge=False, show_header=headings[0] != "conditions")
    names = ("", "") if headings[0] == "conditions" else headings
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return table
