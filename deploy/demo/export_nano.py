"""Write a restart point of `train_nano` as the official FP4/FP8 checkpoint.

    python -m deploy.demo.export_nano RESTART_DIR [--out deploy/demo/dsv4-nano]

The stored values are those that every training step computed with: storing rounds as fake quantisation does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deploy.demo.rows import NANO_DIR
from deploy.demo.train_nano import load_named
from workers.checkpoint.save import save_official
from workers.model.presets import NANO

SHARD_BYTES = 6 << 20
"""Small enough that the model comes in several shards, as the official checkpoints do."""


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("restart", type=Path)
    parser.add_argument("--out", type=Path, default=NANO_DIR)
    arguments = parser.parse_args()
    save_official(arguments.out, NANO, load_named(arguments.restart), shard_bytes=SHARD_BYTES)


if __name__ == "__main__":
    main()
