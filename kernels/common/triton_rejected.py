"""Configurations that an architecture is not offered; written by benchmarks/compile_ledger.py --update."""

# (kernel, width of the maps, architecture): configurations that spill, do not fit into shared memory, or lost the tensor cores
REJECTED: dict[tuple[str, str, int], tuple[str, ...]] = {}
