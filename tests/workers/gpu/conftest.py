"""Triton's interpreter where there is no GPU: chosen here, before any test module imports triton."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
