"""Train dsv4-nano on one GPU: `python -m deploy.demo.train_nano --out DIR --minutes M [--start CHECKPOINT_DIR]`.

Time, not steps, is the budget: learning rates and curriculum follow the elapsed share of `--minutes`. The C4 layers
first attend densely while their indexers learn the attention distribution (KL), then the indexers' choice takes over;
rows grow from 512 to 8192 tokens. A checkpoint is a directory of fp32 tensor files that `--start` reads again
(weights only: a warm restart). Scores are teacher-forced greedy matches of whole answers on held-out problems: an
answer counts if every one of its tokens is the greedy choice, a lower bound of free greedy decoding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from cluster.tasks import arithmetic, recall, smalltalk
from cluster.tasks.sample import Split, TaskSample
from deploy.demo.muon import Adam, Muon
from deploy.demo.rows import ANSWER_WEIGHT, PAD_ID, Renderer, draw_row
from deploy.demo.training_model import ParameterStore, StepOutput, TrainingModel
from workers.model.config import ModelConfig
from workers.model.precision import Precision
from workers.model.presets import NANO
from workers.model.weights import WeightClass, random_named_weights, tensor_infos

TOKENS_PER_STEP = 65536
MUON_RATE = 0.02
ADAM_RATE = 3e-3
ADAM_FACTORS = {"embedding": 2.0, "mixing": 0.3, "scalar": 1.0, "router": 1.0}
"""Rates of the Adam roles relative to `ADAM_RATE`."""
BIAS_RATE = 1e-3
"""Step of a router's balancing bias per training step (noaux: no balancing loss)."""
MAX_COMPILED_BLOCKS = 64
"""Variants of one block that the compiler keeps: four kinds times three row lengths, and dense C4."""
INDEXER_WEIGHT, MTP_WEIGHT = 0.3, 0.1
EVALUATION_SEED = 1000


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the curriculum."""

    until: float
    """Share of the run at which it ends."""
    mix: dict[int, float]
    """Row length to its share of steps."""
    is_dense: bool = False
    with_mtp: bool = False


CURRICULA: dict[str, tuple[Phase, ...]] = {
    "first": (
        Phase(0.20, {512: 1.0}, is_dense=True),
        Phase(0.36, {512: 0.6, 2048: 0.4}),
        Phase(1.00, {512: 0.4, 2048: 0.35, 8192: 0.25}),
    ),
    "second": (
        Phase(0.30, {512: 0.8, 2048: 0.2}, with_mtp=True),
        Phase(1.00, {512: 0.5, 2048: 0.3, 8192: 0.2}, with_mtp=True),
    ),
}


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Fresh tensors by official name: unit-variance linears, neutral gates, streams that start as a plain residual."""
    named = random_named_weights(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    size = config.hc_mult
    for place, name in enumerate(sorted(named)):
        tensor = named[name]
        if name.endswith("norm.weight"):
            named[name] = torch.ones_like(tensor)
        elif name.endswith((".ape", ".attn_sink", "gate.bias")):
            named[name] = torch.zeros_like(tensor)
        elif name.endswith("_scale"):
            named[name] = torch.full_like(tensor, 0.1)
        elif name.endswith("hc_head_base"):
            named[name] = torch.zeros_like(tensor)
        elif name.endswith("_base"):
            pre = torch.full((size,), -1.0)
            pre[place % size] = 2.0
            named[name] = torch.cat((pre, torch.zeros(size), 4.0 * torch.eye(size).flatten()))
        elif name.endswith(("wo_b.weight", "w2.weight")):
            named[name] = 0.5 * tensor
        elif name == "head.weight":
            named[name] = 0.03 * torch.randn(tensor.shape, generator=generator)
    return named


def save_named(directory: Path, config: ModelConfig, named: dict[str, Tensor]) -> None:
    """Write a restart point: four files, experts in bf16 (they are trained as FP4), the rest in fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    experts = {part for info in tensor_infos(config) if info.weight_class is WeightClass.EXPERT for part in info.parts}
    stored = {name: (t.bfloat16() if name in experts else t).cpu().clone() for name, t in named.items()}
    sizes = {name: t.numel() * t.element_size() for name, t in stored.items()}
    parts: list[dict[str, Tensor]] = [{} for _ in range(4)]
    used = [0] * 4
    for name in sorted(stored, key=lambda n: -sizes[n]):
        part = used.index(min(used))
        parts[part][name] = stored[name]
        used[part] += sizes[name]
    for number, part_tensors in enumerate(parts):
        torch.save(part_tensors, directory / f"part{number}.pt.tmp")
        (directory / f"part{number}.pt.tmp").rename(directory / f"part{number}.pt")


def load_named(directory: Path) -> dict[str, Tensor]:
    """Read a restart point."""
    named: dict[str, Tensor] = {}
    for path in sorted(directory.glob("part*.pt")):
        named.update(torch.load(path, map_location="cpu", weights_only=True))
    return {name: t if t.dtype == torch.int64 else t.float() for name, t in named.items()}


def produce_rows(length: int, seed: int, queue: Queue[Any]) -> None:
    """Endlessly put batches `(ids int16 [B, length + 1], weights float16)` of one row length (runs in a process)."""
    rng, renderer = random.Random(seed), Renderer()
    while True:
        rows = [draw_row(rng, length, renderer) for _ in range(TOKENS_PER_STEP // length)]
        queue.put((np.stack([ids for ids, _ in rows]), np.stack([weights for _, weights in rows])))


class RowSource:
    """Batches from background processes, one queue per row length. Close it to end the processes."""

    def __init__(self, lengths: set[int], processes_each: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.queues: dict[int, Queue[Any]] = {length: context.Queue(maxsize=24) for length in lengths}
        self.processes = [
            context.Process(target=produce_rows, args=(length, seed * 10007 + length * 31 + i, queue), daemon=True)
            for length, queue in self.queues.items()
            for i in range(processes_each)
        ]
        for process in self.processes:
            process.start()

    def take(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs `[B, T]`, targets `[B, T]` (int64) and loss weights `[B, T]` on the device."""
        return to_device(*self.queues[length].get(timeout=120), device)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()


def to_device(ids: np.ndarray, weights: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Shift a batch into inputs, targets and weights."""
    rows = torch.from_numpy(ids).to(device, non_blocking=True).long()
    return rows[:, :-1], rows[:, 1:], torch.from_numpy(weights[:, 1:].astype(np.float32)).to(device)


def held_out_sets() -> dict[str, tuple[int, Iterator[TaskSample]]]:
    """Name to (row length, held-out samples)."""
    held, seed = Split.HELD_OUT, EVALUATION_SEED
    return {
        "arithmetic": (512, arithmetic.generate(held, seed)),
        "arithmetic-direct": (512, arithmetic.generate(held, seed, thinking=False)),
        "smalltalk": (512, smalltalk.generate(held, seed)),
        "recall-512": (512, recall.generate(held, seed, num_tokens=512)),
        "recall-512-thinking": (512, recall.generate(held, seed, num_tokens=512, thinking=True)),
        "recall-1k": (2048, recall.generate(held, seed, num_tokens=1024)),
        "recall-2k": (2048, recall.generate(held, seed, num_tokens=2048)),
        "recall-4k": (8192, recall.generate(held, seed, num_tokens=4096)),
        "recall-8k": (8192, recall.generate(held, seed, num_tokens=8192)),
    }


def evaluation_batches(count: int, lengths: set[int]) -> dict[str, list[tuple[int, np.ndarray, np.ndarray]]]:
    """Batches `(row length, ids, weights)` of `count` held-out samples of each set, shaped like training batches."""
    renderer = Renderer()
    batches: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for name, (length, samples) in held_out_sets().items():
        if length not in lengths:
            continue
        size = TOKENS_PER_STEP // length
        ids = np.full((math.ceil(count / size) * size, length + 1), PAD_ID, dtype=np.int16)
        weights = np.zeros(ids.shape, dtype=np.float16)
        for row, sample in enumerate(itertools.islice(samples, count)):
            document = renderer.document(sample)
            used = min(len(document.ids), length + 1)
            ids[row, :used], weights[row, :used] = document.ids[:used], document.weights[:used]
        starts = range(0, len(ids), size)
        batches[name] = [(length, ids[i : i + size], weights[i : i + size]) for i in starts]
    return batches


def score(model: TrainingModel, batches: list[tuple[int, np.ndarray, np.ndarray]], device: torch.device) -> float:
    """Share of samples whose every answer token is the greedy choice."""
    right = total = 0
    for _, ids, weights in batches:
        inputs, targets, loss_weights = to_device(ids, weights, device)
        answered = loss_weights == ANSWER_WEIGHT
        correct = model.run(inputs, targets, loss_weights).correct
        has_answer = answered.any(-1)
        right += int(((correct | ~answered).all(-1) & has_answer).sum())
        total += int(has_answer.sum())
    return right / max(total, 1)


def learning_rate(share: float, warmup: float, decay_from: float) -> float:
    """Factor on all rates: linear warm-up, constant, linear decay to 2 %."""
    if share < warmup:
        return share / warmup
    return 1.0 if share < decay_from else max(0.02, (1 - share) / (1 - decay_from))


class Trainer:
    """Owns the parameters, optimisers and clock of one run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        is_gpu = self.device.type == "cuda"
        named = load_named(arguments.start) if arguments.start else initial_weights(NANO, arguments.seed)
        self.store = ParameterStore(NANO, named, self.device)
        dtype = torch.bfloat16 if is_gpu else torch.float32
        self.model = TrainingModel(self.store, Precision.native(), dtype=dtype, is_compiled=is_gpu)
        stacks = self.store.stacks
        self.muon = Muon([p for key, p in stacks.items() if key[2] == "muon"])
        self.adam = Adam([(p, ADAM_FACTORS[key[2]]) for key, p in stacks.items() if key[2] != "muon"])
        self.phases = CURRICULA[arguments.curriculum]
        self.lengths = {length for phase in self.phases for length in phase.mix}
        self.started = time.monotonic()
        self.num_tokens = 0

    def share(self) -> float:
        """Elapsed part of the run, 0 to 1."""
        return (time.monotonic() - self.started) / (60 * self.arguments.minutes)

    def step(self, batch: tuple[Tensor, Tensor, Tensor], phase: Phase, rate: float) -> StepOutput:
        """One optimiser step."""
        output = self.model.run(*batch, is_dense=phase.is_dense, with_mtp=phase.with_mtp)
        loss = output.loss + INDEXER_WEIGHT * output.divergence + MTP_WEIGHT * output.mtp_loss
        loss.backward()
        self.muon.step(MUON_RATE * rate)
        self.adam.step(ADAM_RATE * rate)
        for parameter in self.store.stacks.values():
            parameter.grad = None
        self._balance(output.load, rate)
        self.num_tokens += batch[0].numel()
        return output

    def _balance(self, load: Tensor, rate: float) -> None:
        """Move each learned router's bias towards experts that got fewer tokens."""
        for name, bias in self.store.biases.items():
            row = -1 if name.startswith("mtp.") else int(name.split(".")[1])
            if row >= 0 or load.shape[0] > NANO.num_hidden_layers:
                bias += BIAS_RATE * rate * torch.sign(load[row].mean() - load[row])

    def train(self) -> None:
        """Run to the end of the time budget, logging and saving on the way."""
        args, rng = self.arguments, random.Random(self.arguments.seed)
        source = RowSource(self.lengths, args.processes, args.seed)
        batches = evaluation_batches(args.eval_samples, self.lengths)
        step, window, next_save, seen = 0, time.monotonic(), args.save_every, 0
        try:
            while (share := self.share()) < 1 and step < args.max_steps:
                phase = next(phase for phase in self.phases if share < phase.until)
                length = rng.choices(list(phase.mix), list(phase.mix.values()))[0]
                rate = args.rate * learning_rate(share, args.warmup, args.decay_from)
                batch = source.take(length, self.device)
                output = self.step(batch, phase, rate)
                step += 1
                if step % args.log_every == 0 or step == 1:
                    now, tokens = time.monotonic(), self.num_tokens - seen
                    self._log(step, batch, output, rate, tokens / (now - window))
                    window, seen = now, self.num_tokens
                if share * args.minutes > next_save:
                    next_save += args.save_every
                    self.checkpoint(step, {name: sets for name, sets in batches.items() if sets[0][0] in phase.mix})
                    window, seen = time.monotonic(), self.num_tokens
            self.checkpoint(step, batches)
        finally:
            source.close()

    def _log(
        self, step: int, batch: tuple[Tensor, Tensor, Tensor], output: StepOutput, rate: float, speed: float
    ) -> None:
        load = output.load[2 : NANO.num_hidden_layers]
        record = {
            "s": round(time.monotonic() - self.started, 1),
            "step": step,
            "length": batch[0].shape[1],
            "loss": round(float(output.loss.detach()), 4),
            "kl": round(float(output.divergence.detach()), 4),
            "mtp": round(float(output.mtp_loss.detach()), 4),
            "mtp_right": self._mtp_accuracy(output, batch[2]),
            "max_load": round(float((load / load.mean(-1, keepdim=True)).max()), 2),
            "rate": round(rate, 4),
            "tokens_per_s": round(speed),
        }
        print(json.dumps(record), flush=True)

    @staticmethod
    def _mtp_accuracy(output: StepOutput, weights: Tensor) -> float | None:
        """Share of answer tokens that the MTP block predicts one step early."""
        if output.mtp_correct is None:
            return None
        later = weights[:, 1:] == ANSWER_WEIGHT
        return round(float((output.mtp_correct[:, :-1] & later).sum() / later.sum()), 4)

    def checkpoint(self, step: int, batches: dict[str, list[tuple[int, np.ndarray, np.ndarray]]]) -> None:
        """Save a restart point and print held-out scores."""
        save_named(self.arguments.out / "restart", NANO, self.store.to_named())
        scores = {name: round(score(self.model, sets, self.device), 4) for name, sets in batches.items()}
        record = {"s": round(time.monotonic() - self.started, 1), "step": step, "tokens": self.num_tokens} | scores
        print(json.dumps(record), flush=True)
        with (self.arguments.out / "scores.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--curriculum", choices=CURRICULA, default="first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.0, help="factor on all learning rates")
    parser.add_argument("--warmup", type=float, default=0.01, help="share of the run with rising rates")
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the run at which rates begin to fall")
    parser.add_argument("--processes", type=int, default=3, help="data processes per row length")
    parser.add_argument("--eval-samples", type=int, default=256)
    parser.add_argument("--save-every", type=float, default=3.0, help="minutes")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--max-steps", type=int, default=10**9)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = MAX_COMPILED_BLOCKS
    Trainer(arguments).train()


if __name__ == "__main__":
    main()
