"""`Transformer`: one forward step over paged KV, for any mix of prefill chunks and decode tokens.

Owns: the layer loop (mHC around attention and MoE), embedding and head. The result for a sequence depends only on its
tokens and on what its pages hold, not on chunk boundaries, batch mates or physical addresses (up to fp32 rounding on
the reference path, bit for bit on the CPU path). Differentiable full-sequence form, for training: `full_sequence.py`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore.pools.aggregate import KVPools
from workers import ops
from workers.batch import ForwardBatch
from workers.errors import BadConfig, InexactWeights
from workers.model import layers as parts
from workers.model.config import ModelConfig
from workers.model.paged_attention import PagedAttention
from workers.model.paged_kv import PagedKV
from workers.model.precision import Precision
from workers.model.weights import LayerWeights, ModelWeights
from workers.reference.mhc import hc_post
from workers.reference.moe import moe
from workers.reference.norm_rope import rms_norm

if TYPE_CHECKING:
    from workers.cpu.expert_cache import CpuExperts
    from workers.experts.supply import ExpertSupply
    from workers.gpu.model import GpuModel
    from workers.gpu.serving_experts import GpuExperts
    from workers.gpu.weights import GpuWeights

logger = logging.getLogger(__name__)


class Transformer:
    """The trunk over one set of pools, on the fastest backend that covers the model.

    `weights` are fp32, or already the GPU path's operands. `backend` forces one (`reference` for checks); `num_threads`
    bounds the threads of the CPU path, by default torch's; `max_context` bounds the sequences of the GPU path, by
    default the model's own limit; `supply` brings the routed experts that `weights` leave out on the CPU path,
    `gpu_experts` on the GPU path, where its owner opens it before the first step. Runs on the thread that owns the
    pools. Raises ValueError when the pools were laid out for another precision.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights | GpuWeights,
        precision: Precision,
        pools: KVPools,
        *,
        backend: ops.Backend | None = None,
        num_threads: int | None = None,
        max_context: int | None = None,
        supply: ExpertSupply | None = None,
        gpu_experts: GpuExperts | None = None,
    ) -> None:
        chosen, reason = (backend, "asked for") if backend else ops.choose_backend(config, precision, pools)
        gpu: GpuModel | None = None
        if chosen == "triton":
            try:
                gpu = ops.build_gpu_model(config, weights, pools, max_context=max_context, experts=gpu_experts)
            except InexactWeights as error:
                if backend == "triton":
                    raise
                chosen, reason = "reference", str(error)
        logger.info("model runs on backend %s: %s", chosen, reason)
        self.backend: ops.Backend = chosen
        self.ahead = gpu
        """The model as the decode pipeline drives it, where steps run beside the host."""
        self.experts: CpuExperts | GpuExperts | None = gpu_experts
        """Where some routed experts are absent from fast memory."""
        self.batch_device = torch.device("cpu") if gpu is not None else pools.device
        """Where `forward` and `decode` want their batches."""
        if gpu is not None:
            self._model: ops.PagedModel = gpu
            return
        if not isinstance(weights, ModelWeights):
            raise ValueError(f"backend {chosen} needs fp32 weights")
        if supply is not None and chosen != "cpu":
            raise BadConfig("experts.hbm", "a budget", f"none: the model runs on {chosen} ({reason})", "worker config")
        if chosen == "cpu":
            cpu = ops.build_cpu_model(config, weights, precision, pools, num_threads, supply)
            self._model, self.experts = cpu, cpu.experts
        else:
            # On a GPU the reference holds fp32 weights; the Triton path above never does.
            here = weights if pools.device.type == "cpu" else weights.to(config, pools.device)
            self._model = ReferenceTransformer(config, here, precision, pools)

    def forward(self, batch: ForwardBatch, logits_for: ops.LogitsFor = "last") -> Tensor:
        """Run every new token of `batch`, write its KV, and return fp32 logits ([B, V] for "last", [T, V] for "all").

        The slots of sequences that start at 0 must have been reset, and pages must reach each last new token.
        """
        return self._model.forward(batch, logits_for)

    def decode(self, batch: ForwardBatch) -> Tensor:
        """`forward` for one new token of each sequence: fp32 logits [B, V], valid until the next call."""
        return self._model.decode(batch)

    def warm_up(self, *, decode: bool) -> None:
        """Compile what decode or prefill steps need, and capture graphs, where that takes time. Writes no KV."""
        if self.ahead is not None:
            if decode:
                self.ahead.warm_up()
            else:
                self.ahead.warm_up_prefill()


class ReferenceTransformer:
    """The trunk in plain torch, written to be read. Same construction and `forward` as `Transformer`.

    Raises ValueError when the pools store a narrower format than the precision asks for.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, precision: Precision, pools: KVPools) -> None:
        self.config, self.weights, self.precision, self.pools = config, weights, precision, pools
        self._attention = PagedAttention(config, precision, PagedKV(config, precision, pools))

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, logits_for: ops.LogitsFor = "last") -> Tensor:
        """As `Transformer.forward`."""
        streams = parts.embed_streams(self.weights, self.config, batch.token_ids)  # [T, S, hidden]
        for index, layer in enumerate(self.weights.layers):
            streams = self._block(index, layer, streams, batch)
        rows = streams if logits_for == "all" else streams[batch.last_token_rows]
        return parts.head_logits(self.weights, self.config, rows)

    def decode(self, batch: ForwardBatch) -> Tensor:
        """As `Transformer.decode`."""
        return self.forward(batch)

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
