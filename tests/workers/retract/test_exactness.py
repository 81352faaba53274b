"""Retracted requests get the tokens they would have got, whatever is retracted when and wherever it waits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.workers.retract.harness import RetractPair, prompt, retract_config
from tests.workers.runtime.fake_model import fake_engine
from tests.workers.runtime.pair import make_request

HARSH = {"poison_freed": True, "other_pages": True}
both = pytest.mark.parametrize("ahead", [False, True], ids=["in_turn", "ahead"])
"""Also with a step on its way whenever a request is taken out."""


@pytest.mark.parametrize("length", [1, 3, 4, 126, 127, 128, 129, 254, 255, 256, 257, 383])
def test_a_retract_after_every_token_changes_nothing(length: int) -> None:
    requests = [make_request("a", prompt(length), max_tokens=7)]
    with RetractPair() as pair:
        pair.control(interval=1, **HARSH)
        pair.start(requests[0])
        pair.check_tokens(requests)
        report = pair.report()
        assert report.events == report.resumes == 6 and report.by_cause == {"forced": 6}
        assert report.contexts == tuple(range(length, length + 6)) and report.repeat_max == 6
        assert report.bytes_out == report.bytes_in > 0 and report.fallbacks == {}


@both
def test_a_request_is_retracted_at_every_residue_of_the_page(ahead: bool) -> None:
    requests = [make_request("a", prompt(100), max_tokens=258), make_request("b", prompt(3), max_tokens=90)]
    with RetractPair(decode_engine=fake_engine(ahead=ahead)) as pair:
        pair.control(interval=1, **HARSH)
        for request in requests:
            pair.start(request)
        pair.check_tokens(requests)
        report = pair.report()
        assert {n % 256 for n in report.contexts} == set(range(256))


@both
def test_retracted_and_other_requests_mix_in_every_batch(ahead: bool, seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        make_request(f"r{i}", prompt(rng.choice([2, 60, 127, 130, 255]), i), max_tokens=rng.randint(1, 50), seed=i,
                     temperature=i % 2, frequency_penalty=0.3 * (i % 3), min_tokens=1)
        for i in range(10)
    ]  # fmt: skip
    with RetractPair(decode_engine=fake_engine(ahead=ahead)) as pair:
        pair.control(interval=rng.randint(2, 9), seed=seed % 1000, **HARSH)
        for request in requests:
            pair.start(request)
        pair.check_tokens(requests)
        assert pair.report().events > 10


@pytest.mark.parametrize("tier", ["pinned", "disk"])
def test_every_tier_gives_the_bytes_back(tier: str, tmp_path: Path) -> None:
    requests = [make_request(f"r{i}", prompt(120 + 9 * i, i), max_tokens=30) for i in range(3)]
    with RetractPair(retract=retract_config(disk=str(tmp_path))) as pair:
        pair.control(interval=8, tier=tier, **HARSH)
        for request in requests:
            pair.start(request)
        pair.check_tokens(requests)
        report = pair.report()
        assert report.by_tier == {tier: report.events} and report.events >= 9 and not report.fallbacks
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".kv", ".part", ".stage")]


@pytest.mark.parametrize("victim", ["policy", "random", "named"])
def test_every_rule_takes_someone_out(victim: str) -> None:
    requests = [make_request(f"r{i}", prompt(50, i), max_tokens=40) for i in range(3)]
    with RetractPair() as pair:
        pair.control(interval=5, victim=victim, names=("r1",), **HARSH)
        for request in requests:
            pair.start(request)
        pair.check_tokens(requests)
        assert pair.report().events >= 5


def test_logprobs_and_stop_tokens_survive() -> None:
    ids = prompt(90)
    with RetractPair() as pair:
        pair.start(make_request("free", ids, max_tokens=20, logprobs=2, temperature=1.0, seed=3))
        plain = pair.events.rest("free")
        stop = plain[12].token_ids[0]
        pair.control(interval=2, **HARSH)
        pair.start(make_request("again", ids, max_tokens=20, logprobs=2, temperature=1.0, seed=3,
                                ignore_eos=False, stop_token_ids=(stop,)))  # fmt: skip
        again = pair.events.rest("again")
        assert [e.token_ids for e in again] == [e.token_ids for e in plain[: len(again)]]
        assert [e.logprobs for e in again] == [e.logprobs for e in plain[: len(again)]]
        assert [e.index for e in again] == list(range(len(again))) and again[-1].token_ids == (stop,)


def test_a_retract_right_before_the_stop_token_ends_the_request_once() -> None:
    ids = prompt(30)
    with RetractPair() as pair:
        pair.start(make_request("free", ids, max_tokens=10))
        plain = [e.token_ids[0] for e in pair.events.rest("free")]
        pair.control(interval=1, **HARSH)
        request = make_request("again", ids, max_tokens=10, ignore_eos=False, stop_token_ids=(plain[6],))
        pair.start(request)
        pair.check_tokens([request])


def test_no_control_means_no_retract() -> None:
    requests = [make_request("a", prompt(40), max_tokens=20)]
    with RetractPair() as pair:
        pair.control(interval=3)
        pair.control()
        pair.start(requests[0])
        pair.check_tokens(requests)
        assert pair.report().events == 0


def test_resuming_in_the_same_pages_is_counted_when_there_are_no_others() -> None:
    requests = [make_request("a", prompt(40), max_tokens=8)]
    with RetractPair(decode_engine=fake_engine(full_pages=1, window_pages=1, slots=1), max_context=256) as pair:
        pair.control(interval=2, **HARSH)
        pair.start(requests[0])
        pair.check_tokens(requests)
        report = pair.report()
        assert report.fallbacks == {"same_pages": report.events}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_copy_is_made_again(failing: int) -> None:
    requests = [make_request("a", prompt(40), max_tokens=10)]
    with RetractPair() as pair:
        pair.control(interval=3, fail_copy=failing, **HARSH)
        pair.start(requests[0])
        pair.check_tokens(requests)
        assert pair.report().fallbacks == {"copy_failed": 1}
