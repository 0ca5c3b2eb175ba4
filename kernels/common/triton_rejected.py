"""Configurations that an architecture is not offered; written by benchmarks/compile_ledger.py --update."""

# (kernel, width of the maps, architecture): what spills, does not fit into shared memory, or lost the tensor cores
REJECTED: dict[tuple[str, str, int], tuple[str, ...]] = {
    ("conv_forward", "16 bits", 80): (
        "BLOCK_K=32,BLOCK_M=128,BLOCK_N=64,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=4,stages=3",  # spills (8 bytes of stack)
    ),
    ("conv_forward", "16 bits", 86): (
        "BLOCK_K=32,BLOCK_M=64,BLOCK_N=128,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=4,stages=3",  # spills (16 bytes of stack)
    ),
    ("conv_forward", "16 bits", 89): (
        "BLOCK_K=32,BLOCK_M=64,BLOCK_N=128,GROUP_M=8,PATCH_H=0,PATCH_W=0,TMA=0,warps=4,stages=3",  # spills (16 bytes of stack)
    ),
    ("weight_gradient_kernel", "16 bits", 86): (
        "BLOCK_M=64,BLOCK_N=64,BLOCK_P=64,warps=4,stages=3",  # spills (8 bytes of stack)
    ),
    ("weight_gradient_kernel", "16 bits", 89): (
        "BLOCK_M=64,BLOCK_N=64,BLOCK_P=64,warps=4,stages=3",  # spills (8 bytes of stack)
    ),
}
