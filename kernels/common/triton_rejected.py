"""Configurations that an architecture is not offered; written by benchmarks/compile_ledger.py --update."""

# (kernel, architecture): configurations that spill, do not fit into shared memory, or lost the tensor cores
REJECTED: dict[tuple[str, int], tuple[str, ...]] = {
    ("conv_forward", 80): (
        "BLOCK_K=64,BLOCK_M=128,BLOCK_N=64,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=3",  # spills (8 bytes of stack)
    ),
    ("conv_forward", 86): (
        "BLOCK_K=32,BLOCK_M=128,BLOCK_N=128,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=4",  # asks for 115840 bytes of shared memory, sm_86 has 101376
        "BLOCK_K=64,BLOCK_M=128,BLOCK_N=128,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=2",  # spills (40 bytes of stack)
        "BLOCK_K=64,BLOCK_M=128,BLOCK_N=64,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=3",  # spills (8 bytes of stack)
    ),
    ("conv_forward", 89): (
        "BLOCK_K=32,BLOCK_M=128,BLOCK_N=128,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=4",  # asks for 115840 bytes of shared memory, sm_89 has 101376
        "BLOCK_K=64,BLOCK_M=128,BLOCK_N=128,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=2",  # spills (40 bytes of stack)
        "BLOCK_K=64,BLOCK_M=128,BLOCK_N=64,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=3",  # spills (8 bytes of stack)
    ),
    ("conv_forward", 120): (
        "BLOCK_K=32,BLOCK_M=128,BLOCK_N=128,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=4",  # asks for 115840 bytes of shared memory, sm_120 has 101376
        "BLOCK_K=64,BLOCK_M=128,BLOCK_N=128,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=2",  # spills (48 bytes of stack)
        "BLOCK_K=64,BLOCK_M=128,BLOCK_N=64,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=8,stages=3",  # spills (16 bytes of stack)
    ),
    ("input_gradient_kernel", 80): (
        "BLOCK_K=32,BLOCK_M=128,BLOCK_N=64,warps=8,stages=2",  # spills (8 bytes of stack)
    ),
    ("input_gradient_kernel", 100): (
        "BLOCK_K=32,BLOCK_M=128,BLOCK_N=64,warps=8,stages=2",  # spills (8 bytes of stack)
    ),
    ("scale_shift_act backward", 80): (
        "ELEMENTS=2048,PROGRAMS=1024,WIDTH=64,warps=4,stages=2",  # spills (16 bytes of stack)
    ),
    ("scale_shift_act backward", 86): (
        "ELEMENTS=2048,PROGRAMS=1024,WIDTH=64,warps=4,stages=2",  # spills (16 bytes of stack)
    ),
    ("scale_shift_act backward", 89): (
        "ELEMENTS=2048,PROGRAMS=1024,WIDTH=64,warps=4,stages=2",  # spills (16 bytes of stack)
    ),
}
