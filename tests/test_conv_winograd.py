"""The Winograd convolution kernels, called by name, against a float64 convolution of the same inputs."""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import rerun_with_isa

import fastres
from fastres import _library

pytestmark = pytest.mark.skipif(
    not (_library.build_info()["native"] or os.environ.get("FASTRES_REQUIRE_NATIVE")),
    reason=f"no native library: {_library.native_error()}",
)

KERNELS = {"winograd4": torch.float32, "winograd2": torch.bfloat16}
# Of the outputs' root mean square. bf16 is rounded three times: transformed inputs, transformed weights, outputs.
TOLERANCE = {"winograd4": 2e-5, "winograd2": 6e-2}
# Whole tiles, remainders of 1, 2 and 3 in either direction, images smaller than a tile.
SIZES = ((1, 1), (5, 3), (2, 6), (3, 11), (7, 9), (4, 4), (13, 57), (14, 14), (7, 7), (28, 28))
CHANNELS = tuple(itertools.product((3, 17, 48, 64), (5, 33, 100)))  # C, K: whole and partial vectors, several blocks
RESNET = ((56, 64), (28, 128), (14, 256), (7, 512))

kernels = pytest.mark.parametrize("kernel", KERNELS)


def run(kernel, x, w, bias=None, residual=None, relu=False, padding=(1, 1), stride=(1, 1), dilation=(1, 1), groups=1):
    lists = (list(v) for v in (stride, padding, dilation))
    return torch.ops.fastres.conv_kernel_native(kernel, x, w, bias, residual, relu, *lists, groups)


def reference(x, w, bias, residual, relu, padding):
    y = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), padding=padding)
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


def problem(kernel, images, size, c, k, padding, seed):
    g = torch.Generator().manual_seed(seed)
    dtype = KERNELS[kernel]
    outputs = [n + 2 * p - 2 for n, p in zip(size, padding, strict=True)]
    x = torch.randn(images, c, *size, generator=g).to(dtype, memory_format=torch.channels_last)
    w = (torch.randn(k, c, 3, 3, generator=g) / math.sqrt(9 * c)).to(dtype)
    bias = torch.randn(k, generator=g).to(dtype)
    residual = torch.randn(images, k, *outputs, generator=g).to(dtype, memory_format=torch.channels_last)
    return x, w, bias, residual


def error(y, expected):
    return float((y.double() - expected).abs().max() / expected.pow(2).mean().sqrt().clamp_min(0.3))


@kernels
@pytest.mark.parametrize(("c", "k"), CHANNELS)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_matches_float64(kernel, size, c, k):
    seed = SIZES.index(size) * len(CHANNELS) + CHANNELS.index((c, k))
    images = (1, 2, 5)[seed % 3] if size[0] * size[1] < 400 else 1
    paddings = [p for p in ((1, 1), (0, 0), (0, 1)) if all(n + 2 * q >= 3 for n, q in zip(size, p, strict=True))]
    # bias, residual, ReLU
    options = ((True, False, True), (False, True, False), (True, True, True))
    for padding, (with_bias, with_residual, relu) in zip(itertools.cycle(paddings), options, strict=False):
        x, w, bias, residual = problem(kernel, images, size, c, k, padding, seed)
        bias, residual = bias if with_bias else None, residual if with_residual else None
        y = run(kernel, x, w, bias, residual, relu, padding)
        assert error(y, reference(x, w, bias, residual, relu, padding)) < TOLERANCE[kernel]


@pytest.mark.parametrize(("size", "channels"), RESNET)
def test_error_of_a_resnet_layer(size, channels):
    x, w, bias, residual = problem("winograd4", 1, (size, size), channels, channels, (1, 1), 0)
    x = x.relu()
    expected = reference(x, w, bias, residual, False, 1)
    error = (run("winograd4", x, w, bias, residual).double() - expected).abs().max() / expected.pow(2).mean().sqrt()
    assert error <= 1e-5


@kernels
def test_threads_give_the_same_bits(kernel):
    x, w, bias, residual = problem(kernel, 2, (28, 30), 48, 100, (1, 1), 3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(kernel, x, w, bias, residual, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


@kernels
def test_nan_stays_within_the_tile(kernel):
    """A value that is not finite reaches every output that reads it, and none outside the tiles that do."""
    x, w, _, _ = problem(kernel, 1, (24, 24), 16, 32, (1, 1), 1)
    x[0, 3, 9, 14] = float("nan")
    y = run(kernel, x, w, relu=True)
    assert y[:, :, 8:11, 13:16].isnan().all()
    outside = torch.ones(24, 24, dtype=torch.bool)
    outside[4:16, 8:20] = False  # tiles of four that read row 9, column 14, and their neighbours
    assert not y[:, :, outside].isnan().any()


@kernels
def test_refuses_in_words(kernel):
    dtype = KERNELS[kernel]
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32

    def refuses(text, channels=4, weight=(4, 4, 3, 3), dtype=dtype, **options):
        x = torch.randn(1, channels, 9, 9).to(dtype)
        with pytest.raises(RuntimeError, match=text):
            run(kernel, x, torch.randn(weight).to(dtype), **options)

    refuses("bfloat16" if other == torch.bfloat16 else "float32", dtype=other)
    refuses("3x3", weight=(4, 4, 5, 5))
    refuses("strided", stride=(2, 2))
    refuses("dilated", dilation=(2, 2))
    refuses("grouped", weight=(4, 2, 3, 3), groups=2)
    refuses("padding", padding=(2, 2))


@pytest.mark.parametrize("isa", [i for i in fastres.build_info()["isa_supported"] if i != fastres.build_info()["isa"]])
def test_other_instruction_sets(isa):
    """The tests above, with a lower instruction set forced."""
    rerun_with_isa(isa, __file__, "not instruction_sets")
