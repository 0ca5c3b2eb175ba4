"""How batch_norm_act is cut into blocks, and what is refused: a pure function of the shape and a GPU, in C++ and in Python."""

import itertools

import pytest
import torch
from emulation import cuda
from emulation.cuda_problems import TYPES, Chip, Norm, check

from fastres.kernels.batch_norm_act import capacity

CHIPS = {
    "sm_80": Chip(108, 164 << 10, 163 << 10),
    "sm_86": Chip(84, 100 << 10, 99 << 10),
    "sm_90": Chip(132, 228 << 10, 227 << 10),
    "small": Chip(2, 64 << 10, 63 << 10),
}


@pytest.fixture(scope="module")
def library():
    found = cuda.build("batch_norm_act.cpp")
    check(found, "problem_size", Norm)
    return found


def plan_of(library, chip, backward, rows, channels, dtype) -> tuple[Norm, str | None]:
    p = Norm(TYPES[dtype], True, 1e-5, rows, channels)
    reason = library.call("make_plan", chip, int(backward), p, result=cuda.ctypes.c_char_p)
    return p, None if reason is None else reason.decode()


def test_plans_cover_the_map_and_fit(library):
    """And the choice of a backend, which is made in Python, knows the same."""
    refused = 0
    rows = (1, 31, 49, 1000, 32 * 49, 32 * 196, 32 * 784, 128 * 784, 10**6, 10**9)
    channels = (1, 3, 8, 64, 100, 256, 512, 2048, 12345, 10**6)
    for (name, chip), r, c, dtype, backward in itertools.product(CHIPS.items(), rows, channels, TYPES, (0, 1)):
        p, reason = plan_of(library, chip, backward, r, c, dtype)
        like = capacity.Chip(chip.multiprocessors, chip.shared_per_multiprocessor, chip.shared_per_block)
        assert reason == capacity.refusal(like, r, c, dtype.itemsize, backward=bool(backward)), (name, r, c, dtype)
        if reason is not None:
            refused += 1
            continue
        plan = p.plan
        width = plan.across * plan.vector
        assert (plan.groups - 1) * width < c <= plan.groups * width and c % plan.vector == 0
        assert (plan.parts - 1) * plan.part_rows < r <= plan.parts * plan.part_rows, "no part is empty"
        assert plan.groups * plan.parts <= 2 * chip.multiprocessors
        kept = (4 if backward else 8) + plan.shared_items
        assert kept * (256 // plan.across) >= min(plan.part_rows, r)
        assert (
            plan.shared_bytes <= chip.shared_per_block
            and 2 * (plan.shared_bytes + 1024) <= chip.shared_per_multiprocessor
        )
    assert refused > 100


def test_refusals_say_why(library):
    _, many = plan_of(library, CHIPS["sm_80"], 0, 4, 10**6, torch.float32)
    _, large = plan_of(library, CHIPS["sm_80"], 0, 10**6, 256, torch.float32)
    assert many is not None and "channels" in many
    assert large is not None and "shared memory" in large
    # The last stage of ResNet-50 at 32 images, in 16 bits
    for chip in ("sm_80", "sm_90"):
        assert plan_of(library, CHIPS[chip], 1, 32 * 49, 2048, torch.float16)[1] is None
