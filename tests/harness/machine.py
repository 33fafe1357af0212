"""Capabilities of this machine, queried where a test needs them, and simulated ones."""

from __future__ import annotations

import torch


def no_fp16() -> str | None:
    """Return the reason fp16 cannot be tried here, or None."""
    try:
        with torch.autocast("cpu", torch.float16):
            torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2, requires_grad=True)).sum().backward()
    except RuntimeError as error:
        return f"this CPU cannot do fp16: {error}"
    return None


def pretend_fp16(supported: bool = True) -> None:
    """Make DeepSpeed believe that this CPU computes in float16 by itself, or does not.

    DeepSpeed refuses fp16 on a CPU without AVX512-FP16, where torch computes the same in float32 and rounds.
    """
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda _: supported
