"""Which devices the compiled CUDA kernels run on: pure functions of what was built and of the device."""

import re
from collections.abc import Sequence

import torch

# CMake's name of an architecture: its number, perhaps a letter that binds it to one generation, real code or PTX only.
_NAME = re.compile(r"(\d+)(\d)([af]?)(-real|-virtual)?")
SIXTEEN_BIT = (8, 0)  # the tensor cores' bf16 and the async copies of the 16-bit kernels


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether what was built for ``arch`` ("90-real", "120", "100a") runs on a device of ``capability``.

    Real code runs on its own major version from its own minor one on; PTX is compiled by the driver for anything newer. Letters
    bind both: "a" to exactly one capability, "f" to a family. Names that say nothing ("native", "all") count as fitting.
    """
    match = _NAME.fullmatch(arch)
    if match is None:
        return True
    built, letter, kind = (int(match[1]), int(match[2])), match[3], match[4]
    if letter == "a":
        return capability == built
    same_family = capability[0] == built[0] and capability >= built
    if kind == "-real" or letter == "f":
        return same_family
    return capability >= built  # its real code there, else its PTX


def no_image(archs: Sequence[str], capability: tuple[int, int]) -> str | None:
    """Why none of what was built runs on a device, or None where something does, or where nobody wrote down what was built."""
    if not archs or any(runs_on(arch, capability) for arch in archs):
        return None
    major, minor = capability
    return f"the cuda kernels were built for {', '.join(archs)}, this device has compute capability {major}.{minor}"


def too_old(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why a device can't run the kernels of a dtype, or None."""
    if dtype in (torch.float16, torch.bfloat16) and capability < SIXTEEN_BIT:
        major, minor = capability
        needed = f"{SIXTEEN_BIT[0]}.{SIXTEEN_BIT[1]}"
        return f"cuda's 16-bit kernels need compute capability {needed}, this device has {major}.{minor}"
    return None


def unfit_device(archs: Sequence[str], dtype: torch.dtype | None = None) -> str | None:
    """Why the current CUDA device can't run the kernels (those of ``dtype``), or None if it can, or if there is no device."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    missing = no_image(archs, capability)
    return missing if missing is not None or dtype is None else too_old(dtype, capability)


# torch.compile asks once and does not trace it.
unfit_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def other_major(built_with: str | None, running: str | None) -> str | None:
    """Why a library built with one CUDA toolkit doesn't belong to a torch of another ("13.0"), or None where it does.

    A torch without CUDA has no device to run anything on: it may load any library. So may any torch if the toolkit is unknown.
    """
    if not built_with or not running or built_with.split(".")[0] == running.split(".")[0]:
        return None
    return f"it was built with CUDA {built_with}, but this torch uses CUDA {running}; build fastres beside this torch"
