"""Compare a fused network with its plain PyTorch reference on random images, in one process and in turns. Parity is
checked first: where it fails there is no figure. With --peers: inference against other runtimes instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from fastres.cli import peers
from fastres.cli.options import add_machine, console
from fastres.errors import UserError

PARITY_BATCH = 2  # float64 is slow


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("model", type=str, nargs="?", default=None, help="a name that fastres models lists")
    parser.add_argument("--batch-size", type=PositiveInt, default=16)
    parser.add_argument("--image-size", type=PositiveInt, default=None, help="side of the images (the network's own)")
    parser.add_argument("--mode", choices=["forward", "step", "both"], default="both", help="forward: inference")
    parser.add_argument("--rounds", type=PositiveInt, default=11)
    parser.add_argument("--memory", choices=["default", "recompute"], default="default")
    parser.add_argument("--seed", type=NonNegativeInt, default=0)
    add_machine(parser)
    parser.add_argument("--json", type=str, default=None, metavar="FILE", help="write figures and machine there")
    peers.add_arguments(parser)


def run(options: Namespace) -> int:
    """Check, time and print; returns 1 if parity failed."""
    if options.peers:
        return peers.run(options)
    if options.model is None:
        raise UserError("bench needs a MODEL, or --peers for other runtimes; fastres models lists the networks")
    import torch
    from rich.table import Table

    from fastres.evaluate.machine import machine
    from fastres.evaluate.parity import network_parity
    from fastres.evaluate.timing import Spread, interleaved
    from fastres.train.run import DTYPES, pick_device

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device, dtype = pick_device(options.device), DTYPES[options.dtype]
    fused, plain, images, labels = make_pair(options, device)
    about = machine()
    size = "x".join(map(str, images.shape[1:]))
    table = Table(
        title=f"{options.model}, batch {options.batch_size}, {size}, {options.dtype}, {device}",
        caption=f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}; medians (quartiles)",
    )
    for name in ("mode", "reference ms", "fused ms", "fused images/s", "speed-up", "parity error (allowed)"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    results = []
    failed = False
    for mode in ("forward", "step") if options.mode == "both" else (options.mode,):
        small = slice(0, max(PARITY_BATCH, 1))
        parity = network_parity(fused, plain, images[small], labels[small], dtype, mode == "step")
        checked = f"{parity.error:.1e} ({parity.allowed:.1e})"
        entry: dict[str, Any] = {"mode": mode, "parity_error": parity.error, "parity_allowed": parity.allowed}
        if parity.failed:
            failed = True
            table.add_row(mode, "-", "-", "-", "-", f"[red]FAILED[/red] {checked}")
        else:
            make = step_of if mode == "step" else forward_of
            calls = [make(model, images, labels, dtype) for model in (plain, fused)]
            slow, fast = interleaved(calls[0], calls[1], options.rounds, device)
            ratio = Spread.of([a / b for a, b in zip(slow, fast, strict=True)])
            reference_s, fused_s = Spread.of(slow), Spread.of(fast)
            table.add_row(
                mode, _ms(reference_s), _ms(fused_s), f"{options.batch_size / fused_s.median:,.1f}",
                f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})", checked,
            )  # fmt: skip
            spreads = {"reference_s": reference_s, "fused_s": fused_s, "speed_up": ratio}
            entry |= {"rounds": options.rounds, **{name: vars(spread) for name, spread in spreads.items()}}
        results.append(entry)
    console().print(table)
    if options.json:
        names = ("model", "batch_size", "dtype", "memory", "seed")
        content = {**{n: options[n] for n in names}, "shape": list(images.shape), "device": str(device)}
        Path(options.json).write_text(json.dumps({**content, "results": results, "machine": about}, indent=1) + "\n")
    return 1 if failed else 0


def _ms(spread: Any) -> str:
    return f"{1e3 * spread.median:.2f} ({1e3 * spread.low:.2f}-{1e3 * spread.high:.2f})"


def make_pair(options: Namespace, device: Any) -> tuple[Any, Any, Any, Any]:
    """The fused and the plain network with the same random weights and statistics, images [B, C, H, W], labels [B]."""
    import torch

    import fastres

    torch.manual_seed(options.seed)
    info = fastres.model_info(options.model)
    channels, height, width = info.input_size
    height, width = (options.image_size or height), (options.image_size or width)
    plain = fastres.create_model(options.model, fused=False)
    for name, buffer in plain.named_buffers():
        # Fresh statistics (mean 0, variance 1) would hide a BatchNorm that is left out.
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.8, 1.25)
    fused = fastres.create_model(options.model, fused=True, memory=options.memory)
    fused.load_state_dict(plain.state_dict())
    images = torch.randn(options.batch_size, height, width, channels).permute(0, 3, 1, 2).to(device)
    labels = torch.randint(info.num_classes, (options.batch_size,)).to(device)
    both = [model.to(device).to(memory_format=torch.channels_last) for model in (fused, plain)]
    return both[0], both[1], images, labels


def forward_of(model: Any, images: Any, labels: Any, dtype: Any) -> Callable[[], object]:
    """Inference on the images."""
    import torch

    model.eval()

    def call() -> object:
        with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return model(images)

    return call


def step_of(model: Any, images: Any, labels: Any, dtype: Any) -> Callable[[], object]:
    """A training step: forward, backward, SGD."""
    import torch

    from fastres.train.optim import make_optimizer

    model.train()
    # A rate this small costs as much as any other, and keeps random labels from driving the weights away.
    optimizer = make_optimizer(model, lr=1e-6)

    def call() -> object:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return call
