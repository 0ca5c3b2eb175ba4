"""Write a network as a file for other programs. The file is compared with the network before it appears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from fastres.cli.options import add_fused, console
from fastres.export import FORMATS


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", type=str, default=None, help="a network's name; a checkpoint has it too"
    )
    formats = "; ".join(f"{each.name}: {each.summary}" for each in FORMATS.values())
    parser.add_argument("--format", type=str, default=None, help=f"{formats}. The suffix of --out may tell it")
    parser.add_argument(
        "--out", metavar="PATH", type=str, default=None, help="the file (MODEL with the format's suffix)"
    )
    parser.add_argument("--checkpoint", metavar="FILE", type=str, default=None, help="of fastres train")
    parser.add_argument("--weights", type=str, default=None, help="a file of weights, or a name of torchvision's")
    parser.add_argument(
        "--num-classes", type=PositiveInt, default=None, help="outputs (the network's, or the checkpoint's)"
    )
    parser.add_argument("--image-size", type=PositiveInt, default=None, help="side of the images (the network's own)")
    parser.add_argument("--batch-size", type=PositiveInt, default=None, help="the only batch size that it takes (any)")
    parser.add_argument("--opset", type=PositiveInt, default=None, help="of ONNX (torch's choice)")
    parser.add_argument(
        "--ema", action=ActionYesNo(no_prefix="no-"), default=True,
        help="of a checkpoint that has one, the average of weights, which is what training evaluates",
    )  # fmt: skip
    add_fused(parser)


def run(options: Namespace) -> int:
    """Export, and print what was written and how it compares."""
    from fastres import export
    from fastres.cli.train import plain
    from fastres.errors import UserError
    from fastres.export.formats import find_format, need_packages

    if options.format is None and options.out is None:
        raise UserError(f"--format or --out is missing; formats are {', '.join(FORMATS)}")
    suffix = FORMATS[options.format].suffix if options.format in FORMATS else ""
    # What can be refused at once is, before a network is built.
    name = options.model or (Path(options.checkpoint).stem if options.checkpoint else "model")
    path = Path(options.out or f"{name}{suffix}")
    kind = find_format(options.format, path)
    need_packages(kind.packages, f"writing {kind.name}")
    model, found = open_network(options)
    screen = console()
    if found.pop("untrained", False):
        screen.print(
            f"{options.model} has random weights: good for timing only; --checkpoint or --weights give it others",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    image_size = plain(options.image_size) or found.pop("image_size", None)
    with screen.status("") as status:

        def report(what: str) -> None:
            status.update(what)
            if not screen.is_terminal:
                screen.print(what, highlight=False)

        done = export.save(
            model, path, kind.name, image_size=image_size, batch_size=plain(options.batch_size),
            classes=found.get("classes"), notes=found.get("notes"), opset=plain(options.opset), report=report,
        )  # fmt: skip
    screen.print(f"wrote {done}; {done.seconds:.0f} s", soft_wrap=True, highlight=False, markup=False)
    return 0


def open_network(options: Namespace) -> tuple[Any, dict[str, Any]]:
    """The network, and what is known of its classes and images.

    Raises:
        CheckpointError, ModelError: the checkpoint is damaged or of another network; unknown names; wrong weights.
    """
    import fastres
    from fastres.cli.train import plain
    from fastres.errors import CheckpointError, UserError
    from fastres.models.weights import load_state
    from fastres.train.checkpoint import load_checkpoint

    if options.checkpoint is None:
        if options.model is None:
            raise UserError("MODEL is missing: a network's name, or --checkpoint FILE")
        choice = {} if options.num_classes is None else {"num_classes": plain(options.num_classes)}
        if options.weights is not None:
            return fastres.create_model(options.model, options.fused, options.weights, **choice), {}
        return fastres.export.untrained(options.model, options.fused, **choice), {"untrained": True}
    if options.weights is not None:
        raise UserError("--weights is for a network's name; a checkpoint has its own weights")
    if options.model is not None:
        fastres.model_info(options.model)
    saved = load_checkpoint(options.checkpoint)
    config, settings = saved["config"], saved.get("settings", {})
    if options.model not in (None, config.get("name")):
        raise CheckpointError(f"checkpoint {options.checkpoint} is of {config.get('name')}, not of {options.model}")
    if options.num_classes not in (None, config.get("num_classes")):
        raise CheckpointError(
            f"checkpoint {options.checkpoint} has {config.get('num_classes')} classes, not {options.num_classes}"
        )
    model = fastres.create_model(**{**config, "fused": options.fused})
    average = _average(saved) if options.ema else None
    load_state(model, saved["model"] if average is None else average, f"checkpoint {options.checkpoint}")
    notes = {"trained_on": settings.get("data"), "normalize": settings.get("normalize"), "epoch": saved.get("epoch")}
    found: dict[str, Any] = {"notes": {**notes, "ema": average is not None}}
    classes = saved.get("classes")
    # A network may have more outputs than its data have classes.
    if classes is not None and len(classes) == config.get("num_classes"):
        found["classes"] = classes
    if "input_shape" in saved:
        channels, height, width = saved["input_shape"]
        side = settings.get("test_image_size")  # training may end on smaller images than it evaluates on
        found["image_size"] = (channels, side or height, side or width)
    return model, found


def _average(saved: dict[str, Any]) -> dict[str, Any] | None:
    """The average of weights as a state dict; None where the checkpoint has none, or nothing was averaged yet."""
    state = saved.get("ema") or {}
    if not int(state.get("n_averaged", 0)):
        return None
    return {key.removeprefix("module."): value for key, value in state.items() if key.startswith("module.")}
