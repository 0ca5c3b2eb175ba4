"""The tensor side of the CUDA convolutions: checks, layouts, allocation, what goes to the library. Compiled for CPU tensors
over plain loops in the kernels' place (tests/emulation/conv_tensors.cpp), so that whole numbers must come out exactly."""

import ctypes
import subprocess
from pathlib import Path

import gradient_cases
import pytest
import torch
import triton_conv_cases as forward_cases
from cases import lay_out
from triton_cases import whole_numbers, whole_vectors

from fastres.kernels.common.layout import memory_format_of
from fastres.kernels.conv_act import cuda_backend as conv_act
from fastres.kernels.conv_act import reference as conv_act_reference
from fastres.kernels.conv_stats import cuda_backend as conv_stats
from fastres.kernels.conv_stats import library as conv_stats_library
from fastres.kernels.conv_stats import reference

HERE = Path(__file__).parent
LAYOUTS = ("channels_last", "contiguous", "offset", "channel_slice")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The operators on CPU tensors; no compiler is a failure."""
    out, torch_folder = tmp_path_factory.mktemp("conv_tensors") / "conv_tensors.so", Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    command += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020d000000000000", f"-isystem{torch_folder}/include"]
    command += [
        str(HERE / "emulation" / "conv_tensors.cpp"),
        "-o",
        str(out),
        f"-L{torch_folder}/lib",
        "-ltorch_cpu",
        "-lc10",
    ]
    subprocess.run(command, check=True)
    torch.ops.load_library(out)
    return ctypes.CDLL(str(out))


def same(ours, truth, like, what):
    """Equal values, the dtype and, for maps, the memory format that every backend promises."""
    assert torch.equal(ours, truth.to(ours.dtype)), what
    if ours.dim() == 4:
        assert ours.is_contiguous(memory_format=memory_format_of(like)), what


@pytest.mark.parametrize("index", range(0, len(forward_cases.SHAPES), 3))
def test_forward(index):
    case, kind = forward_cases.SHAPES[index], forward_cases.KINDS[index % 3]
    inputs = forward_cases.integers(case, kind)
    for layout in LAYOUTS:
        x = lay_out(inputs.x, layout)
        weight = lay_out(inputs.weight, "contiguous" if layout == "contiguous" else "channels_last")
        got = conv_stats.forward(x, weight, *inputs.vectors, inputs.relu, *case.geometry, True)
        truth = forward_cases.truth_of(case, inputs)
        same(got[0], truth[0], x, layout)
        assert got[0].dtype == x.dtype and all(v.dtype == torch.float32 for v in got[1:])
        assert torch.allclose(got[1].double(), truth[1]) and torch.allclose(got[2].double(), truth[2])
        y, *absent = conv_stats.forward(x, weight, *inputs.vectors, inputs.relu, *case.geometry, False)
        assert torch.equal(y, got[0]) and all(v.numel() == 0 for v in absent)


@pytest.mark.parametrize("index", range(1, len(forward_cases.SHAPES), 4))
def test_conv_act(index):
    case, kind = forward_cases.SHAPES[index], forward_cases.KINDS[index % 3]
    inputs = forward_cases.integers(case, kind)
    for layout in LAYOUTS:
        x, residual = lay_out(inputs.x, layout), lay_out(inputs.residual, layout)
        for bias in (inputs.bias, inputs.bias.to(torch.bfloat16), inputs.bias[:1].expand(case.k), None):
            arguments = (
                x,
                inputs.weight,
                bias,
                residual if bias is not None else None,
                bias is not None,
                *case.geometry,
            )
            got = conv_act.forward(*arguments)
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
            same(got, conv_act_reference.forward(*wide), x, (layout, bias))


@pytest.mark.parametrize("index", range(0, len(gradient_cases.SHAPES), 3))
def test_backward(index):
    shape, kind = gradient_cases.SHAPES[index], ("fp16", "bf16", "fp32")[index % 3]
    arriving = gradient_cases.ARRIVING[index % len(gradient_cases.ARRIVING)]
    for layout, prologue in zip(LAYOUTS, ("relu", "none", "affine", "relu"), strict=True):
        a = gradient_cases.arguments(shape, gradient_cases.DTYPES[kind], arriving, prologue, layout)
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in a]
        truth, got = reference.backward(*wide), conv_stats.backward(*a)
        for mine, exact, like in zip(got, truth, (a.x, a.weight, None, None), strict=True):
            same(mine, exact, like, (str(shape), layout, prologue))
        (x, *_), (_, weight, *_) = (
            conv_stats.backward(*a._replace(need_weight=False)),
            conv_stats.backward(*a._replace(need_input=False)),
        )
        assert torch.equal(x, got[0]) and torch.equal(weight, got[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_addend_a_factor_and_expanded_gradients(layout):
    a = gradient_cases.arguments(gradient_cases.SHAPES[13], torch.float32, layout=layout)
    addend, factor = whole_numbers(tuple(a.x.shape), torch.float32, layout, 1), whole_vectors(a.weight.shape[0], 2)[0]
    a = a._replace(addend=addend, factor=factor, grad_mean=a.grad_mean[:1].expand(a.grad_mean.shape[0]))
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in a]
    for mine, exact in zip(conv_stats.backward(*a), reference.backward(*wide), strict=True):
        assert torch.equal(mine.double(), exact)


def test_conv_act_backward():
    x, weight = (
        whole_numbers((2, 8, 5, 6), torch.float32, "contiguous", 1),
        whole_numbers((4, 8, 3, 3), torch.float32, "contiguous", 2),
    )
    conv = ([1, 1], [1, 1], [1, 1], 1)
    out = conv_act.forward(x, weight, None, None, True, *conv)
    arguments = (
        whole_numbers(tuple(out.shape), torch.float32, "contiguous", 3),
        x,
        weight,
        out,
        True,
        *conv,
        True,
        True,
        True,
        True,
    )
    for mine, exact in zip(conv_act.backward(*arguments), conv_act_reference.backward(*arguments), strict=True):
        assert torch.equal(mine, exact)


def test_what_goes_to_the_library(compiled):
    v = [torch.ones(8)] * 3
    conv = ((1, 1), (1, 1), (1, 1))
    big = torch.randn(4, 8, 33, 1)
    for x, weight, groups in (
        (torch.randn(2, 8, 6, 6), torch.randn(4, 4, 3, 3), 2), (torch.randn(0, 8, 6, 6), torch.randn(4, 8, 3, 3), 1),
        (torch.randn(1, 8, 40, 3), big, 1),
    ):  # fmt: skip
        before = compiled.launches()
        y, mean, var = conv_stats.forward(x, weight, *v, True, *conv, groups, True)
        arguments = (y, mean, var, x, weight, y, mean, *v, True, *conv, groups, True, True)
        grads = conv_stats.backward(*arguments)
        assert compiled.launches() == before
        for mine, theirs in zip(grads, conv_stats_library.backward(*arguments), strict=True):
            assert torch.equal(mine, theirs)
        assert conv_act.forward(x, weight, None, None, True, *conv, groups).shape == y.shape
    assert torch.ops.fastres.conv_refusal_cuda(torch.randn(1, 8, 40, 3), big, *conv) == "filters larger than 32 x 32"
    with pytest.raises(RuntimeError, match="conv_forward_cuda: not served: filters larger than 32 x 32"):
        torch.ops.fastres.conv_forward_cuda(
            torch.randn(1, 8, 40, 3), big, *[None] * 3, False, None, None, False, *conv, True, False
        )


def test_the_precision_that_torch_allows(monkeypatch):
    seen = []
    monkeypatch.setattr(conv_stats, "_ops", type("Ops", (), {
        "conv_refusal_cuda": staticmethod(lambda *a: ""), "conv_forward_cuda": staticmethod(lambda *a: seen.append(a[-1])),
    }))  # fmt: skip
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for dtype in (torch.float32, torch.float16):
        conv_stats.forward(
            torch.ones(1, 1, 1, 1, dtype=dtype),
            torch.ones(1, 1, 1, 1, dtype=dtype),
            *[None] * 3,
            False,
            1,
            0,
            1,
            1,
            True,
        )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for dtype in (torch.float32, torch.bfloat16):
        conv_stats.forward(
            torch.ones(1, 1, 1, 1, dtype=dtype),
            torch.ones(1, 1, 1, 1, dtype=dtype),
            *[None] * 3,
            False,
            1,
            0,
            1,
            1,
            True,
        )
    assert seen == [False, False, True, False]


def test_a_failed_launch_names_the_op_and_the_shapes(compiled):
    x, weight, words = torch.randn(2, 8, 6, 5), torch.randn(4, 8, 3, 3), ctypes.c_char_p(b"invalid device function")
    compiled.fail_with(words)
    try:
        where = r"launch failed for x \[2, 8, 6, 5\], weight \[4, 8, 3, 3\], float32 on cuda:0: invalid device function"
        with pytest.raises(RuntimeError, match=f"fastres::conv_forward_cuda: {where}"):
            conv_stats.forward(x, weight, None, None, None, False, (1, 1), (1, 1), (1, 1), 1, True)
        for needs in ((True, False), (False, True)):
            with pytest.raises(RuntimeError, match=f"fastres::conv_backward_cuda: {where}"):
                grad = torch.randn(2, 4, 6, 5)
                conv_stats.backward(
                    grad, None, None, x, weight, grad, None, *[None] * 3, False, (1, 1), (1, 1), (1, 1), 1, *needs
                )
    finally:
        compiled.fail_with(None)


X, W, V, GRAD = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3), torch.ones(8), torch.randn(2, 4, 6, 6)


def refused(message, function, **changed):
    arguments = {
        "conv_forward_cuda": {
            "x": X, "weight": W, "scale": V, "center": V, "shift": V, "prologue_relu": True, "bias": None, "residual": None,
            "relu": False, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "stats": True, "tf32": False,
        },
        "conv_backward_cuda": {
            "grad_y": GRAD, "grad_mean": None, "grad_var": None, "x": X, "weight": W, "y": None, "mean": None, "scale": V,
            "center": V, "shift": V, "relu": True, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "need_input": True,
            "need_weight": True, "addend": None, "factor": None, "tf32": False,
        },
    }[function] | changed  # fmt: skip
    with pytest.raises(RuntimeError, match=f"fastres::{function}: {message}"):
        getattr(torch.ops.fastres, function)(*arguments.values())


@pytest.mark.parametrize("function", ["conv_forward_cuda", "conv_backward_cuda"])
def test_wrong_tensors_are_named(function):
    for message, changed in {
        r"x must be \[N, C, H, W\], got 3 dimensions": {"x": X[0]},
        "x must be float32, float16 or bfloat16, got float64": {"x": X.double()},
        "weight must have x's dtype float32, got bfloat16": {"weight": W.bfloat16()},
        r"weight must be \[K, 8, R, S\]": {"weight": torch.randn(4, 4, 3, 3)},
        r"x \[2, 8, 6, 6\] is too small for the kernel": {"padding": [0, 0], "dilation": [3, 3]},
        "stride must be at least 1, got 0": {"stride": [0, 1]},
        "scale, center and shift must be given together, got 2 of 3": {"shift": None},
        r"shift must be \[C\] = \[8\] \(x has 8 channels\), got \[7\]": {"shift": torch.ones(7)},
        "center must be float32, got float64": {"center": V.double()},
        "scale must be contiguous, got stride 2": {"scale": torch.ones(16)[::2]},
        "stride = 2147483648 is too large": {"padding": [2**31, 2**31], "stride": [2**31, 2**31]},
    }.items():
        refused(message, function, **changed)


def test_wrong_epilogues_and_gradients_are_named():
    forward, backward = "conv_forward_cuda", "conv_backward_cuda"
    refused(r"bias must be \[4\], got \[8\]", forward, bias=V)
    refused("bias must be float32, float16 or bfloat16, got int64", forward, bias=torch.ones(4, dtype=torch.int64))
    refused(r"residual must have the shape \[2, 4, 6, 6\], got \[2, 8, 6, 6\]", forward, residual=X)
    refused("residual must have x's dtype float32, got float16", forward, residual=GRAD.half())
    refused(r"grad_y must have the shape \[2, 4, 6, 6\]", backward, grad_y=X)
    refused(r"grad_mean must be \[4\], got \[8\]", backward, grad_mean=V)
    refused("grad_var needs y and its mean, got neither", backward, grad_var=torch.ones(4))
    refused("grad_var needs y and its mean, got y", backward, grad_var=torch.ones(4), y=GRAD)
    refused("factor must be float32, got float64", backward, factor=torch.ones(4).double())
    refused(r"addend must have the shape \[2, 8, 6, 6\]", backward, addend=GRAD)
    refused(r"not served: x \[0, 8, 6, 6\]", backward, x=X[:0], grad_y=GRAD[:0])


def test_tensors_of_another_device_are_named():
    with pytest.raises(RuntimeError, match="bias is on another device, but x is on cpu"):
        torch.ops.fastres.conv_forward_cuda.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), X, W, None, None, None, False, torch.ones(4, device="meta"),
            None, False, [1, 1], [1, 1], [1, 1], True, False,
        )  # fmt: skip


def test_opcheck():
    utils, conv = ("test_schema", "test_faketensor"), ([1, 1], [1, 1], [1, 1])
    for x in (X, X.contiguous(memory_format=torch.channels_last).bfloat16()):
        w = W.to(x.dtype)
        forward = (x, w, V, V, V, True, torch.ones(4), GRAD.to(x.dtype), True, *conv, True, False)
        torch.library.opcheck(torch.ops.fastres.conv_forward_cuda.default, forward, test_utils=utils)
        g, k = GRAD.to(x.dtype), torch.ones(4)
        for needs in ((True, True), (False, True), (True, False)):
            backward = (g, k, k, x, w, g, k, V, V, V, True, *conv, *needs, x, k, False)
            torch.library.opcheck(torch.ops.fastres.conv_backward_cuda.default, backward, test_utils=utils)
