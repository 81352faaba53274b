"""`ModelWeights` as the tables of the CPU kernels: packed panels, fused matrices and their addresses.

Matrices that share an input are stacked, so that one product computes them: [wq_a | wkv], [wq_b | indexer.wq_b],
[compressor wkv | wgate | indexer wkv | wgate | weights_proj], [w1 | w3]. Owns all packed memory.
"""

from __future__ import annotations

import numpy as np
import torch

from workers.cpu import tables as t
from workers.cpu.panels import Panels, pack_panels
from workers.model.config import ModelConfig
from workers.model.weights import AttentionWeights, FfnWeights, HyperConnectionWeights, LayerWeights, ModelWeights
from workers.reference.moe import ExpertWeights


class PackedWeights:
    """Packed memory and the `layers` table [L, LAYER_SIZE] int64 that points into it (pool columns are left zero)."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self._kept: list[np.ndarray] = []
        self.layers = np.zeros((config.num_hidden_layers, t.LAYER_SIZE), dtype=np.int64)
        for index, layer in enumerate(weights.layers):
            self._fill_layer(self.layers[index], layer, config.layer_kinds[index].value)
            self.layers[index, t.FIRST_PAIR] = index * config.n_routed_experts
        self.top = self._top(weights)

    @property
    def nbytes(self) -> int:
        """Bytes of packed memory."""
        return sum(array.nbytes for array in self._kept)

    def _plain(self, tensor: torch.Tensor, dtype: type = np.float32) -> int:
        """Address of a contiguous copy."""
        array = np.ascontiguousarray(tensor.detach().numpy(), dtype=dtype)
        array = array.copy() if array.base is not None else array
        self._kept.append(array)
        return int(array.ctypes.data)

    def _panels(self, weight: torch.Tensor) -> tuple[int, int]:
        """(address, element form) of a packed matrix [N, K]."""
        packed = pack_panels(weight)
        self._kept.append(packed.memory)
        return packed.address, packed.element

    def _stack(self, matrices: torch.Tensor) -> tuple[int, int, int]:
        """(address, element form, bytes per matrix) of packed matrices [G, N, K], one form for all."""
        packed = [pack_panels(matrix) for matrix in matrices]
        if len({p.element for p in packed}) > 1:
            packed = [pack_panels(matrix, widest=True) for matrix in matrices]
        memory = np.stack([p.memory for p in packed])
        self._kept.append(memory)
        return int(memory.ctypes.data), packed[0].element, memory.strides[0]

    def _top(self, weights: ModelWeights) -> dict[int, int]:
        head, head_element = self._panels(weights.head)
        fn, fn_element = self._panels(weights.hc_head.fn)
        return {
            t.EMBED: self._plain(weights.embed),
            t.HEAD: head,
            t.HEAD_ELEMENT: head_element,
            t.NORM: self._plain(weights.norm),
            t.HC_HEAD: fn,
            t.HC_HEAD_ELEMENT: fn_element,
            t.HC_HEAD_BASE: self._plain(weights.hc_head.base),
            t.HC_HEAD_SCALE: self._plain(weights.hc_head.scale),
        }

    def _fill_layer(self, row: np.ndarray, layer: LayerWeights, ratio: int) -> None:
        row[t.RATIO] = ratio
        row[t.ATTN_NORM], row[t.FFN_NORM] = self._plain(layer.attn_norm), self._plain(layer.ffn_norm)
        self._fill_mhc(row[t.HC_ATTN : t.HC_ATTN + 4], layer.hc_attn)
        self._fill_mhc(row[t.HC_FFN : t.HC_FFN + 4], layer.hc_ffn)
        self._fill_attention(row, layer.attn)
        self._fill_ffn(row, layer.ffn)

    def _fill_mhc(self, row: np.ndarray, hc: HyperConnectionWeights) -> None:
        row[0], row[1] = self._panels(hc.fn)
        row[2], row[3] = self._plain(hc.base), self._plain(hc.scale)

    def _fill_attention(self, row: np.ndarray, attn: AttentionWeights) -> None:
        row[t.DOWN], row[t.DOWN_ELEMENT] = self._panels(torch.cat((attn.wq_a, attn.wkv)))
        row[t.Q_NORM], row[t.KV_NORM] = self._plain(attn.q_norm), self._plain(attn.kv_norm)
        row[t.SINK] = self._plain(attn.attn_sink)
        groups = attn.wo_a.unflatten(0, (self.config.o_groups, -1))
        row[t.WO_A], row[t.WO_A_ELEMENT], row[t.WO_A_STEP] = self._stack(groups)
        row[t.WO_B], row[t.WO_B_ELEMENT] = self._panels(attn.wo_b)
        up, extra = [attn.wq_b], []
        if attn.compressor is not None:
            extra += [attn.compressor.wkv, attn.compressor.wgate]
            row[t.APE], row[t.ENTRY_NORM] = self._plain(attn.compressor.ape), self._plain(attn.compressor.norm)
        if attn.indexer is not None:
            up.append(attn.indexer.wq_b)
            compressor = attn.indexer.compressor
            extra += [compressor.wkv, compressor.wgate, attn.indexer.weights_proj]
            row[t.INDEX_APE], row[t.INDEX_NORM] = self._plain(compressor.ape), self._plain(compressor.norm)
        row[t.UP], row[t.UP_ELEMENT] = self._panels(torch.cat(up))
        row[t.UP_COLUMNS] = sum(matrix.shape[0] for matrix in up)
        if extra:
            row[t.EXTRA], row[t.EXTRA_ELEMENT] = self._panels(torch.cat(extra))
            row[t.EXTRA_COLUMNS] = sum(matrix.shape[0] for matrix in extra)

    def _fill_ffn(self, row: np.ndarray, ffn: FfnWeights) -> None:
        row[t.GATE], row[t.GATE_ELEMENT] = self._panels(ffn.gate.weight)
        if ffn.gate.bias is not None:
            row[t.GATE_BIAS] = self._plain(ffn.gate.bias)
        if ffn.gate.tid2eid is not None:
            row[t.HASH_TABLE] = self._plain(ffn.gate.tid2eid, np.int32)
        if not ffn.experts.w1.is_meta:
            self._fill_experts(row, ffn.experts)
        shared = ffn.shared_experts
        row[t.SHARED_13], row[t.SHARED_13_ELEMENT] = self._panels(torch.cat((shared.w1, shared.w3)))
        row[t.SHARED_2], row[t.SHARED_2_ELEMENT] = self._panels(shared.w2)

    def _fill_experts(self, row: np.ndarray, experts: ExpertWeights) -> None:
        """All experts of a layer side by side, each as [w1 | w3] panels and then w2's, and their addresses."""
        both = torch.cat((experts.w1, experts.w3), dim=1)
        stacks = (self._packed_alike(both), self._packed_alike(experts.w2))
        row[t.W13_ELEMENT], row[t.W2_ELEMENT] = (stack[0].element for stack in stacks)
        row[t.W2_OFFSET] = stacks[0][0].memory.nbytes
        memory = np.stack(
            [np.concatenate([part.memory.view(np.uint8) for part in pair]) for pair in zip(*stacks, strict=True)]
        )
        self._kept.append(memory)
        homes = memory.ctypes.data + memory.strides[0] * np.arange(len(memory), dtype=np.int64)
        self._kept.append(homes)
        row[t.EXPERT_HOMES] = homes.ctypes.data

    @staticmethod
    def _packed_alike(matrices: torch.Tensor) -> list[Panels]:
        """Packed matrices [E, N, K], one form for all."""
        packed = [pack_panels(matrix, allow_fp4=True) for matrix in matrices]
        if len({p.element for p in packed}) > 1:
            packed = [pack_panels(matrix, widest=True) for matrix in matrices]
        return packed
