"""`Transformer`: one forward step over paged KV, for any mix of prefill chunks and decode tokens.

Owns: the layer loop (mHC around attention and MoE), embedding and head. The result for a sequence depends only on its
tokens and on what its pages hold, not on chunk boundaries, batch mates or physical addresses (up to fp32 rounding on
the reference path, bit for bit on the CPU path). Differentiable full-sequence form, for training: `full_sequence.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvstore.pools.aggregate import KVPools
from workers.batch import ForwardBatch
from workers.model import layers as parts
from workers.model.config import ModelConfig
from workers.model.paged_attention import PagedAttention
from workers.model.paged_kv import PagedKV
from workers.model.precision import Precision
from workers.model.weights import LayerWeights, ModelWeights
from workers.reference.mhc import hc_post
from workers.reference.moe import moe
from workers.reference.norm_rope import rms_norm

LogitsFor = Literal["last", "all"]
"""Rows that get logits: the last new token of each sequence, or every token of the step."""


class Transformer:
    """The trunk over one set of pools, in plain torch. Runs on the thread that owns the pools.

    Raises ValueError when the pools were laid out for another model or a narrower precision.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, precision: Precision, pools: KVPools) -> None:
        self.config, self.weights, self.precision, self.pools = config, weights, precision, pools
        self._attention = PagedAttention(config, precision, PagedKV(config, precision, pools))

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, logits_for: LogitsFor = "last") -> Tensor:
        """Run every new token of `batch`, write its KV, and return fp32 logits ([B, V] for "last", [T, V] for "all").

        The slots of sequences that start at 0 must have been reset, and pages must reach each last new token.
        """
        streams = parts.embed_streams(self.weights, self.config, batch.token_ids)  # [T, S, hidden]
        for index, layer in enumerate(self.weights.layers):
            streams = self._block(index, layer, streams, batch)
        rows = streams if logits_for == "all" else streams[batch.last_token_rows]
        return parts.head_logits(self.weights, self.config, rows)

    def _block(self, index: int, layer: LayerWeights, streams: Tensor, batch: ForwardBatch) -> Tensor:
        config = self.config
        mixed, post, comb = parts.stream_mix(layer.hc_attn, config, streams)
        x = rms_norm(mixed, layer.attn_norm, config.rms_norm_eps)
        streams = hc_post(self._attention.forward(x, index, layer.attn, batch), streams, post, comb)
        mixed, post, comb = parts.stream_mix(layer.hc_ffn, config, streams)
        x = rms_norm(mixed, layer.ffn_norm, config.rms_norm_eps)
        ids, routing = parts.route(layer.ffn, config, x, batch.token_ids)
        ffn = layer.ffn
        out = moe(x, ids, routing, ffn.experts, ffn.shared_experts, config.swiglu_limit, self.precision.act_fp8)
        return hc_post(out, streams, post, comb)
