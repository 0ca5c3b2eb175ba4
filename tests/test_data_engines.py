"""The engines against each other, against torchvision and Pillow; processes, sizes and outputs of the image loader."""

import io
import logging

import numpy as np
import pytest
import torch
from conftest import require
from data_cases import collect, make_folder, picture, same, write_picture

from fastres.data import create_loader
from fastres.data.normalize import normalize
from fastres.errors import DataError, InputError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("engines"), ("ant", "bee", "cat"), 9)


def opened(root, split="train", **options):
    require("torchvision")
    return create_loader(root, split, **{"batch_size": 4, "seed": 2, "image_size": 48, "output": "uint8", **options})


def pixels(batches):
    return torch.cat([x for x, _ in batches]).int()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("options", [{}, {"crop": "scale"}, {"interpolation": "bicubic"}])
def test_all_engines_give_the_same_order_labels_and_crops(images, split, options):
    require("nvidia.dali")
    reference = collect(opened(images, split, backend="torchvision", **options))
    assert same(collect(opened(images, split, backend="dali", **options)), reference), "bit for bit"
    for preset, mean, most in (("fast", 0.3, 2), ("parity", 0.05, 2)):
        alone = collect(opened(images, split, backend="dali-only", preset=preset, **options))
        assert [labels.tolist() for _, labels in alone] == [labels.tolist() for _, labels in reference]
        difference = (pixels(alone) - pixels(reference)).abs()
        cubic = options.get("interpolation") == "bicubic"  # another kernel outside of its four central points
        assert difference.float().mean() < (1.0 if cubic else mean) and (cubic or difference.max() <= most)


def test_training_crops_equal_pillows(images):
    """What Pillow makes of the same windows: torchvision's own reference, for recipes trained with it."""
    Image = require("PIL.Image")
    loader = opened(images, batch_size=64)
    source, found = loader.source, collect(loader)[0][0].permute(0, 2, 3, 1).numpy()
    from fastres.data.geometry import place
    from fastres.data.sampling import epoch_generator

    order = torch.randperm(27, generator=epoch_generator(2, 0)).numpy()
    pictures = [Image.open(io.BytesIO(source.read(i).tobytes())).convert("RGB") for i in order]
    sizes = np.array([[p.height, p.width] for p in pictures])
    geometry = place(loader.options.crops, sizes, order, 48, 2, 0)
    differences = []
    for mine, image, (top, left, height, width), mirror in zip(
        found, pictures, geometry.windows.tolist(), geometry.mirrors, strict=True
    ):
        cut = image.crop((left, top, left + width, top + height)).resize((48, 48), Image.Resampling.BILINEAR)
        theirs = np.asarray(cut)[:, ::-1] if mirror else np.asarray(cut)
        differences.append(np.abs(mine.astype(int) - theirs))
    assert np.max(differences) <= 1 and np.mean(differences) < 0.03


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Parts of scikit-learn's two photographs in ImageNet's usual size."""
    Image = require("PIL.Image")
    root = tmp_path_factory.mktemp("photographs")
    for name, photograph in zip("ab", require("sklearn.datasets").load_sample_images().images, strict=True):
        (root / "val" / name).mkdir(parents=True)
        for number, (top, left) in enumerate(((0, 0), (52, 140), (20, 33))):
            part = Image.fromarray(photograph[top : top + 375, left : left + 500])
            part.save(root / "val" / name / f"{number}.jpg", quality=95)
    return root


# Mean and largest difference to Pillow's resize to 256 and torchvision's centre of 224, in grey levels of 255.
BOUNDS = {
    ("torchvision", "fast"): (0.005, 1), ("dali", "fast"): (0.005, 1), ("dali-only", "parity"): (0.005, 1),
    ("dali-only", "fast"): (0.2, 1),
}  # fmt: skip


@pytest.mark.parametrize(("backend", "preset"), BOUNDS)
def test_evaluation_of_photographs_agrees_with_pillow(photographs, backend, preset):
    if backend != "torchvision":
        require("nvidia.dali")
    Image, v2 = require("PIL.Image"), require("torchvision.transforms.v2")
    steps = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    loader = opened(photographs, "test", batch_size=6, image_size=224, backend=backend, preset=preset)
    expected = torch.stack([steps(Image.open(path).convert("RGB")) for path in loader.source.files]).int()
    difference = (pixels(collect(loader)) - expected).abs()
    mean, largest = BOUNDS[backend, preset]
    assert difference.float().mean() < mean and difference.max() <= largest
    # The bounds mean something: they are exceeded where the crop is off by a pixel, and the presets differ.
    off = torch.roll(pixels(collect(loader)), 1, 3)
    assert (off - expected).abs().float().mean() > 1
    if preset == "fast" and backend == "dali-only":
        assert difference.float().mean() > BOUNDS["dali-only", "parity"][0]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_see_what_one_would_see(images, world):
    alone = collect(opened(images, batch_size=2 * world))
    parts = [collect(opened(images, batch_size=2, rank=rank, world_size=world)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(alone)}
    joint = [(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])) for step in zip(*parts, strict=True)]
    assert same(joint, alone), "pixels too: a sample's crop doesn't depend on who takes it"


def test_a_position_is_continued_by_another_number_of_processes(images):
    loader = opened(images, batch_size=6, world_size=1)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state, rest = loader.state_dict(), collect(iterator)
    parts = []
    for rank in range(3):
        part = opened(images, batch_size=2, rank=rank, world_size=3)
        part.load_state_dict(state)
        parts.append(collect(part))
    joint = [(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])) for step in zip(*parts, strict=True)]
    assert same(joint, rest)
    with pytest.raises(DataError, match="other data or settings"):
        opened(images, batch_size=4, world_size=2).load_state_dict(state)


def test_another_engine_continues_with_a_warning(images, caplog):
    require("nvidia.dali")
    state = opened(images, backend="torchvision").state_dict()
    with caplog.at_level(logging.WARNING, "fastres.data"):
        opened(images, backend="dali").load_state_dict(state)
    assert "saved with torchvision, now DALI" in caplog.text


@pytest.mark.parametrize("backend", ["torchvision", "dali", "dali-only"])
def test_sizes_grow_without_a_new_loader(images, backend):
    if backend != "torchvision":
        require("nvidia.dali")
    loader = opened(images, backend=backend)
    engine = getattr(loader._engine, "_pipeline", None)
    for epoch, size in enumerate((32, 48, 64)):
        loader.set_epoch(epoch)
        loader.set_image_size(size)
        assert {x.shape[2:] for x, _ in loader} == {(size, size)} and loader.input_shape == (3, size, size)
        now = getattr(loader._engine, "_pipeline", None)
        assert engine is None or now is engine, "nothing is built anew"
        engine = now
    iterator = iter(loader)
    next(iterator)
    state, rest = loader.state_dict(), collect(iterator)
    resumed = opened(images, backend=backend)
    resumed.load_state_dict(state)
    assert same(collect(resumed), rest), "the size is part of the position"
    with pytest.raises(UserError, match="at least 1"):
        loader.set_image_size(0)


def test_outputs_and_four_channels(images):
    raw = collect(opened(images))
    for output in ("float32", "float16", "bfloat16"):
        for channels in (3, 4):
            made = collect(opened(images, output=output, channels=channels))
            assert [y.tolist() for _, y in made] == [y.tolist() for _, y in raw]
            for (x, _), (u, _) in zip(made, raw, strict=True):
                assert x.dtype == getattr(torch, output) and x.shape == (len(u), channels, 48, 48)
                assert x.is_contiguous(memory_format=torch.channels_last)
                mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
                torch.testing.assert_close(x[:, :3].float(), (u / 255 - mean) / std, rtol=0.005, atol=0.01)
                assert channels == 3 or not x[:, 3].any()
    assert raw[0][0].dtype == torch.uint8 and opened(images, channels=4, output="float32").input_shape == (4, 48, 48)
    with pytest.raises(InputError, match=r"expected uint8 images \[B, H, W, 3\], got torch.float32"):
        normalize(torch.zeros(1, 2, 2, 3))
    with pytest.raises(InputError, match="channels must be 3 or 4, got 5"):
        normalize(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), channels=5)


def test_the_graph_for_a_gpu_gives_normalised_half_precision(images):
    """The graph that a GPU would run, run on the CPU."""
    require("nvidia.dali")
    from fastres.data.dali import DaliEngine, decoder_options
    from fastres.data.engine import Settings

    loader = opened(images, backend="torchvision", output="float32", channels=4)
    settings = Settings(4, 2, torch.device("cpu"), "parity", output="float16", channels=4)
    loader_settings = loader.options.settings
    reference = collect(loader)
    loader._engine = DaliEngine(settings)
    assert loader_settings.output == "float32"
    for (x, y), (expected, labels) in zip(collect(loader), reference, strict=True):
        assert torch.equal(y, labels) and x.shape == expected.shape
        assert x.is_contiguous(memory_format=torch.channels_last) and not x[:, 3].any()
        torch.testing.assert_close(x, expected, rtol=0.002, atol=2.01 / 255 / 0.224)
    on_gpu = decoder_options(on_gpu=True)
    assert on_gpu["device"] == "mixed" and 0 < on_gpu["hw_decoder_load"] < 1 and on_gpu["jpeg_fancy_upsampling"]
    assert on_gpu["preallocate_width_hint"] >= 500 and on_gpu["device_memory_padding"] > 0
    assert not on_gpu["adjust_orientation"] and not decoder_options(on_gpu=False)["adjust_orientation"]


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_unusual_files_are_decoded_as_pillow_decodes_them(tmp_path, backend):
    if backend == "dali":
        require("nvidia.dali")
    Image = require("PIL.Image")
    base = Image.fromarray(picture(1, 90, 120).permute(1, 2, 0).numpy())
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be shown rotated
    files = {
        "cmyk": (base.convert("CMYK"), "JPEG", {}), "grey": (base.convert("L"), "JPEG", {}),
        "png": (base, "PNG", {}), "alpha": (base.convert("RGBA"), "PNG", {}), "palette": (base.quantize(), "PNG", {}),
        "webp": (base, "WEBP", {}), "progressive": (base, "JPEG", {"progressive": True}),
        "turned": (base, "JPEG", {"exif": turned}), "gif": (base, "GIF", {}),
    }  # fmt: skip
    for number, (name, (image, kind, options)) in enumerate(files.items()):
        folder = tmp_path / "val" / f"class{number}"
        folder.mkdir(parents=True)
        image.save(folder / f"{name}.JPEG", kind, **options)
    loader = opened(tmp_path, "test", batch_size=3, backend=backend)
    found = torch.cat([x for x, _ in loader])
    TF = require("torchvision.transforms.v2.functional")
    for path, mine in zip(loader.source.files, found, strict=True):
        with Image.open(path) as image:
            whole = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        theirs = TF.center_crop(TF.resize(whole, [55], antialias=True), [48, 48])
        assert (mine.int() - theirs.int()).abs().max() <= 1, path


def test_an_excluded_list_is_left_out(images, tmp_path):
    names = [str(images / "train" / "bee" / "3.jpg"), str(images / "train" / "ant" / "0.jpg")]
    listing = tmp_path / "bad.txt"
    listing.write_text("# two\n" + "".join(f"{name}\tbroken\n" for name in names) + "/somewhere/else.jpg\tgone\n")
    loader = opened(images, exclude=listing)
    assert loader.samples == 25 and len(loader) == 7
    assert torch.cat([y for _, y in loader]).bincount().tolist() == [8, 8, 9]
    listing.write_text("/somewhere/else.jpg\tgone\n")
    with pytest.raises(DataError, match=f"lists 1 images, none of which is in {images}"):
        opened(images, exclude=listing)
    with pytest.raises(DataError, match=r"gone\.txt, can't be read"):
        opened(images, exclude=tmp_path / "gone.txt")


def test_processes_keep_their_steps_around_a_bad_image(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "bee" / "2.jpg").write_bytes(b"nothing")
    for epoch in range(2):
        counts = []
        for rank in range(2):
            loader = opened(tmp_path, batch_size=2, rank=rank, world_size=2, on_bad_image="skip")
            loader.set_epoch(epoch)
            counts.append([len(y) for _, y in loader])
        assert [len(c) for c in counts] == [4, 4] and sum(map(sum, counts)) == 15
    write_picture(tmp_path / "train" / "bee" / "2.jpg", 1)
    for name in ("ant", "bee"):
        for number in range(8):
            (tmp_path / "train" / name / f"{number}.jpg").write_bytes(b"x")
    write_picture(tmp_path / "train" / "ant" / "0.jpg", 1)
    loaders = [opened(tmp_path, batch_size=2, rank=rank, world_size=2, on_bad_image="skip") for rank in range(2)]
    with pytest.raises(DataError, match=r"no image of batch \d can be decoded; the other processes would wait"):
        for loader in loaders:
            collect(loader)


def test_an_epoch_that_was_left_does_not_disturb_the_next(images):
    require("nvidia.dali")
    loader = opened(images, backend="dali")
    expected = collect(loader)
    for _ in range(2):
        iterator = iter(loader)
        next(iterator)
        iterator.close()
        loader.set_epoch(0)
        assert same(collect(loader), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "ffcv"}, "auto, dali, dali-only or torchvision, got 'ffcv'"),
        ({"crop": "round"}, "got 'round'"), ({"color_jitter": 2.0}, "jitter and erase must be in 0 to 1"),
        ({"auto_augment": "best"}, "got 'best'"), ({"batch_size": 0}, "at least 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(images, options, message):
    with pytest.raises(UserError, match=message):
        opened(images, **options)


def test_named_sets_refuse_what_is_for_images():
    with pytest.raises(UserError, match="are for images in files, not for digits"):
        create_loader("digits", pca_noise=0.1)


def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_it():
    from fastres.data.engine import Buffers

    buffers = Buffers(torch.device("cpu"))
    first, array = buffers.take(4, 8)
    array[...] = 7
    view = first.permute(0, 3, 1, 2)[1:]
    del first, array
    second, array = buffers.take(4, 8)
    array[...] = 1
    assert (view == 7).all() and view.data_ptr() != second.data_ptr()
    address = view.untyped_storage().data_ptr()
    del view
    third, array = buffers.take(3, 8)
    assert third.data_ptr() == address and third.shape == array.shape == (3, 8, 8, 3)
    del third, array
    larger, _ = buffers.take(4, 16)
    assert larger.shape == (4, 16, 16, 3) and len(buffers._arrays) == 2, "what has become too small is let go"
