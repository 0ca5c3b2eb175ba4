"""Draws docs/images/passes.svg: every kernel of one bottleneck's training step and the maps it reads and writes, in eager
PyTorch and by this package's kernels. The figures are the byte ledger's: ``python tools/draw_passes.py``."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres.evaluate.bytes.recording import Event, step_of
from fastres.kernels.common.traffic import Pass
from fastres.nn.blocks import Bottleneck

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "fastres", "font.size": 8, "svg.fonttype": "none"})
from matplotlib import pyplot  # noqa: E402

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "passes.svg"
CHANNELS, WIDTH, SIDE = 256, 64, 56
READ, WRITTEN = "#8fb8d8", "#c2571a"
NAMES = {
    "conv_stats": "convolution with prologue and statistics",
    "conv_stats_input_gradient": "input gradient with BatchNorm backward and sums",
    "conv_stats_weight_gradient": "weight gradient with both prologues",
    "scale_shift_act": "normalise + add + ReLU",
    "scale_shift_act_backward": "ReLU backward + sums",
    "threshold_backward": "ReLU backward",
    "relu_": "ReLU",
    "add_": "add",
    "add": "sum of two gradients",
}


def step(fused: bool) -> list[tuple[Event, Pass]]:
    """The kernels of an identity block's step on one image, forward and backward."""
    with FakeTensorMode():
        images = torch.empty(1, CHANNELS, SIDE, SIDE, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        block = torch.nn.Sequential(Bottleneck(CHANNELS, WIDTH, fused=fused)).train()
        events = step_of(block, images.requires_grad_(), torch.bfloat16, fused)
    level = "fastres" if fused else "L0"
    return [(e, p) for e in events if e.op != "sum" for p in e.passes[level] if p.maps]


def draw_step(axis: pyplot.Axes, kernels: Sequence[tuple[Event, Pass]], title: str) -> None:
    for row, (event, kernel) in enumerate(kernels):
        left = 0.0
        for moved, colour in ((kernel.reads, READ), (kernel.writes, WRITTEN)):
            for name, size in moved.items():
                if "weight" not in name:
                    axis.barh(-row, size / 1e6, left=left, color=colour, edgecolor="white", lw=0.8)
                    left += size / 1e6
        layer = event.layer.removeprefix("0.")
        axis.text(left + 0.05, -row, f"{layer} {NAMES.get(kernel.kernel, kernel.kernel)}", va="center", fontsize=7)
    forward = sum(not event.backward for event, _ in kernels)
    axis.axhline(-forward + 0.5, color="#666666", lw=0.8, ls="--")
    axis.text(11.4, -forward + 0.62, "forward", ha="right", va="bottom", color="#666666")
    axis.text(11.4, -forward + 0.38, "backward", ha="right", va="top", color="#666666")
    total = sum(kernel.maps for _, kernel in kernels) / 1e6
    axis.set_title(f"{title}: {len(kernels)} kernels, {total:.1f} MB", loc="left", fontsize=9)
    axis.set_yticks([])
    axis.set_xlim(0, 11.5)
    axis.set_xlabel("MB of one image")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def main() -> None:
    before, after = step(False), step(True)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 6.6), layout="constrained")
    draw_step(axes[0], before, "eager PyTorch, channels_last")
    draw_step(axes[1], after, "fastres")
    lowest = -max(len(before), len(after))
    for axis in axes:
        axis.set_ylim(lowest + 0.3, 0.7)
    marks = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in (READ, WRITTEN)]
    axes[1].legend(marks, ["one tensor read", "one tensor written"], loc="lower right", frameon=False)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
