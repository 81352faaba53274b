"""`dsv4 experts record`: the routing of a checkpoint's own greedy answers, as a trace file. CPU, in this process.

Owns: which prompts, the batch that never has a gap, what becomes a step of the trace. A sequence that ends gives its
place to the next prompt; only decode steps in which all places generate are recorded, so that every step of the trace
is a step of the batch. Prompts themselves are not part of it. Does not own: kernels (they write their choices down),
the file form (`workers/experts/trace.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cluster.errors import ClusterError
from cluster.evaluation import MAX_ANSWER_TOKENS, held_out_samples
from cluster.evaluation_run import tasks_named
from kvstore.pools.aggregate import PoolSizes
from kvstore.sequence_kv import SequenceKV
from workers.batch import ForwardBatch
from workers.cpu.model import CpuModel
from workers.engine import Engine
from workers.experts.trace import RoutingTrace
from workers.model.config import ModelConfig
from workers.model_bundle import ModelBundle, make_engine, precision_of
from workers.scheduler.admission import pages_of

if TYPE_CHECKING:
    from router.chat.request import ChatRequest

CHUNK = 256
"""Prompt tokens of one step."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the most tokens of the answer."""

    token_ids: tuple[int, ...]
    max_tokens: int


class _Place:
    """One sequence of the batch."""

    def __init__(self, kv: SequenceKV, prompt: Prompt) -> None:
        self.kv, self.prompt = kv, prompt
        self.num_computed = 0
        self.last_id = 0
        self.num_output = 0


def task_prompts(model: Path, task: str, count: int, seed: int) -> list[Prompt]:
    """Held-out questions of each task, as the router would render them. Raises `ValueError` for an unknown task."""
    from router.chat.encoding import ChatEncoder
    from router.chat.tokenizer import ChatTokenizer
    from router.model_info import ModelInfo

    encoder = ChatEncoder(ChatTokenizer.from_dir(model), ModelInfo.from_dir(model, name=model.name))
    prompts = []
    for kind in tasks_named(task):
        for sample in held_out_samples(kind, count, seed, None):
            request = _request(sample.messages(), thinking=sample.thinking)
            prompts.append(Prompt(tuple(encoder.encode(request).token_ids), MAX_ANSWER_TOKENS[kind]))
    return prompts


def file_prompts(model: Path, path: Path, max_tokens: int) -> list[Prompt]:
    """One prompt a line: text for a user's message, or a JSON list of token ids. Raises `ClusterError`."""
    from router.chat.encoding import ChatEncoder
    from router.chat.tokenizer import ChatTokenizer
    from router.model_info import ModelInfo

    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ClusterError(f"{path}: {exc}") from exc
    encoder = ChatEncoder(ChatTokenizer.from_dir(model), ModelInfo.from_dir(model, name=model.name))
    prompts = []
    for line in lines:
        ids = _ids_of(line)
        if ids is None:
            request = _request([{"role": "user", "content": line}], thinking=False)
            ids = tuple(encoder.encode(request).token_ids)
        prompts.append(Prompt(ids, max_tokens))
    return prompts


def _ids_of(line: str) -> tuple[int, ...] | None:
    try:
        ids = json.loads(line)
    except ValueError:
        return None
    is_list = isinstance(ids, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in ids)
    return tuple(ids) if is_list and ids else None


def _request(messages: Sequence[dict[str, str]], *, thinking: bool) -> ChatRequest:
    from router.chat.request import ChatMessage, ChatRequest, Role

    return ChatRequest(tuple(ChatMessage(Role(m["role"]), m["content"]) for m in messages), thinking=thinking)


def record(
    bundle: ModelBundle,
    prompts: Sequence[Prompt],
    *,
    batch: int,
    max_steps: int,
    source: str,
    tell: Callable[[int, int], None] = lambda steps, prompts_left: None,
) -> RoutingTrace:
    """Answers `prompts` greedily, `batch` at a time; at most `max_steps` steps. Raises `ClusterError` on none."""
    config = bundle.config
    known = [prompt for prompt in prompts if _fits(prompt, config)]
    if len(known) < batch:
        raise ClusterError(f"{len(known)} usable prompts, a batch of {batch} needs at least as many")
    most = max(pages_of(len(p.token_ids) + p.max_tokens) for p in known)
    engine = make_engine(bundle, precision_of("native"), PoolSizes(most * batch, most * batch, batch), num_threads=1)
    model = getattr(engine.model, "_model", None)
    if not isinstance(model, CpuModel):
        raise ClusterError("recording needs the CPU kernels (numba), and this model does not run on them")
    routes = np.zeros((max(CHUNK, batch), config.num_hidden_layers, config.num_experts_per_tok), np.uint16)
    model.record_routes(routes)
    steps = []
    for step in _decode_steps(engine, known, batch, config):
        steps.append(routes[:batch].transpose(1, 0, 2).astype(np.int16))
        tell(len(steps), step)
        if len(steps) >= max_steps:
            break
    if not steps:
        raise ClusterError("no step had every place of the batch generating; use a smaller batch or more prompts")
    experts = np.stack(steps)
    return RoutingTrace(experts, config.n_routed_experts, config.num_hash_layers, source)


def _fits(prompt: Prompt, config: ModelConfig) -> bool:
    return len(prompt.token_ids) > 0 and len(prompt.token_ids) + prompt.max_tokens <= config.max_position_embeddings


def _decode_steps(engine: Engine, prompts: Sequence[Prompt], batch: int, config: ModelConfig) -> Iterator[int]:
    """Runs everything; yields the number of waiting prompts after each decode step of a full batch."""
    waiting = list(prompts)[::-1]
    with torch.inference_mode():
        places = [_open(engine, waiting.pop()) for _ in range(batch)]
        while True:
            items = []
            for place in places:
                place.kv.grow_to(place.num_computed + 1)
                items.append((place.kv.indices(place.num_computed + 1), place.num_computed, (place.last_id,)))
            logits = engine.model.decode(ForwardBatch.build(items))
            yield len(waiting)
            for n, (place, token) in enumerate(zip(places, logits.argmax(-1).tolist(), strict=True)):
                place.num_computed += 1
                place.num_output += 1
                place.last_id = token
                if token == config.eos_token_id or place.num_output >= place.prompt.max_tokens:
                    place.kv.free()
                    if not waiting:
                        return
                    places[n] = _open(engine, waiting.pop())


def _open(engine: Engine, prompt: Prompt) -> _Place:
    """A sequence with its prompt computed and its first token chosen."""
    kv = SequenceKV.open(engine.allocators, window_tokens=engine.spec.window_tokens)
    assert kv is not None
    engine.open_slot(kv)
    place, ids = _Place(kv, prompt), prompt.token_ids
    for start in range(0, len(ids), CHUNK):
        end = min(start + CHUNK, len(ids))
        grown = kv.grow_to(end)
        assert grown, "pools were sized for every place"
        logits = engine.model.forward(ForwardBatch.build([(kv.indices(end), start, ids[start:end])]))
    place.num_computed, place.num_output = len(ids), 1
    place.last_id = int(logits[0].argmax())
    return place
