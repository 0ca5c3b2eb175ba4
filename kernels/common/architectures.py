"""What one multiprocessor of an NVIDIA GPU offers, by compute capability (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"), and how many warps of a kernel it holds at a time."""

from dataclasses import dataclass

RESERVED_SHARED = 1024  # bytes of shared memory that the system takes for each block
REGISTER_UNIT = 256  # registers are given to a warp in units of this many


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor. Shared memory in bytes, that of a block as a kernel may ask for."""

    number: int  # 90 for sm_90
    shared_per_block: int
    shared_per_multiprocessor: int
    warps: int
    blocks: int
    registers: int = 65536
    registers_per_thread: int = 255

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Share of the multiprocessor's warps that a kernel can fill; 0 where not even one block fits."""
        if shared > self.shared_per_block or registers > self.registers_per_thread:
            return 0.0
        per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        blocks = min(
            self.blocks,
            self.warps // warps,
            self.registers // max(per_warp * warps, 1),
            self.shared_per_multiprocessor // (shared + RESERVED_SHARED),
        )
        return blocks * warps / self.warps


def _kb(value: int) -> int:
    return value * 1024


ARCHITECTURES = {
    a.number: a
    for a in (
        Architecture(75, _kb(64), _kb(64), 32, 16),
        Architecture(80, _kb(163), _kb(164), 64, 32),
        Architecture(86, _kb(99), _kb(100), 48, 16),
        Architecture(89, _kb(99), _kb(100), 48, 24),
        Architecture(90, _kb(227), _kb(228), 64, 32),
        Architecture(100, _kb(227), _kb(228), 64, 32),
        Architecture(120, _kb(99), _kb(100), 48, 24),
    )
}


def architecture(capability: tuple[int, int]) -> Architecture:
    """The newest known architecture that a device of ``capability`` is at least as new as; the oldest for older ones."""
    number = 10 * capability[0] + capability[1]
    return ARCHITECTURES[max((n for n in ARCHITECTURES if n <= number), default=min(ARCHITECTURES))]
