"""Prompts of words: as long as they should be, asked for full answers, and judged without a score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.config import ClusterConfig
from cluster.stress import table
from cluster.stress.options import StressOptions
from cluster.stress.proof import Proof
from cluster.stress.words import NEAR_TOKENS, word_samples
from cluster.synthetic import tokenizer
from router.chat.tokenizer import ChatTokenizer
from tests.cluster.stress.fake_cluster import FakeCluster
from workers.model.presets import NANO, V4_FLASH


@pytest.mark.parametrize(("vocabulary", "slack"), [(NANO.vocab_size, 3), (V4_FLASH.vocab_size, 0)])
def test_prompts_have_exactly_the_tokens_that_were_drawn(vocabulary: int, slack: int) -> None:
    known = ChatTokenizer(json.dumps(tokenizer(vocabulary)))
    options = StressOptions(samples=27, seed=3, vocabulary=vocabulary)
    samples = word_samples(options)
    assert samples == word_samples(options)
    for sample in samples:
        count = len(known.encode_raw(sample.task.turns[-1].user, add_bos=False))
        if sample.context_tokens:
            assert options.far_tokens < sample.context_tokens <= count <= sample.context_tokens + slack
        else:
            assert NEAR_TOKENS[0] <= count <= NEAR_TOKENS[1] + slack
    assert sum(sample.context_tokens > 0 for sample in samples) == 15


def test_far_prompts_leave_room_for_the_answer() -> None:
    options = StressOptions(samples=40, vocabulary=129280, far_tokens=2048, max_context=8192, max_tokens=128)
    lengths = [sample.context_tokens for sample in word_samples(options) if sample.context_tokens]
    assert min(lengths) > 2048
    assert 7000 < max(lengths) <= 8192 - 128 - 16


def test_answers_run_to_their_full_length() -> None:
    body = word_samples(StressOptions(samples=1, vocabulary=1024, max_tokens=77))[0].body("m", 5)
    assert body["ignore_eos"] is True
    assert body["max_tokens"] == 77


def test_the_proof_compares_and_does_not_score(fake: FakeCluster, tmp_path: Path) -> None:
    options = StressOptions(samples=6, interval=4, vocabulary=1024)
    proof = Proof(options, ClusterConfig(), url=fake.url, api_key=None, console=Console(quiet=True))
    proof.prove(lambda: None, batched=False)
    assert proof.passed
    assert [row.score for row in proof.rows] == [None, None]
    assert [row.right for row in proof.rows] == [0, 0]
    assert proof.rows[1].identical == 6
    figures = json.loads(json.dumps(table.as_json(options, proof.rows, (), passed=True)))
    assert figures["runs"][0]["score"] is None
    assert table.run_table(proof.rows).row_count == 2
