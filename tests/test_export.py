"""Exports: what each format holds and computes, what is refused, and that nothing wrong or half is left behind."""

import errno
import importlib.util
import json
import re
import zipfile

import pytest
import torch
from conftest import require, run_python
from torch import nn

import fastres
from fastres import export
from fastres.errors import CheckpointError, ExportError, InputError, ModelError
from fastres.export import writing
from fastres.export.checking import Check
from fastres.export.portable import fold_batch_norms, own_form, plain
from fastres.models import CifarResNet, ResNet
from fastres.nn import BasicBlock, Bottleneck
from fastres.nn.statistics import BatchNorm

SIDE = 8
PROGRAMS = ["onnx", "torch-export", "aoti"]


def seasoned(model, fused=True):
    """BatchNorm statistics and parameters that show when one is left out."""
    torch.manual_seed(1)
    for bn in model.modules():
        if isinstance(bn, BatchNorm):
            bn.running_mean.normal_(0, 0.1)
            bn.running_var.uniform_(0.8, 1.25)
            nn.init.uniform_(bn.weight, 0.8, 1.2)
            nn.init.normal_(bn.bias, 0, 0.1)
    return model.eval()


def small(fused=True, **options):
    return seasoned(CifarResNet(1, fused=fused, **options))


def exact(model, x):
    with torch.no_grad():
        return plain(model).double()(x.double())


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A fused network, and its file in each format. AOTInductor's C++ compiler takes most of the time of this module."""
    folder, model = tmp_path_factory.mktemp("export"), small()
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name)
    classes = [f'the {i}\'th "class" é' for i in range(10)]
    made = {
        name: export.save(
            model, folder / f"{name}{kind.suffix}", name, image_size=SIDE, classes=classes, notes={"n": 1}
        )
        for name, kind in export.FORMATS.items()
    }
    return model, made


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_programs_compute_what_the_network_computes(written, name, batch):
    model, made = written
    program = export.load(made[name].path)
    x = torch.randn(batch, 3, SIDE, SIDE)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.expand(batch, 3, SIDE, SIDE)):
        torch.testing.assert_close(program(given).double(), exact(model, x), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", list(export.FORMATS))
def test_what_travels_with_a_file(written, name):
    model, made = written
    about = made[name].about
    opened = export.load(made[name].path) if name in PROGRAMS else None
    if opened is not None:
        assert opened.about == about and f"{name} of cifar_resnet" in repr(opened)
    assert about["config"] == model.config and about["fastres"] == fastres.__version__ and about["n"] == 1
    assert about["classes"][2] == 'the 2\'th "class" é' and about["input"] == [None, 3, SIDE, SIDE]
    assert made[name].bytes == made[name].path.stat().st_size
    assert made[name].path.stat().st_mode & 0o777 == made["onnx"].path.stat().st_mode & 0o777
    assert made[name].folded == (7 if name in PROGRAMS else 0)
    assert re.search(r"largest difference \S+ of outputs up to .*allowed .*batches of 1 and 3", str(made[name]))
    assert left(made[name].path.parent) == sorted(f"{n}{k.suffix}" for n, k in export.FORMATS.items())


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_checks_its_input(written, name):
    program = export.load(written[1][name].path)
    for bad, words in (
        (torch.zeros(2, 3, SIDE + 1, SIDE), r"takes \['N', 3, 8, 8\] in float32 on the CPU, got \[2, 3, 9, 8\]"),
        (torch.zeros(2, 1, SIDE, SIDE), "got"),
        (torch.zeros(0, 3, SIDE, SIDE), "got"),
        (torch.zeros(3, SIDE, SIDE), "got"),
        (torch.zeros(2, 3, SIDE, SIDE).double(), "got float64"),
        (torch.zeros(2, 3, SIDE, SIDE, device="meta"), "on meta"),
        ("image", "got str"),
    ):
        with pytest.raises(InputError, match=words):
            program(bad)


def test_onnx_is_plain(written):
    onnx = require("onnx")
    path = written[1]["onnx"].path
    proto = onnx.load(path)
    assert {(n.domain, n.op_type) for n in proto.graph.node} <= {
        ("", op) for op in ("Conv", "Relu", "Add", "Slice", "Pad", "ReduceMean", "GlobalAveragePool", "Reshape", "Gemm")
    }
    assert sum(n.op_type == "Conv" for n in proto.graph.node) == 7, "BatchNorm is in the weights"
    shape = [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert (
        shape == ["batch", 3, SIDE, SIDE] and proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    )
    assert (proto.graph.input[0].name, proto.graph.output[0].name) == ("images", "logits")
    assert json.loads({p.key: p.value for p in proto.metadata_props}["fastres"])["config"]["name"] == "cifar_resnet"


def test_no_folder_of_this_machine_is_in_a_portable_file(written):
    sources = fastres.__file__.removesuffix("__init__.py").encode()
    assert sources not in written[1]["onnx"].path.read_bytes()
    with zipfile.ZipFile(written[1]["torch-export"].path) as archive:
        assert not [name for name in archive.namelist() if sources in archive.read(name)]


# The deepest ones take ten seconds each, and have the blocks of resnet50 and resnet110.
@pytest.mark.parametrize("name", sorted({*fastres.list_models()} - {"resnet101", "resnet152", "resnet1202"}))
def test_every_registered_network_folds(name):
    model = export.untrained(name)
    size = (3, 64, 64) if fastres.model_info(name).dataset == "imagenet" else (3, 16, 16)
    own, bare = own_form(model), plain(model)
    check = Check(own, bare, size, (1, 2))
    norms = sum(isinstance(m, BatchNorm) for m in model.modules())
    assert fold_batch_norms(bare, torch.zeros(1, *size)) == norms > 0
    assert not any(isinstance(m, BatchNorm) for m in bare.modules())
    assert own.fused and not bare.fused, "a fused network is compared with its plain form"
    assert check.compare(bare, "folded network").allowed < 1e-4 * check.largest


@pytest.mark.parametrize(
    "model",
    [
        lambda: ResNet(Bottleneck, (1, 1, 1, 1), num_classes=4, version="v1", shortcut="C"),
        lambda: ResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, in_channels=2, fused=False),
        lambda: CifarResNet(1, num_classes=4, shortcut="none", memory="recompute"),
    ],
    ids=["bottleneck", "basic", "plain"],
)
def test_families(tmp_path, model):
    model = seasoned(model()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    done = export.save(model, tmp_path / "net.pt2", "torch-export", image_size=32, batch_size=2)
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    program = export.load(done.path)
    x = torch.randn(2, model.in_channels, 32, 32)
    torch.testing.assert_close(program(x).double(), exact(model, x), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match=r"takes \[2, \d, 32, 32\]"):
        program(x[:1])


def test_other_networks(tmp_path):
    other = seasoned(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    with pytest.raises(ExportError, match="image_size is missing: no size is known for this Sequential"):
        export.save(other, tmp_path / "a.pt2", "torch-export")
    done = export.save(other, tmp_path / "a.pt2", "torch-export", image_size=SIDE)
    assert done.folded == 0 and done.about["config"] == {"name": "Sequential"} and done.about["outputs"] == 4
    with pytest.raises(ExportError, match=r"operators that only fastres has .*given to fastres\.fuse"):
        export.save(fastres.fuse(other), tmp_path / "b.pt2", "torch-export", image_size=SIDE)
    with pytest.raises(ExportError, match="gives a tuple, expected one tensor"):
        export.save(Pair(), tmp_path / "b.pt2", "torch-export", image_size=SIDE)
    with pytest.raises(ExportError, match="can't compute images of 5x8x8"):
        export.save(other, tmp_path / "b.pt2", "torch-export", image_size=(5, SIDE, SIDE))
    assert left(tmp_path) == ["a.pt2"]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_safetensors_give_the_network_back(written, tmp_path):
    with pytest.raises(ModelError, match="unknown model 'cifar_resnet'"):
        export.load(written[1]["safetensors"].path)  # of a class, not of a registered network
    model = export.untrained("resnet20", num_classes=7, shortcut="B").bfloat16()
    path = export.save(model, tmp_path / "w.safetensors").path
    again = export.load(path, fused=False)
    assert not again.training and not again.fused and again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value.to(again.state_dict()[key].dtype)), key
    with require("safetensors").safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict()) and "layer2.0.downsample.0.weight" in file.keys()  # noqa: SIM118
        assert file.get_tensor("conv1.weight").dtype == torch.bfloat16


def test_safetensors_refuse_another_network(tmp_path):
    path = export.save(export.untrained("resnet20", num_classes=7), tmp_path / "w.safetensors").path
    for name, options, words in (
        ("resnet20", {}, r"w\.safetensors: .*fc\.weight \[7, 64\] \(the model has \[10, 64\]\), fc\.bias \[7\]"),
        ("resnet32", {"num_classes": 7}, r"another architecture: name 'resnet20' \(the model has 'resnet32'\)"),
        (
            "plain20",
            {"num_classes": 7},
            r"another architecture: name 'resnet20'.* shortcut 'A' \(the model has 'none'\)",
        ),
    ):
        with pytest.raises(ModelError, match=words):
            fastres.create_model(name, weights=path, **options)
    # Without metadata only keys and shapes can tell.
    bare = tmp_path / "bare.safetensors"
    state = export.load(path).state_dict()
    require("safetensors.torch").save_file(dict(state), bare)
    assert torch.equal(fastres.create_model("resnet20", weights=bare, num_classes=7).fc.weight, state["fc.weight"])
    with pytest.raises(ModelError, match=r"missing: layer1\.3\..* and \d+ more"):
        fastres.create_model("resnet32", weights=bare, num_classes=7)
    with pytest.raises(ExportError, match="does not say which network it is of"):
        export.load(bare)
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors can't be read"):
        export.load(damaged)


def test_a_wrong_file_is_not_left_behind(tmp_path, monkeypatch):
    honest = writing.write_torch_export

    def wrong(program, path, about):
        program.state_dict["conv1.bias"].data[0] += 1e-3
        honest(program, path, about)

    target = tmp_path / "net.pt2"
    target.write_bytes(b"the last good one")
    monkeypatch.setattr(writing, "write_torch_export", wrong)
    with pytest.raises(
        ExportError, match=r"computes something else, and was deleted: largest difference .*allowed .*e-0[56]"
    ):
        export.save(small(), target, "torch-export", image_size=SIDE)
    assert left(tmp_path) == ["net.pt2"] and target.read_bytes() == b"the last good one"

    def full(program, path, about):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_torch_export", full)
    with pytest.raises(OSError, match="No space left"):
        export.save(small(), target, "torch-export", image_size=SIDE)
    assert left(tmp_path) == ["net.pt2"] and target.read_bytes() == b"the last good one"
    monkeypatch.setattr(writing, "write_torch_export", honest)
    assert export.save(small(), target, "torch-export", image_size=SIDE).bytes == target.stat().st_size > 1000


def test_safetensors_are_compared_bit_by_bit(tmp_path, monkeypatch):
    honest = writing.write_safetensors

    def wrong(model, path, about):
        model.bn1.running_mean[0] = torch.nextafter(model.bn1.running_mean[0], torch.tensor(9.0))
        honest(model, path, about)
        model.bn1.running_mean[0] = torch.nextafter(model.bn1.running_mean[0], torch.tensor(-9.0))

    monkeypatch.setattr(writing, "write_safetensors", wrong)
    with pytest.raises(ExportError, match=r"bn1\.running_mean is not in the safetensors file as it is in the network"):
        export.save(small(), tmp_path / "w.safetensors", image_size=SIDE)
    assert left(tmp_path) == []


def test_networks_that_nothing_can_be_compared_with(tmp_path):
    broken = small()
    broken.fc.bias.data[0] = float("nan")
    with pytest.raises(ExportError, match="outputs for random images are not finite"):
        export.save(broken, tmp_path / "a.safetensors", image_size=SIDE)
    chaotic = small()
    chaotic.fc.weight.data *= 1e-9
    chaotic.fc.bias.data.zero_()
    chaotic.fc.register_forward_hook(lambda m, x, y: torch.sin(y * 1e15))
    with pytest.raises(ExportError, match="turns rounding errors into differences"):
        export.save(chaotic, tmp_path / "a.safetensors", image_size=SIDE)
    assert left(tmp_path) == []


def test_what_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    model = nn.Identity()  # never called
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    for path, format, options, words in (
        (
            "a.onnx",
            "onxx",
            {},
            "unknown format 'onxx'; close to onnx; expected one of onnx, torch-export, aoti, safetensors",
        ),
        ("a.pt2", "torch_exprot", {}, "unknown format 'torch_exprot'; close to torch-export"),
        ("a.pt2", "zzz", {}, "unknown format 'zzz'; expected one of"),
        ("a.pt2", None, {}, r"which format should .*a\.pt2 be\? .*that of torch-export and aoti"),
        ("a.bin", None, {}, "no format has it"),
        ("a.onnx", "aoti", {}, r"a\.onnx: the name of a file of format aoti ends in \.pt2"),
        ("nowhere/a.pt2", "aoti", {}, "there is no folder .*nowhere"),
        ("file/a.pt2", "aoti", {}, "there is no folder .*file"),
        ("folder.onnx", "onnx", {}, "is a folder, expected the name of a file"),
        ("a.pt2", "aoti", {"opset": 18}, "an opset is for the format onnx, not aoti"),
        ("a.pt2", "aoti", {"batch_size": 0}, "batch_size is 0, expected a positive number"),
        ("a.pt2", "aoti", {"image_size": -1}, "image_size is -1, expected the side"),
    ):
        with pytest.raises(ExportError, match=words):
            export.save(model, tmp_path / path, format, **{"image_size": SIDE, **options})
    with pytest.raises(ExportError, match="3 class names were given for a network of 10 outputs"):
        export.save(small(), tmp_path / "a.safetensors", image_size=SIDE, classes=["a", "b", "c"])
    with pytest.raises(ExportError, match="plain JSON values"):
        export.save(small(), tmp_path / "a.safetensors", image_size=SIDE, notes={"n": object()})

    def unwritable(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", unwritable)
    with pytest.raises(ExportError, match=r"a\.onnx can't be written: Permission denied"):
        export.save(model, tmp_path / "a.onnx", image_size=SIDE)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ExportError, match=r"needs onnxscript, which is not installed: pip install 'fastres\[export\]'"):
        export.save(model, tmp_path / "a.onnx", image_size=SIDE)
    assert left(tmp_path) == ["file", "folder.onnx"]


def test_what_can_not_be_opened(tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        export.load(tmp_path / "a.onnx")
    for name in ("a.onnx", "a.pt2"):
        (tmp_path / name).write_bytes(b"not a network")
        with pytest.raises(ExportError, match=f"{name}"):
            export.load(tmp_path / name)
    foreign = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    torch.export.save(foreign, tmp_path / "f.pt2")
    with pytest.raises(ExportError, match="was not written by fastres"):
        export.load(tmp_path / "f.pt2")


def test_programs_run_without_fastres(written):
    names = {name: str(done.path) for name, done in written[1].items()}
    run_python(
        f"""
import sys
sys.modules["fastres"] = None
import onnxruntime, torch
images = torch.randn(3, 3, {SIDE}, {SIDE})
session = onnxruntime.InferenceSession({names["onnx"]!r}, providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {{"images": images.numpy()}})
for other in (torch.export.load({names["torch-export"]!r}).module(), torch._inductor.aoti_load_package({names["aoti"]!r})):
    torch.testing.assert_close(other(images), torch.from_numpy(logits), atol=2e-5, rtol=0)
"""
    )
