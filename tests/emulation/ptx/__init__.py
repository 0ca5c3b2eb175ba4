"""An interpreter of the PTX that compilers emit for sm_80: see executor.py for its use, machine.py for how it works."""

from emulation.ptx.executor import PtxExecutor, ptx_executor, run_ptx

__all__ = ["PtxExecutor", "ptx_executor", "run_ptx"]
