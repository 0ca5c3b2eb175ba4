"""What an emulated kernel can do wrong."""


class EmulationError(AssertionError):
    """A kernel did what would be a bug on a GPU."""


class OutOfBounds(EmulationError):
    """An access outside every tensor that the launch was given."""


class DoubleStore(EmulationError):
    """Two programs, or two lanes with different values, store to one address."""


class ProgramRace(EmulationError):
    """A program reads what another program of the same launch stores: their order isn't defined."""


class Misaligned(EmulationError):
    """An address that isn't a multiple of the size of the access."""


class SharedMemoryError(EmulationError):
    """An access outside the block's shared memory, or one that is misaligned."""


class SharedMemoryRace(EmulationError):
    """Two threads touch the same shared memory between two barriers, and one of them writes."""


class Unsupported(EmulationError):
    """An instruction or operand that the emulation doesn't know."""


class Hang(EmulationError):
    """A kernel that doesn't end."""


class Divergence(EmulationError):
    """Threads that have to meet (at a barrier, in a warp's instruction) come to different places, or one never comes."""


class Overflow(EmulationError):
    """A number too large for its integer type, or a shift or division that has no result."""


class Crash(EmulationError):
    """An access to an address that no memory has."""
