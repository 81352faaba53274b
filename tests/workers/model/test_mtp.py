"""The MTP block (spec 5.1): traps 11, 35, 36. transformers drops MTP, so one of its ordinary blocks stands in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.oracle import oracle_model
from tests.support.tiny import random_tokens, tiny_config
from tests.support.tolerances import LOGITS_FP32, worst_position_error
from workers.model import full_sequence
from workers.model.full_sequence import mtp_forward, run_full
from workers.model.layers import Rope
from workers.model.precision import Precision
from workers.model.weights import ModelWeights, random_named_weights

CONFIG = tiny_config((4, 128), num_hash_layers=0)
NAMED = random_named_weights(CONFIG, seed=5)
WEIGHTS = ModelWeights.from_named(CONFIG, NAMED)
IDS = random_tokens(CONFIG, 150, seed=5, batch=2)


@pytest.fixture(scope="module")
def streams() -> Tensor:
    return run_full(WEIGHTS, CONFIG, IDS, Precision.fp32()).streams[:, :-1]


def drafted(streams: Tensor, ids: Tensor = IDS) -> Tensor:
    return mtp_forward(WEIGHTS, CONFIG, streams, ids[:, 1:], Precision.fp32()).logits


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@torch.no_grad()
def test_block_agrees_with_a_transformers_sliding_block(streams: Tensor) -> None:
    one = tiny_config((0,), num_hash_layers=0)
    named = {name: tensor for name, tensor in NAMED.items() if not name.startswith(("layers.", "mtp."))}
    block = {name.removeprefix("mtp.0."): tensor for name, tensor in NAMED.items() if name.startswith("mtp.0.")}
    own = {"e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight"}
    named |= {f"layers.0.{name}": t for name, t in block.items() if name not in own and "hc_head" not in name}
    named |= {name: block[name] for name in ("norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")}
    oracle = oracle_model(one, named)
    embedded = rms(NAMED["embed.weight"][IDS[:, 1:]], block["enorm.weight"])
    mixed = (embedded @ block["e_proj.weight"].T).unsqueeze(2)
    mixed = mixed + rms(streams, block["hnorm.weight"]) @ block["h_proj.weight"].T
    positions = torch.arange(streams.shape[1]).unsqueeze(0)
    distance = positions.unsqueeze(-1) - positions.unsqueeze(1)
    mask = torch.zeros(distance.shape).masked_fill((distance < 0) | (distance >= 128), float("-inf")).unsqueeze(1)
    tables = {"main": oracle.model.rotary_emb(mixed, position_ids=positions, layer_type="main")}
    out = oracle.model.layers[0](
        mixed, position_embeddings=tables, position_ids=positions, attention_mask=mask, input_ids=IDS[:, 1:]
    )
    expected = oracle.lm_head(oracle.model.norm(oracle.model.hc_head(out)))
    assert worst_position_error(drafted(streams), expected) <= LOGITS_FP32


def test_rope_is_unscaled(streams: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compressed layers' tables the drafts would differ."""
    plain = drafted(streams)
    at = Rope.at
    other = CONFIG.layer_kinds[0]
    monkeypatch.setattr(full_sequence.Rope, "at", lambda config, _, positions: at(config, other, positions))
    assert worst_position_error(drafted(streams), plain) > 10 * LOGITS_FP32


def test_drafts_do_not_depend_on_a_shift_of_all_positions(streams: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = drafted(streams)
    at = Rope.at
    monkeypatch.setattr(full_sequence.Rope, "at", lambda config, kind, positions: at(config, kind, positions + 1))
    assert worst_position_error(drafted(streams), plain) <= LOGITS_FP32


def test_every_stream_counts_not_only_their_mix(streams: Tensor) -> None:
    permuted = streams[:, :, [1, 0, 2, 3]]
    assert worst_position_error(drafted(permuted), drafted(streams)) > 10 * LOGITS_FP32


def test_block_has_its_own_sink(streams: Tensor) -> None:
    named = dict(NAMED)
    named["mtp.0.attn.attn_sink"] = NAMED["mtp.0.attn.attn_sink"] + 3.0
    weights = ModelWeights.from_named(CONFIG, named)
    changed = mtp_forward(weights, CONFIG, streams, IDS[:, 1:], Precision.fp32()).logits
    assert worst_position_error(changed, drafted(streams)) > 10 * LOGITS_FP32


def test_drafts_read_no_later_token(streams: Tensor) -> None:
    changed = IDS.clone()
    changed[:, 100] = (changed[:, 100] + 1) % CONFIG.vocab_size
    plain, later = drafted(streams), drafted(streams, changed)
    assert torch.equal(later[:, :99], plain[:, :99])
    assert not torch.equal(later[:, 99], plain[:, 99])


def test_output_streams_chain_into_the_next_draft(streams: Tensor) -> None:
    first = mtp_forward(WEIGHTS, CONFIG, streams, IDS[:, 1:], Precision.fp32())
    second = mtp_forward(WEIGHTS, CONFIG, first.streams, first.logits.argmax(-1), Precision.fp32())
    assert second.logits.shape == first.logits.shape
    assert second.logits.isfinite().all()
