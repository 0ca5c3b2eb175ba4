"""A CUDA driver that isn't one: launches are specialised and compiled as on a device, and recorded in place of run.

with FakeTensorMode(), mock_driver(arch=90) as launches:
    op(torch.empty(..., device="cuda"))
launches[0].name, launches[0].grid, launches[0].arguments, launches[0].shared
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import ty_to_cpp

# Bytes of shared memory that a block may have, by architecture (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


@dataclass(frozen=True)
class MockLaunch:
    """One recorded launch. signature: Triton's type by parameter, "constexpr" for what is compiled in (ones too)."""

    name: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # all of them, in order
    signature: Mapping[str, str]
    divisible_by_16: tuple[str, ...]  # parameters of which the compiler may assume it
    num_warps: int
    num_stages: int
    shared: int
    compiled: Any


class MockDriver(DriverBase):
    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.launches: list[MockLaunch] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_LIMIT[arch], "multiprocessor_count": 100},
            load_binary=lambda name, binary, shared, device: (object(), 0, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:  # a key of caches: no other device's kernels must be found under it
        return f"mock sm_{self.arch}"

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty_to_cpp(ty)

    def get_benchmarker(self) -> Any:
        raise RuntimeError("a mock device can't time anything")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        divisible = tuple(
            names[path[0]] for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes
        )

        def launch(x: int, y: int, z: int, stream: Any, function: Any, packed: Any, *rest: Any) -> None:
            active = triton.runtime.driver.active
            arguments = dict(zip(names, rest[-len(names) :], strict=True))
            compiled = next(k for k in _kernels(source.fn, active.get_current_device()) if k.src is source)
            active.launches.append(
                MockLaunch(
                    source.name,
                    (x, y, z),
                    arguments,
                    dict(source.signature),
                    divisible,
                    metadata.num_warps,
                    metadata.num_stages,
                    metadata.shared,
                    compiled,
                )
            )

        return launch


def _kernels(function: Any, device: str) -> Iterator[Any]:
    yield from function.device_caches[device][0].values()


@contextmanager
def mock_driver(arch: int = 90) -> Iterator[list[MockLaunch]]:
    """Makes a mock device of this architecture Triton's active one inside the block; gives the list of launches."""
    config, driver = triton.runtime.driver, MockDriver(arch)
    before = config._active
    config.set_active(driver)
    try:
        with warnings.catch_warnings():  # Triton asks fake tensors for their address, which is 0 plus their offset
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield driver.launches
    finally:
        config._active = before
