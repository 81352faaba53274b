"""What one launch of a step must move and compute, from the operands it was given.

Owns: bytes (every operand once, from and to memory) and operations of each op of `workers/gpu/kernel_set.py`. Does not
own: time. Ops that address pools and experts by index have a rule of their own; the rest are the sum of their tensors.
A batch's activations count too, although at small batches they never leave the L2 cache: they are under 1 % there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cluster.bench import floors
from workers.experts.layout import ExpertShape, ExpertSlab
from workers.gpu.buffers import StepMeta
from workers.gpu.kernel_set import Launch
from workers.gpu.weights import Fp8Weight, GpuWeights
from workers.model.config import LayerKind, ModelConfig

TOP = "top"
"""Kind of launches before and after the layers."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Least bytes moved and operations of one launch; FP8 operations are those whose both sides are FP8."""

    nbytes: float
    bf16_flops: float = 0.0
    fp8_flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.nbytes + other.nbytes, self.bf16_flops + other.bf16_flops, self.fp8_flops + other.fp8_flops)


@dataclass(frozen=True, slots=True)
class Seen:
    """Tokens of a launch, by sequence: what each attends to and what all of one sequence's tokens read together."""

    positions: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, positions: Tensor, sequences: Tensor) -> Seen:
        """From the device's metadata; padding tokens are left out."""
        by_sequence: dict[int, list[int]] = {}
        for position, sequence in zip(positions.tolist(), sequences.tolist(), strict=True):
            if position >= 0:
                by_sequence.setdefault(sequence, []).append(position)
        return cls(tuple(tuple(p) for p in by_sequence.values()))

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(len(p) for p in self.positions)

    def keys(self, config: ModelConfig, kind: LayerKind) -> int:
        """Entries attended to, over all tokens."""
        return sum(floors.attended(config, kind, p + 1) for group in self.positions for p in group)

    def rows(self, config: ModelConfig, kind: LayerKind) -> int:
        """Different stored rows that must be read for them."""
        total = 0
        for group in self.positions:
            last, count = max(group) + 1, len(group)
            entries = last // kind.value if kind is not LayerKind.SLIDING else 0
            if kind is LayerKind.C4:
                entries = min(entries, count * config.index_topk)
            total += min(last, count + config.sliding_window - 1) + entries
        return total

    def visible(self, ratio: int) -> int:
        """Compressed entries before each token, over all tokens."""
        return sum((p + 1) // ratio for group in self.positions for p in group)

    def entries(self, ratio: int) -> int:
        """Different compressed entries before the last token of each sequence."""
        return sum((max(group) + 1) // ratio for group in self.positions)


class CostModel:
    """Costs and names of the launches of one model."""

    def __init__(self, config: ModelConfig, weights: GpuWeights) -> None:
        self.config = config
        self.shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
        self._names: dict[int, str] = {}
        for layer in weights.layers:
            for field in dataclasses.fields(layer):
                for tensor in tensors_in(getattr(layer, field.name)):
                    self._names[tensor.data_ptr()] = field.name
            if layer.kind is LayerKind.C4:
                for tensor in layer.q_fp8.rows(config.num_attention_heads * config.head_dim):
                    self._names[tensor.data_ptr()] = "q_fp8 index"
        for name in ("embed", "head", "norm", "hc_head"):
            for tensor in tensors_in(getattr(weights, name)):
                self._names[tensor.data_ptr()] = name
        self._special: dict[str, Callable[[Launch, LayerKind], Cost]] = {
            "embed_streams": self._embed,
            "store_and_compress": self._store_and_compress,
            "select_entries": self._select,
            "sparse_attention": self._attention,
            "expert_gate_up": partial(self._experts, parts=2),
            "expert_down": partial(self._experts, parts=1),
            "experts": partial(self._experts, parts=3),
        }

    def name(self, launch: Launch) -> str:
        """The op's name, with the operand where an op serves several (`linear wo_b`)."""
        if launch.op not in ("linear", "grouped_linear"):
            return launch.op
        found = [name for t in tensors_in(launch.call) if (name := self._names.get(t.data_ptr()))]
        return f"{launch.op} {found[0]}" if found else launch.op

    def cost(self, launch: Launch, kind: LayerKind) -> Cost:
        """Cost of one launch; reads metadata from the device."""
        special = self._special.get(launch.op)
        return special(launch, kind) if special is not None else self._plain(launch)

    def matrices(self, launch: Launch) -> list[Fp8Weight | Tensor]:
        """The model's matrices among the operands of a product, in order; those of other shapes are left out."""
        found: list[Fp8Weight | Tensor] = []
        for operand in operands(launch.call):
            if isinstance(operand, Fp8Weight | Tensor):
                matrix = operand.codes if isinstance(operand, Fp8Weight) else operand
                if matrix.dim() == 2 and matrix.data_ptr() in self._names:
                    found.append(operand)
        return found

    def _plain(self, launch: Launch) -> Cost:
        """Weights once, activations once, two operations per weight and row."""
        rows = self.rows(launch)
        total = self._weights(launch, rows)
        return total + Cost(sum(t.nbytes for t in self._activations(launch)))

    def _weights(self, launch: Launch, rows: int) -> Cost:
        total = Cost(0.0)
        fp8_sides = launch.op != "grouped_linear"
        for operand in operands(launch.call):
            if isinstance(operand, Fp8Weight) and operand.codes.data_ptr() in self._names:
                flops = 2.0 * rows * operand.codes.numel()
                total += Cost(
                    operand.codes.nbytes + operand.scales.nbytes,
                    0.0 if fp8_sides else flops,
                    flops if fp8_sides else 0.0,
                )
            elif not isinstance(operand, Fp8Weight | ExpertSlab):
                for tensor in tensors_in(operand):
                    if tensor.data_ptr() in self._names and self._names[tensor.data_ptr()] != "tid2eid":
                        matrix = tensor.dim() == 2 and min(tensor.shape) > 1
                        total += Cost(tensor.nbytes, 2.0 * rows * tensor.numel() if matrix else 0.0)
        return total

    def _activations(self, launch: Launch) -> list[Tensor]:
        rows = self.rows(launch)
        found = [t for t in tensors_in(launch.call) if t.data_ptr() not in self._names]
        return [t for t in found if t.dim() and t.shape[0] == rows and t.dtype is not torch.uint8]

    def rows(self, launch: Launch) -> int:
        """Tokens of a launch, padding included: the first axis of its first activation."""
        for tensor in tensors_in(launch.call):
            if tensor.data_ptr() not in self._names and tensor.dim():
                return int(tensor.shape[0])
        return 0

    def _embed(self, launch: Launch, kind: LayerKind) -> Cost:
        streams = [t for t in tensors_in(launch.call) if t.dim() == 3][0]
        return Cost(streams.nbytes * (1 + 1 / self.config.hc_mult))

    def _store_and_compress(self, launch: Launch, kind: LayerKind) -> Cost:
        """Latent and KV rows in, latent and window rows out; compressor rows where the layer has them."""
        c, rows = self.config, self.rows(launch)
        stored = Cost(rows * (2.0 * (2 * c.q_lora_rank + c.head_dim) + floors.kv_row_bytes(c)))
        return stored if kind is LayerKind.SLIDING else stored + self._compress(launch, kind)

    def _compress(self, launch: Launch, kind: LayerKind) -> Cost:
        """Raw rows in, rings out, the rows of windows that close back in, finished entries out."""
        c, seen, ratio = self.config, _seen(launch), kind.value
        width = 2 * c.head_dim * (2 if kind is LayerKind.C4 else 1)
        entry = floors.kv_row_bytes(c)
        if kind is LayerKind.C4:
            width += 4 * c.index_head_dim
            entry += floors.index_row_bytes(c)
        closed = sum((p + 1) % ratio == 0 for group in seen.positions for p in group)
        decode = seen.tokens == len(seen.positions)
        reread = closed * (2 * ratio if kind is LayerKind.C4 else ratio) if decode else 0
        written = sum(min(len(group), 2 * ratio) for group in seen.positions)
        return Cost(4.0 * width * (seen.tokens + written + reread) + closed * entry)

    def _select(self, launch: Launch, kind: LayerKind) -> Cost:
        """Queries in, every visible key of a sequence once, chosen rows out; scores need not leave the chip."""
        c, seen = self.config, _seen(launch)
        query = 2 * c.index_n_heads * c.index_head_dim + 4 * c.index_n_heads + 4 * c.index_topk
        nbytes = seen.tokens * query + seen.entries(4) * floors.index_row_bytes(c)
        return Cost(nbytes, fp8_flops=2.0 * c.index_n_heads * c.index_head_dim * seen.visible(4))

    def _attention(self, launch: Launch, kind: LayerKind) -> Cost:
        c, seen = self.config, _seen(launch)
        heads = c.num_attention_heads * c.head_dim
        nbytes = 4.0 * seen.tokens * heads + seen.rows(c, kind) * floors.kv_row_bytes(c)
        if kind is LayerKind.C4:
            nbytes += 4.0 * seen.tokens * c.index_topk
        return Cost(nbytes, 4.0 * heads * seen.keys(c, kind))

    def _experts(self, launch: Launch, kind: LayerKind, parts: int) -> Cost:
        """`parts` of an expert's three matrices, of each distinct expert; products take scaled bf16 operands."""
        groups = [operand for operand in operands(launch.call) if hasattr(operand, "num_active")][0]
        active = int(groups.num_active)
        pairs = len(groups.pair_order)
        weights = self._weights(launch, self.rows(launch))
        elements = self.config.hidden_size * self.config.moe_intermediate_size
        moved = active * parts * self.shape.expert_bytes / 3 + sum(t.nbytes for t in self._activations(launch))
        return weights + Cost(moved, 2.0 * pairs * parts * elements)


def tensors_in(node: Any) -> Iterator[Tensor]:
    """Every tensor of an argument, a tuple, a dataclass or a bound call, in order."""
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, partial):
        for child in operands(node):
            yield from tensors_in(child)
    elif isinstance(node, tuple):
        for child in node:
            yield from tensors_in(child)
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            yield from tensors_in(getattr(node, field.name))


SCRATCH = ("work", "route_work", "counters", "comb", "between", "room")
"""Keyword arguments that are neither read from nor written to memory by necessity. `comb` is 64 bytes a token of mHC's
that a launch finishes by the way, together with constants of which it reads none; `between` may be read in place of the
input that the launch is given."""


def operands(call: Any) -> list[Any]:
    """Positional and keyword arguments of a bound call, without scratch."""
    if not isinstance(call, partial):
        return []
    return [*call.args, *(value for name, value in call.keywords.items() if name not in SCRATCH)]


def _seen(launch: Launch) -> Seen:
    meta = [operand for operand in operands(launch.call) if isinstance(operand, StepMeta)][0]
    return Seen.of(meta.positions, meta.sequence_of_token)
