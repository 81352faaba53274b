"""Which fake quantisations a forward pass applies. Torch-free; the rounding rules: `workers/reference/quant.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IndexerFormat = Literal["fp32", "fp8", "fp4"]


@dataclass(frozen=True, slots=True)
class Precision:
    """One switch per fake quantisation of the official model."""

    kv_fp8: bool
    """Window and compressed KV entries: nope dims in e4m3 with a power-of-two scale per 64, rope dims in bf16."""
    indexer: IndexerFormat
    """Indexer queries and keys after the Hadamard transform: as computed, e4m3 with one fp32 scale, or e2m1 per 32."""
    act_fp8: bool
    """Inputs of FP8 and FP4 linears: e4m3 with a power-of-two scale per 128 columns."""

    @classmethod
    def fp32(cls) -> Precision:
        """No quantisation: the exact function of the (dequantised) weights."""
        return cls(kv_fp8=False, indexer="fp32", act_fp8=False)

    @classmethod
    def native(cls) -> Precision:
        """What serving stores and computes: fp8 KV, fp8 indexer keys, fp8 activations."""
        return cls(kv_fp8=True, indexer="fp8", act_fp8=True)
