"""Choosing output tokens: batched, per-request parameters, and the same choice whatever else is in the batch.

Owns: logit edits (penalties, bias, suppressed stop ids), truncation (top-k, top-p, min-p), the random draw, reported
log-probabilities. Does not own: when a request stops (`workers/sequence.py`).

Invariant: the token at output position p depends only on that row's logits, the request's parameters, its own tokens
and p. The draw is Gumbel-max with noise from a counter-based generator keyed by (seed, p, token id), so nothing is
carried between steps: a retracted, migrated or re-prefilled request samples on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from workers.messages import SamplingParams, TokenLogprob

_MASK64 = (1 << 64) - 1
# Constants of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014; Vigna's variant).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def splitmix64(x: int) -> int:
    """The splitmix64 finaliser of `x + golden ratio`: a 64-bit hash."""
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)


def request_seed(params: SamplingParams, request_id: str) -> int:
    """The request's seed: its own, or one derived from its id, so that every worker and attempt draws alike."""
    if params.seed is not None:
        return params.seed & _MASK64
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled row. `token_id` None: the logits of this row hold a NaN or no finite value."""

    token_id: int | None
    logprob: TokenLogprob | None


class SampleState:
    """What sampling one request needs between steps. Rebuilt exactly from (params, prompt, output)."""

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        stop_ids: frozenset[int],
        prompt_ids: Seq[int],
        output_ids: Seq[int],
        vocab_size: int,
    ) -> None:
        """`stop_ids`: every id that `min_tokens` must suppress. Ids outside the vocabulary are ignored."""
        self.params = params
        self.seed = seed
        self.num_output = len(output_ids)
        self._plain = not params.edits_logits
        if self._plain:
            return
        self.output_counts = _count_tokens(output_ids, vocab_size)
        self.in_prompt = _count_tokens(prompt_ids, vocab_size) > 0
        self.stop_ids = torch.tensor(sorted(i for i in stop_ids if i < vocab_size), dtype=torch.int64)
        bias = [(i, b) for i, b in params.logit_bias if i < vocab_size]
        self.bias_ids = torch.tensor([i for i, _ in bias], dtype=torch.int64)
        self.bias = torch.tensor([b for _, b in bias], dtype=torch.float32)

    @property
    def plain(self) -> bool:
        """True when the logits of this request are sampled as they come."""
        return self._plain

    def observe(self, token_id: int) -> None:
        """Counts one more output token."""
        self.num_output += 1
        if not self._plain:
            self.output_counts[token_id] += 1


def _count_tokens(ids: Seq[int], vocab_size: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(list(ids), dtype=torch.int64), minlength=vocab_size).to(torch.float32)


def sample(logits: torch.Tensor, states: Seq[SampleState]) -> list[Sampled]:
    """One token for each row of `logits` [B, V] fp32, which stays unchanged.

    Reported log-probabilities are those of the model itself: before edits, temperature and truncation.
    """
    rows_with_logprobs = [i for i, s in enumerate(states) if s.params.logprobs is not None]
    edited = logits
    if any(not s.plain for s in states):
        edited = logits.clone()
        for i, state in enumerate(states):
            if not state.plain:
                _edit_row(edited[i], state)
    best, best_ids = edited.max(dim=-1)
    token_ids: list[int] = best_ids.tolist()
    drawn = [i for i, s in enumerate(states) if not s.params.greedy]
    if drawn:
        rows = edited if len(drawn) == len(states) else edited[drawn]
        chosen = _draw(rows, [states[i] for i in drawn])
        for i, token_id in zip(drawn, chosen.tolist(), strict=True):
            token_ids[i] = token_id
    logprobs: dict[int, TokenLogprob] = {}
    if rows_with_logprobs:
        logprobs = _logprobs(logits, states, rows_with_logprobs, token_ids)
    finite = [x - x == 0.0 for x in best.tolist()]
    return [
        Sampled(token_id if ok else None, logprobs.get(i))
        for i, (token_id, ok) in enumerate(zip(token_ids, finite, strict=True))
    ]


def _edit_row(row: torch.Tensor, state: SampleState) -> None:
    """Penalties, bias and suppressed stop ids on `row` [V], in place."""
    params = state.params
    if params.repetition_penalty != 1.0:
        # Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL report, section 4.1).
        seen = state.in_prompt | (state.output_counts > 0)
        penalised = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
        row.copy_(torch.where(seen.to(row.device), penalised, row))
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        counts = state.output_counts.to(row.device)
        row.sub_(params.frequency_penalty * counts + params.presence_penalty * (counts > 0))
    if len(state.bias_ids):
        row.index_add_(0, state.bias_ids.to(row.device), state.bias.to(row.device))
    if state.num_output < params.min_tokens and len(state.stop_ids):
        row[state.stop_ids.to(row.device)] = -torch.inf


def _draw(logits: torch.Tensor, states: Seq[SampleState]) -> torch.Tensor:
    """Token ids [R] int64 drawn from `logits` [R, V] after temperature and truncation."""
    device = logits.device
    temperature = torch.tensor([s.params.temperature for s in states], dtype=torch.float32, device=device)
    scaled = logits / temperature[:, None]  # [R, V]
    top_k = [i for i, s in enumerate(states) if 0 < s.params.top_k < logits.shape[1]]
    for i in top_k:
        # Ties with the k-th value stay: dropping some of them would need an order among equals.
        threshold = torch.topk(scaled[i], states[i].params.top_k).values[-1]
        scaled[i].masked_fill_(scaled[i] < threshold, -torch.inf)
    truncated = [i for i, s in enumerate(states) if s.params.top_p < 1.0 or s.params.min_p > 0.0]
    if truncated:
        scaled[truncated] = _truncate(scaled[truncated], [states[i].params for i in truncated])
    noise = gumbel_noise([s.seed for s in states], [s.num_output for s in states], logits.shape[1], device)
    return (scaled.double() + noise).argmax(dim=-1)


def _truncate(scaled: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """`scaled` [R, V] with tokens outside top-p and below min-p at -inf; the best token always stays."""
    device = scaled.device
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device)[:, None]
    probs = torch.softmax(scaled, dim=-1)  # [R, V]
    ordered = _descending(probs)
    mass_before = ordered.cumsum(dim=-1) - ordered
    num_kept = (mass_before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold = ordered.gather(1, num_kept - 1)
    threshold = torch.where(top_p < 1.0, threshold, torch.zeros_like(threshold))
    threshold = torch.maximum(threshold, min_p * ordered[:, :1])
    return scaled.masked_fill(probs < threshold, -torch.inf)


def _descending(probs: torch.Tensor) -> torch.Tensor:
    if probs.device.type == "cpu":
        # numpy sorts values alone: a tenth of torch's time, which carries indices along.
        return torch.from_numpy(np.sort(probs.numpy(), axis=-1)[:, ::-1].copy())
    return probs.sort(dim=-1, descending=True).values


def gumbel_noise(seeds: Seq[int], positions: Seq[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise [R, V] fp64, row r a function of (seeds[r], positions[r]) alone.

    Row key = splitmix64(splitmix64(seed) + position); element v hashes key + golden * (v + 1) once more. int64
    arithmetic wraps, as the generator wants; shifts are made logical by masking the copied sign bits.
    """
    keys = [_signed(splitmix64(splitmix64(s) + p)) for s, p in zip(seeds, positions, strict=True)]
    x = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device)[None, :] * _signed(_GOLDEN)
    x = x + torch.tensor(keys, dtype=torch.int64, device=device)[:, None]  # [R, V]
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    x = x ^ _shift_right(x, 31)
    # 52 bits and a half step: never 0 and never 1, so both logarithms stay finite.
    uniform = (_shift_right(x, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _logprobs(
    logits: torch.Tensor, states: Seq[SampleState], rows: Seq[int], token_ids: Seq[int]
) -> dict[int, TokenLogprob]:
    """Log-probability of each chosen token and its best alternatives, for `rows` of `logits` [B, V]."""
    logp = torch.log_softmax(logits[list(rows)].float(), dim=-1)  # [R, V]
    num_top = (
        max(1, *(states[i].params.logprobs or 0 for i in rows))
        if len(rows) > 1
        else max(1, states[rows[0]].params.logprobs or 0)
    )
    top = torch.topk(logp, min(num_top, logp.shape[1]), dim=-1)
    chosen = logp.gather(1, torch.tensor([[token_ids[i]] for i in rows], device=logp.device))[:, 0].tolist()
    values, ids = top.values.tolist(), top.indices.tolist()
    result = {}
    for r, i in enumerate(rows):
        wanted = states[i].params.logprobs or 0
        pairs = tuple(zip(ids[r][:wanted], values[r][:wanted], strict=True))
        result[i] = TokenLogprob(token_ids[i], chosen[r], pairs)
    return result
