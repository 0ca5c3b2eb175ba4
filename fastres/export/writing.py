"""One function a format that writes a file; nothing here checks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres.errors import ExportError

from .about import METADATA, to_text
from .portable import INPUT, OUTPUT, quiet

ENTRY = f"{METADATA}.json"  # of a torch.export archive


def write_onnx(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any], opset: int | None) -> None:
    """A graph of standard operators, weights inside, metadata in ``metadata_props``.

    Raises:
        ExportError: an operator can't be expressed, or an opset that the exporter or the checker does not know.
    """
    import onnx

    try:
        with quiet():
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT],
                opset_version=opset,
            )  # fmt: skip
        assert made is not None
        proto = made.model_proto
        rename_batch(proto.graph)
        proto.producer_name, proto.producer_version = "fastres", about["fastres"]
        onnx.helper.set_model_props(proto, {METADATA: to_text(about)})
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the exporter and the checker raise many types
        raise ExportError(f"this network can't be written as ONNX: {error}") from error
    foreign = sorted({f"{n.domain}.{n.op_type}" for n in proto.graph.node if n.domain not in ("", "ai.onnx")})
    if foreign:
        raise ExportError(f"this network needs operators that standard ONNX does not have: {', '.join(foreign)}")
    path.write_bytes(proto.SerializeToString())


def rename_batch(graph: Any) -> None:
    """The tracer's symbol of the batch dimension ("s77") becomes "batch" everywhere."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    if not symbol:
        return
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = "batch"


def write_torch_export(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    """A .pt2 archive for ``torch.export.load``; metadata as an extra file."""
    with quiet():
        torch.export.save(program, path, extra_files={ENTRY: to_text(about)})


def write_aoti(program: torch.export.ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    """A .pt2 package of compiled code for ``torch._inductor.aoti_load_package``; metadata as the package's own.

    Raises:
        ExportError: there is no C++ compiler, or it fails.
    """
    from torch._inductor import aoti_compile_and_package

    settings = {"aot_inductor.metadata": {METADATA: to_text(about)}}
    try:
        with quiet():
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except OSError:
        raise
    except Exception as error:  # a missing compiler, for one, comes as one of several types
        reason = " ".join(str(error).split())
        raise ExportError(
            f"AOTInductor can't compile this network (it needs a C++ compiler): {reason[:500]}"
        ) from error


def write_safetensors(model: nn.Module, path: Path, about: dict[str, Any]) -> None:
    """The state dict as it is, keys and dtypes; metadata in the header."""
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    try:
        save_file(state, path, metadata={"format": "pt", METADATA: to_text(about)})
    except RuntimeError as error:  # tensors that share memory
        raise ExportError(f"these weights can't be written as safetensors: {error}") from error
