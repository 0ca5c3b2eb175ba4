"""What a fused network shares with its original, and that it can be copied, stored, compiled, exported and wrapped."""

import copy
import io
import pickle

import pytest
import torch
from fusion_cases import Net, Wrapped, assert_same_network, fused_pair, image, projection, randomise, relative, residual
from torch import nn

import fastres
from fastres.errors import FusionError
from fastres.fusion import FusedNetwork
from fastres.nn import SyncBatchNorm2d


def test_shares_parameters_but_not_modes():
    model, fused = fused_pair(Net(projection).double())
    assert isinstance(fused, FusedNetwork) and isinstance(fused, Net)
    assert list(model.state_dict()) == list(fused.state_dict())
    for ours, theirs in zip(fused.named_parameters(), model.named_parameters(), strict=True):
        assert ours[0] == theirs[0] and ours[1] is theirs[1]
    for ours, theirs in zip(fused.modules(), model.modules(), strict=True):
        assert ours is not theirs and ours._parameters is theirs._parameters and ours._buffers is theirs._buffers
    fused.eval()
    assert model.training and model.bn1.training and not fused.bn1.training
    x = image()
    model.eval()
    with torch.no_grad():
        before = fused(x)
        optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    model.load_state_dict({k: v + 0.5 if "running" in k else v for k, v in fused.state_dict().items()}, strict=True)
    with torch.no_grad():
        assert relative(fused(x), model(x)) < 1e-12 < relative(fused(x), before)
    fused.load_state_dict(model.state_dict(), strict=True)
    model.float()
    assert fused.conv1.weight.dtype == torch.float32
    with torch.no_grad():
        assert relative(fused(x.float()), model(x.float())) < 1e-5


def test_original_is_untouched():
    model = randomise(Net(projection).double())
    attributes = [dict(vars(m)) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    fastres.fuse(model)
    for module, before in zip(model.modules(), attributes, strict=True):
        assert vars(module) == before
    assert type(model) is Net and model.relu.inplace
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_replaced_head_takes_effect():
    fused = fastres.fuse(Wrapped())
    fused.head[3] = nn.Linear(12, 7)
    assert fused(image(torch.float32)).shape == (3, 7)


def test_lists_of_modules_point_into_the_twin():
    model = Net(lambda m, x: m.chain[1](m.chain[0](x)))
    model.__dict__["chain"] = [model.conv1, model.bn1]
    model, fused = fused_pair(model.double())
    assert fused.chain[0] is fused.conv1 and fused.fusion_report.counts == {"conv+bn": 1}
    assert_same_network(model, fused, image())


def _copies(fused):
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)
    yield pickle.loads(pickle.dumps(fused))
    yield copy.deepcopy(fused)


def test_copy_and_pickle():
    fused = fused_pair(Net(projection))[1].eval()
    x = image(torch.float32)
    with torch.no_grad():
        expected = fused(x)
        for other in _copies(fused):
            assert isinstance(other, Net) and str(other.fusion_report) == str(fused.fusion_report)
            assert torch.equal(other(x), expected)
            other.conv1.weight.zero_()
            assert not torch.equal(other(x), expected) and torch.equal(fused(x), expected)


def test_compile_and_export():
    fused = fused_pair(Net(projection))[1]
    x = image(torch.float32)
    for mode in (True, False):
        fused.train(mode)
        compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
        assert relative(compiled(x), copy.deepcopy(fused)(x)) < 1e-5
        exported = torch.export.export(copy.deepcopy(fused), (x,), strict=False)
        assert relative(exported.module()(x), copy.deepcopy(fused)(x)) < 1e-5


def test_ddp(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, fused = fused_pair(Net(residual))
        wrapped = nn.parallel.DistributedDataParallel(fused)
        wrapped(image(torch.float32)).sum().backward()
        assert model.conv1.weight.grad is not None
        with pytest.raises(FusionError, match=r"DistributedDataParallel\(fastres.fuse\(model\)\)"):
            fastres.fuse(wrapped)
    finally:
        dist.destroy_process_group()


def test_sync_bn_conversion():
    model, fused = fused_pair(Net(residual).double())
    fused = fastres.convert_sync_bn(fused)
    assert isinstance(fused.bn1, SyncBatchNorm2d) and isinstance(model.bn1, nn.BatchNorm2d)
    assert relative(fused(image()), model(image())) < 1e-12
    again = fastres.fuse(fastres.convert_sync_bn(copy.deepcopy(model)))
    assert len(again.fusion_report.fused) == 3 and relative(again(image()), model(image())) < 1e-12
