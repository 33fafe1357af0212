"""Capabilities of this machine, queried where a test needs them, and simulated ones.

``PRETEND_FP16=1`` (or 0) makes DeepSpeed believe that the CPU computes in float16 by itself (or does not).
"""

from __future__ import annotations

import os

import torch


def pretend() -> None:
    """Be, for DeepSpeed, the machine that the environment asks for."""
    if "PRETEND_FP16" in os.environ:
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda _: _has_fp16()


def no_fp16() -> str | None:
    """Why fp16 cannot be tried here, or None."""
    try:
        with torch.autocast("cpu", torch.float16):
            torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2, requires_grad=True)).sum().backward()
    except RuntimeError as error:
        return f"this CPU cannot do fp16: {error}"
    return None


def no_fp16_under_deepspeed() -> str | None:
    """Why DeepSpeed refuses fp16 here, or None; it asks more of a CPU than torch does."""
    return no_fp16() if _has_fp16() else "DeepSpeed refuses fp16 on a CPU without AVX512-FP16"


def _has_fp16() -> bool:
    asked = os.environ.get("PRETEND_FP16")
    return asked == "1" if asked else bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
