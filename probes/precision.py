"""The precision that a recipe's encoder computes in, settled for this machine before work begins.

"auto" is bf16 where the device multiplies it natively, else fp32: a processor without such instructions computes bf16
in software, 3 to 6 times slower than fp32. Imports torch when it is asked about the device, not before.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from probes.launch import is_first_process
from probes.sections import RecipeError

if TYPE_CHECKING:
    import torch

R = TypeVar("R")

CPU_INFO = Path("/proc/cpuinfo")
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Linux's names of instructions that multiply bf16: of x86 processors (two), and of ARM ones. AVX-NE-CONVERT, which
only converts, is none."""


@dataclass(frozen=True)
class Device:
    """What computes."""

    kind: str
    """"cuda" or "cpu"."""
    name: str
    native_bf16: bool
    """Whether it multiplies bf16 in hardware."""


def find_device() -> Device:
    """The GPU where there is one, else the processor. Apple's GPUs count as the processor here: they take fp32."""
    import torch

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # compute capability 8 and above
        return Device("cuda", torch.cuda.get_device_name(), native)
    backend = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if platform.machine().lower() in ("x86_64", "amd64"):  # there oneDNN may be held back (ONEDNN_MAX_CPU_ISA)
        backend = backend and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return Device("cpu", processor_name(), has_bf16_instructions(cpu_flags()) and backend)


def has_bf16_instructions(flags: Collection[str]) -> bool:
    """Whether a processor with these feature names multiplies bf16."""
    return not BF16_INSTRUCTIONS.isdisjoint(flags)


def cpu_flags() -> set[str]:
    """Names of this processor's features as Linux gives them; empty on other systems, which then compute in fp32."""
    return set(_cpu_info("flags", "Features").split())


def processor_name() -> str:
    """The processor's own name, such as "AMD EPYC 9R14", or its architecture."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def settle_precision(recipe: R, device: Device | None = None, *, planned: bool = False) -> tuple[R, str]:
    """The recipe with "fp32", "bf16" or "fp16" in the place of "auto", and a sentence for the result.

    Args:
        recipe: any with a section `trainer` or `compute` that has a precision.
        device: that will compute; None finds this machine's.
        planned: nothing is computed: what this machine cannot or should not do passes.

    Returns:
        The recipe, and such as "bf16 (auto; NVIDIA H100, which multiplies it natively)".

    Raises:
        RecipeError: fp16 without a GPU.
    """
    name, device = precision_section(recipe), device or find_device()
    asked = str(getattr(recipe, name).precision)
    best = "bf16" if device.native_bf16 else "fp32"
    settled = best if asked == "auto" else asked
    if settled == "fp16" and device.kind == "cpu" and not planned:
        raise RecipeError(
            f"{name}.precision is 'fp16' and there is no GPU, on which alone it is computed; use {name}.precision=auto "
            f"({best} on this processor, {device.name})"
        )
    slow = settled == "bf16" and not device.native_bf16
    if slow and not planned and is_first_process():
        _say_once(
            f"note: {name}.precision is bf16, for which {device.name} has no instructions: it takes 3 to 6 times as "
            f"long as fp32; {name}.precision=auto takes fp32 here"
        )
    ability = "which multiplies bf16 natively" if device.native_bf16 else "which does not multiply bf16 natively"
    said = f"{settled} ({'auto' if asked == 'auto' else 'as asked'}; {device.name}, {ability})"
    section = dataclasses.replace(getattr(recipe, name), precision=settled)
    return dataclasses.replace(recipe, **{name: section}), said  # type: ignore[type-var]


def precision_section(recipe: Any) -> str:
    """Section that says the encoder's precision: "trainer", or "compute" in recipes that have no trainer."""
    return "trainer" if hasattr(recipe, "trainer") else "compute"


def usable_precision(stored: str, device: Device | None = None) -> str:
    """The precision of a finished run where this machine computes it as fast as fp32, else fp32."""
    device = device or find_device()
    fast = {"fp32": True, "bf16": device.native_bf16, "fp16": device.kind == "cuda"}
    return stored if fast.get(stored, False) else "fp32"


def mixed_precision(precision: str, device: torch.device) -> torch.autocast:
    """Context in which fp32 weights compute as a training in `precision` does; "fp32" leaves everything as it is."""
    import torch

    from eva_clip.models import DTYPES

    half = precision != "fp32"
    return torch.autocast(device.type, DTYPES[precision] if half else None, enabled=half)


@functools.cache
def _say_once(text: str) -> None:
    """Print a line that a suite would otherwise repeat for every set."""
    print(text, flush=True)


def _cpu_info(*keys: str) -> str:
    """The first value of one of these keys in Linux's description of the processor, or nothing."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() in keys), "")
