"""Where there is no GPU the kernels of whole steps run in Triton's interpreter, without its slow parts."""

from __future__ import annotations

import torch

if not torch.cuda.is_available():
    from tests.support.quick_interpreter import quicken_interpreter

    quicken_interpreter()
