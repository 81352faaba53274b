"""What the router must know of the served model. Read from the checkpoint's small files; no weights, no torch."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


class EffortStyle(Enum):
    """How a checkpoint spells reasoning effort in its prompt; it changed between releases, so it goes by date.

    Source: encoding of the official releases, prompts compared per checkpoint date.
    """

    NONE = "none"
    """Knows no effort text (dsv4-nano)."""
    PREVIEW = "preview"
    """April 2026: nothing, except that `max` adds the "Absolute maximum" paragraph."""
    REFRESH = "refresh"
    """0731 and 0813: low adds nothing, high (the default) "Absolute maximum", max "Beyond maximum"."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Name, limits and conventions of the served model."""

    name: str
    """Answer of /v1/models, and the `model` that requests must name."""
    max_context: int
    """Most prompt + output tokens of one request."""
    vocab_size: int
    effort: EffortStyle = EffortStyle.NONE
    default_thinking: bool = True
    """Thinking when the request does not say."""
    default_temperature: float = 1.0
    default_top_p: float = 1.0
    aliases: tuple[str, ...] = ()
    """Other accepted names."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds reported by /v1/models."""
    fingerprint: str | None = None
    """`system_fingerprint` of every answer."""

    @classmethod
    def from_dir(
        cls,
        directory: Path,
        *,
        name: str,
        effort: EffortStyle = EffortStyle.NONE,
        max_context: int | None = None,
        aliases: tuple[str, ...] = (),
    ) -> ModelInfo:
        """Limits from `config.json`, sampling defaults from `generation_config.json` when there is one."""
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        path = directory / "generation_config.json"
        generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        limit = int(config["max_position_embeddings"])
        return cls(
            name=name,
            max_context=min(limit, max_context or limit),
            vocab_size=int(config["vocab_size"]),
            effort=effort,
            default_temperature=float(generation.get("temperature", 1.0)),
            default_top_p=float(generation.get("top_p", 1.0)),
            aliases=aliases,
        )
