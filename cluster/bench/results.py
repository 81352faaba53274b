"""What `dsv4 bench model` finds, as plain data: written to JSON on the GPU host, drawn anywhere. Torch-free.

Owns: the form of the file and the figures that follow from it (shares, extrapolation). Does not own: measuring.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench.floors import Rates
from cluster.errors import ClusterError

FORMAT = 1
"""Version of the file; raise it when a field changes its meaning."""


class BadResults(ClusterError):
    """The file is not one of ours; the message says why."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and when."""

    gpu: str
    gpu_bytes: int
    date: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Setup:
    """What was measured: `layers` of `all_layers`, with `experts_held` different ones of `experts` in each layer."""

    preset: str
    layers: int
    all_layers: int
    experts: int
    experts_held: int
    max_batch: int
    chunk_tokens: int
    seed: int

    @property
    def whole(self) -> bool:
        """Every layer ran: nothing is extrapolated."""
        return self.layers == self.all_layers


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One op in layers of one kind: `calls` in a step, milliseconds of one, and what one must move and compute."""

    phase: str
    """"decode" or "prefill"."""
    op: str
    kind: str
    """Layer kind, or "top" outside the layers."""
    tokens: int
    context: int
    calls: int
    ms: float
    nbytes: float
    bf16_flops: float
    fp8_flops: float
    floor_ms: float

    @property
    def share(self) -> float:
        """Part of the time that the floor explains."""
        return self.floor_ms / self.ms

    @property
    def gb_s(self) -> float:
        """Bytes over time."""
        return self.nbytes / self.ms / 1e6

    @property
    def tflop_s(self) -> float:
        """Operations over time."""
        return (self.bf16_flops + self.fp8_flops) / self.ms / 1e9


@dataclass(frozen=True, slots=True)
class InvarianceRow:
    """One op of a decode step in its batch-invariant form, and in forms (`free`) that need not be: milliseconds."""

    batch: int
    context: int
    op: str
    calls: int
    """In a layer; 0 for the head, which is outside the layers."""
    ms: float
    free: dict[str, float]

    @property
    def fastest(self) -> float:
        """Of all forms."""
        return min((self.ms, *self.free.values()))


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One decode step of `batch` sequences at `context` tokens each; the new token closes every compression window."""

    batch: int
    context: int
    ms: float
    """Of the measured layers, with embedding, head and sampling; launches of consecutive steps overlap."""
    floor_ms: float
    """Of the same layers."""
    full_floor_ms: float
    """Of all layers."""
    experts_per_layer: float | None = None
    """Distinct experts that the step read, mean over layers; None when not counted."""
    head_ms: float = 0.0
    """Of the last norm and the head, timed alone; part of `ms`."""
    head_floor_ms: float = 0.0

    @property
    def share(self) -> float:
        """Part of the time that the floor explains."""
        return self.floor_ms / self.ms

    @property
    def full_ms(self) -> float:
        """Of all layers and the head: as measured when all ran, else the layers' time grows as their floor does."""
        layers, full = self.floor_ms - self.head_floor_ms, self.full_floor_ms - self.head_floor_ms
        return self.head_ms + (self.ms - self.head_ms) * full / layers

    @property
    def tokens_per_s(self) -> float:
        """All sequences together, all layers."""
        return 1e3 * self.batch / self.full_ms


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One chunk of `tokens` prompt tokens in `sequences` packed prompts, after `start` others each."""

    tokens: int
    sequences: int
    start: int
    ms: float
    flops: float
    full_flops: float
    floor_ms: float
    peak_bytes: int

    @property
    def full_ms(self) -> float:
        """Of all layers, by operations; as measured when all ran."""
        return self.ms * self.full_flops / self.flops

    @property
    def tokens_per_s(self) -> float:
        """Of all layers."""
        return 1e3 * self.tokens / self.full_ms

    @property
    def tflop_s(self) -> float:
        """Operations over time."""
        return self.flops / self.ms / 1e9


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """A prompt in chunks, its KV to other pages by way of host memory, then decode tokens, on the measured layers."""

    tokens: int
    chunk_tokens: int
    prefill_s: float
    new_tokens: int
    decode_s: float
    peak_bytes: int
    """Most device bytes while it ran."""
    reserved_bytes: int = 0
    """Device bytes before the first chunk: weights, pools, buffers of steps, staging of copies."""
    handoff_bytes: int = 0
    out_s: float = 0.0
    """From the pools to host memory; `in_s`: from there to other pages and another slot."""
    in_s: float = 0.0
    same_logits: bool = False
    """The first decode step gives the same bits in the old pages and the new."""


@dataclass(frozen=True, slots=True)
class Peer:
    """transformers' model of a few layers in bf16 with eager attention, in the same process; or why it did not run.

    Milliseconds a layer are by expert implementation ("eager" is the library's default).
    """

    version: str
    layer_kinds: list[int] = field(default_factory=list)
    context: int = 0
    decode_ms: dict[str, float] = field(default_factory=dict)
    prefill_tokens: int = 0
    prefill_ms: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    failure: str = ""

    @property
    def ran(self) -> bool:
        """Both steps were measured with some implementation."""
        return bool(self.decode_ms and self.prefill_ms)


@dataclass(frozen=True, slots=True)
class Memory:
    """Device bytes by purpose; `peak` over the whole run, `total` of the device."""

    weights: int
    pools: int
    activations: int
    peak: int
    total: int


@dataclass(frozen=True, slots=True)
class Start:
    """From weights in memory to a model ready to serve every batch, and what the compiler did in that time."""

    seconds: float
    kernels: int
    """Kernels that the start needed."""
    compiled: int
    """Those that were not in Triton's cache on disk."""
    compile_s: float

    def __add__(self, other: Start) -> Start:
        """One after the other."""
        return Start(
            self.seconds + other.seconds,
            self.kernels + other.kernels,
            self.compiled + other.compiled,
            self.compile_s + other.compile_s,
        )


@dataclass(slots=True)
class Results:
    """Everything of one run; parts that did not run are empty."""

    machine: Machine
    setup: Setup
    rates: Rates
    memory: Memory | None = None
    start: Start | None = None
    kernels: list[KernelRow] = field(default_factory=list)
    decode: list[DecodeRow] = field(default_factory=list)
    prefill: list[PrefillRow] = field(default_factory=list)
    long_prompt: LongPrompt | None = None
    peer: Peer | None = None
    invariance: list[InvarianceRow] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the figures that readers would otherwise have to derive."""
        data: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(self)}
        derived = {
            "kernels": ("share", "gb_s", "tflop_s"),
            "decode": ("share", "full_ms", "tokens_per_s"),
            "prefill": ("full_ms", "tokens_per_s", "tflop_s"),
        }
        for part, names in derived.items():
            for row, plain in zip(getattr(self, part), data[part], strict=True):
                plain |= {name: getattr(row, name) for name in names}
        return data

    def write(self, path: Path) -> None:
        """Raises OSError."""
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")


def read_results(path: Path) -> Results:
    """Raises `BadResults`."""
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise BadResults(f"{path} has format {data['format']}, this version reads {FORMAT}")
        return Results(
            machine=_made(Machine, data["machine"]),
            setup=_made(Setup, data["setup"]),
            rates=_made(Rates, data["rates"]),
            memory=_optional(Memory, data["memory"]),
            start=_optional(Start, data["start"]),
            kernels=[_made(KernelRow, row) for row in data["kernels"]],
            decode=[_made(DecodeRow, row) for row in data["decode"]],
            prefill=[_made(PrefillRow, row) for row in data["prefill"]],
            long_prompt=_optional(LongPrompt, data["long_prompt"]),
            peer=_optional(Peer, data["peer"]),
            invariance=[_made(InvarianceRow, row) for row in data.get("invariance", [])],
        )
    except OSError as exc:
        raise BadResults(f"{path}: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise BadResults(f"{path} does not hold results of `dsv4 bench model`: {exc!r}") from exc


def _made(kind: type[Any], data: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in data.items() if name in names})


def _optional(kind: type[Any], data: dict[str, Any] | None) -> Any:
    return None if data is None else _made(kind, data)
