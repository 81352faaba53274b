"""`dsv4 logits`: the logits of every position of one sequence, through the workers' engine, as a numpy file.

Owns: reading the ids and writing the file. Does not own: the computation (`workers/engine_logits.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

from cluster.config import ConfigError


def token_ids_from(path: Path) -> list[int]:
    """A JSON list of token ids. Raises `ConfigError` naming the file."""
    try:
        ids: list[int] = json.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(str(path), "", exc.strerror or str(exc)) from exc
    except ValueError as exc:
        raise ConfigError(str(path), "", f"not JSON: {exc}") from exc
    is_list = isinstance(ids, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in ids)
    if not is_list or not ids:
        raise ConfigError(str(path), "", "expected a JSON list of token ids, at least one")
    return ids


def write_logits(
    model: Path, token_ids: list[int], output: Path, precision: str, prefill_chunk: int | None, decode_from: int | None
) -> tuple[int, ...]:
    """Computes and writes float32 [positions, vocabulary]; returns the shape. Shows loading on stderr.

    Raises `WorkerError`, and `ConfigError` naming a file that cannot be written (before computing, where that shows).
    """
    import numpy
    from rich.console import Console

    from cluster.cli_checkpoint import tensor_progress
    from workers.engine_logits import engine_logits
    from workers.model_bundle import ModelBundle

    if not output.parent.is_dir():
        raise ConfigError(str(output), "", "its folder does not exist")
    with tensor_progress("loading", Console(stderr=True)) as on_progress:
        bundle = ModelBundle.load(model, on_progress=on_progress)
    values = engine_logits(bundle, token_ids, precision=precision, prefill_chunk=prefill_chunk, decode_from=decode_from)
    array = numpy.asarray(values, dtype=numpy.float32)
    try:
        with output.open("wb") as file:
            numpy.save(file, array)
    except OSError as exc:
        raise ConfigError(str(output), "", exc.strerror or str(exc)) from exc
    return array.shape
