"""batch_norm_act on a device: all shapes against float64, the largest maps that fit, replays of a CUDA graph side by side."""

import pytest
import torch
from cases import LAYOUTS, random_map, random_vectors
from on_device import DEVICE, moved, on_backends, poisoned, require_backend, synchronize  # noqa: F401
from parity import assert_parity
from triton_cases import POINTS

from fastres import backends
from fastres.kernels.batch_norm_act import capacity, reference
from fastres.ops.schemas import overload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def step(backend, y, weight, bias, residual, grad):
    """Results and gradients, the statistics of the first pass in the second."""
    ahead = overload("batch_norm_act", backend)(y, weight, bias, residual, 1e-5, True)
    arguments = (grad, y, weight, bias, residual, *ahead[1:], 1e-5, True, residual is not None)
    return [*ahead, *overload("batch_norm_act", backend, "backward")(*arguments)]


def inputs(shape, dtype, layout="channels_last"):
    y, residual, grad = (random_map(shape, dtype, layout, seed=s) for s in range(3))
    weight, bias = random_vectors(shape[1], 2)
    bias = 8 * (2 * (torch.arange(shape[1]) % 2) - 1.0) + bias.clamp(-1, 1)  # nothing near the ReLU's edge
    return y, weight.clamp(-1, 1), bias, residual.clamp(-1, 1), grad


def compare(shape, dtype, layout, backend):
    given = inputs(shape, dtype, layout)
    ours = [t.cpu() for t in step(backend, *(moved(t) for t in given))]
    wide = [t.double() for t in given]
    ahead = reference.forward(*wide[:4], 1e-5, True)
    truths = [*ahead, *reference.backward(wide[4], *wide[:4], *ahead[1:], 1e-5, True, True)]
    names, peers = ("out", "mean", "var", "y", "weight", "bias", "residual"), step("reference", *given)
    for name, a, b, c in zip(names, ours, peers, truths, strict=True):
        assert_parity(a, b, c, name)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_points(dtype, backend):
    require_backend("batch_norm_act", backend, dtype)
    for number, shape in enumerate(POINTS):
        compare(shape, dtype, LAYOUTS[number % len(LAYOUTS)], backend)


@on_backends
def test_the_largest_map_that_fits_and_the_next(backend):
    require_backend("batch_norm_act", backend, torch.float16)
    chip = backends._chip()
    largest = 64
    while chip is not None and capacity.refusal(chip, (largest + 1) * 49, 512, 2) is None:
        largest += 1
    compare((largest, 512, 7, 7), torch.float16, "channels_last", backend)
    if backend == "cuda":
        given = [moved(t) for t in inputs((largest + 64, 512, 7, 7), torch.float16)]
        with pytest.raises(RuntimeError, match="doesn't fit"):
            step(backend, *given)


@on_backends
def test_graphs_side_by_side_give_the_same_bits(backend):
    """Two replays at a time on two streams: their barriers are apart."""
    require_backend("batch_norm_act", backend, torch.bfloat16)
    given = [moved(t) for t in inputs((4, 256, 14, 14), torch.bfloat16)]
    expected = [t.clone() for t in step(backend, *given)]
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(expected, step(backend, *given), strict=True))
    if DEVICE != "cuda":
        return
    graphs, results, streams = [], [], [torch.cuda.Stream() for _ in range(2)]
    synchronize()
    for _ in streams:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(step(backend, *given))
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    synchronize()
    for found in results:
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
