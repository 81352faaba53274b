"""Whether an answer is right: the last number, or for small talk one of the accepted words."""

from __future__ import annotations

import re

from cluster.tasks.sample import Task, TaskSample

_NUMBER = re.compile(r"\d+")


def is_correct(sample: TaskSample, reasoning: str | None, content: str) -> bool:
    """Judge one finished answer by its content alone.

    A thinking sample also needs its reasoning to have ended: an answer that never left `<think>` has empty content and
    is wrong. `reasoning` is accepted so that callers pass what they received; its text is not graded.
    """
    if sample.thinking and reasoning is None and "</think>" in content:
        content = content.split("</think>", 1)[1]
    if sample.task is Task.SMALLTALK:
        text = content.lower()
        return any(word.lower() in text for word in sample.answer.split("|"))
    numbers = _NUMBER.findall(content)
    if not numbers:
        return False
    return bool(numbers[-1] == sample.answer)
