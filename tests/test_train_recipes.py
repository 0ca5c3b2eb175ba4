"""Recipes: the papers' values, exact schedules, and what is refused."""

import re

import pytest
import torch
import yaml
from ranks import Acting

import fastres
from fastres.cli import main
from fastres.data import create_loader
from fastres.data.augment import Mixing
from fastres.errors import RecipeError, UserError
from fastres.train import RECIPES, Settings, train
from fastres.train.optim import make_optimizer
from fastres.train.recipes import KEYS, open_recipe
from fastres.train.run import make_schedule


def schedule(recipe, per_epoch, **changes):
    settings = Settings("resnet20", recipe=recipe, **changes).resolved()
    return make_schedule(settings, per_epoch, settings.iterations or per_epoch * settings.epochs)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_is_valid_and_says_where_it_comes_from(name):
    recipe = RECIPES[name]
    assert recipe.source and recipe.title and set(recipe.values) <= set(KEYS)
    assert recipe.accuracy or name in ("digits", "folder")
    settings = Settings("resnet50", recipe=name).resolved()
    assert (settings.epochs is None) != (settings.iterations is None)
    rates = schedule(name, 100)
    assert max(rates(i) for i in range(rates.iterations)) == pytest.approx(settings.lr)


def test_cifar_rates_are_exact_to_the_iteration():
    rates = schedule("cifar-paper", 390)
    assert [rates(i) for i in (0, 31999, 32000, 47999, 48000, 63999)] == pytest.approx(
        [0.1] * 2 + [0.01] * 2 + [0.001] * 2
    )
    warm = schedule("cifar-paper-110", 390)
    assert [warm(i) for i in (0, 399, 400, 32000)] == pytest.approx([0.01, 0.01, 0.1, 0.01])
    assert warm.iterations == 64000


def test_imagenet_rates_step_at_epochs():
    for name in (
        "imagenet-paper",
        "imagenet-paper-90",
        "fb-resnet-torch",
        "torchvision-v1",
        "folder",
        "imagenet-preact",
    ):
        rates = schedule(name, 5004)
        assert [rates(i * 5004 + k) for i, k in ((0, 0), (30, -1), (30, 0), (60, -1), (60, 0))] == pytest.approx(
            [0.1, 0.1, 0.01, 0.01, 0.001]
        ), name
    v2 = schedule("torchvision-v2", 1251)
    assert (
        v2(0) == pytest.approx(0.005) and v2(5 * 1251) == pytest.approx(0.5) and v2(v2.iterations) == pytest.approx(0)
    )


def test_another_length_keeps_the_shape():
    short = schedule("cifar-paper", 390, iterations=6400)
    assert [short(i) for i in (3199, 3200, 4799, 4800)] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert schedule("imagenet-paper-90", 100, epochs=9)(300) == pytest.approx(0.01)


def test_momentum_decay_and_nesterov_are_the_sources():
    fb = Settings("resnet50", recipe="fb-resnet-torch").resolved()
    assert fb.nesterov and fb.decay_all and fb.momentum == 0.9
    model = fastres.create_model("resnet20")
    optimizer = make_optimizer(model, fb.lr, fb.momentum, fb.weight_decay, fb.decay_all, fb.nesterov)
    assert len(optimizer.param_groups) == 1 and optimizer.defaults["nesterov"] and optimizer.defaults["dampening"] == 0
    paper = Settings("resnet20", recipe="cifar-paper").resolved()
    assert not paper.nesterov and not paper.decay_all and paper.normalize == "pixel"
    for kind in ("lars", "lamb", "adamw"):
        made = make_optimizer(model, 0.1, 0.9, 1e-4, kind=kind)
        assert type(made).__name__.lower() == kind and [g["weight_decay"] for g in made.param_groups] == [1e-4, 0]
    with pytest.raises(UserError, match="nesterov needs sgd or lars"):
        make_optimizer(model, 0.1, nesterov=True, kind="adamw")


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: 0.1", "unknown key 'learning_rate'"),
        ("warmup_iteration: 3", "unknown key 'warmup_iteration'; close to warmup_iterations"),
        ("lr: 1e-4", r"lr must be a number, not negative, got '1e-4' \(YAML reads"),
        ("epochs: 2.5", "epochs must be a whole number above 0, got 2.5"),
        ("nesterov: 1", "nesterov must be true or false, got 1"),
        ("schedule: linear", "schedule must be one of step, cosine, constant, got 'linear'"),
        ("milestones: [a]", "milestones must be a list of numbers"),
        ("- 3", "must hold keys and values, got list"),
        ("a: [", "is not YAML"),
        ("accuracy: high", "accuracy must name networks"),
    ],
)
def test_a_file_that_is_not_valid_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text + "\n")
    with pytest.raises(RecipeError, match=f"recipe {path}.*{message}|{message}"):
        open_recipe(str(path))


def test_an_unknown_recipe_is_refused_with_the_nearest_names(tmp_path):
    with pytest.raises(
        RecipeError, match=r"unknown recipe 'cifar-papr'; close to cifar-paper.*; there are cifar-paper, "
    ):
        Settings("resnet20", recipe="cifar-papr").resolved()
    with pytest.raises(RecipeError, match=r"gone.yaml can't be read"):
        open_recipe(str(tmp_path / "gone.yaml"))


def test_print_config_prints_what_config_reads_back(capsys, tmp_path):
    assert main(["train", "resnet20", "--recipe", "fb-resnet-torch", "--lr", "0.3", "--print-config"]) == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert values["lr"] == 0.3 and values["nesterov"] is True and values["milestones"] == [30, 60]
    for key in ("lr", "milestones_in", "ema"):
        assert f"# {KEYS[key]}\n{key}:" in text
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == values
    assert not list(tmp_path.glob("runs"))


def test_every_key_is_documented():
    from pathlib import Path

    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    for key in KEYS:
        assert re.search(rf"`{key}`", text), key
    for name in RECIPES:
        assert f"`{name}`" in text, name


def small(out, **changes):
    return Settings(
        "resnet20", out=str(out), batch_size=32, limit=96, image_size=16, device="cpu", seed=1,
        **{"epochs": 1, "lr": 0.05, "warmup": 0.0, **changes},
    )  # fmt: skip


def test_a_run_ends_at_its_iteration(tmp_path):
    run, _ = train(small(tmp_path, epochs=None, iterations=4), Acting())
    assert [(row.epoch, row.iteration) for row in run.rows] == [(1, 3), (2, 4)] and run.iteration == 4


def test_sizes_grow_and_the_average_is_evaluated(tmp_path):
    run, _ = train(
        small(tmp_path, epochs=3, progressive=[32, 64, 0.3, 0.6], test_image_size=64, ema=0.5, cutmix=1.0, mixup=0.2,
              label_smoothing=0.1, nesterov=True),
        Acting(),
    )  # fmt: skip
    sizes = [run.settings.image_size_at(epoch, 3) for epoch in range(3)]
    assert sizes == [32, 32, 64] and run.train_data.input_shape[1] == 64 and run.test_data.input_shape[1] == 64
    assert run.evaluated is run.ema.module and int(run.ema.n_averaged) == 9
    from fastres.evaluate import evaluate

    loader = create_loader("digits", "test", batch_size=32, image_size=64, limit=96)
    assert evaluate(run.ema.module, loader).loss == pytest.approx(run.rows[-1].test_loss, rel=1e-5)
    assert evaluate(run.model, loader).loss != pytest.approx(run.rows[-1].test_loss, rel=1e-3)


def test_the_average_follows_its_definition(tmp_path):
    weights = []

    class Keeping(Acting):
        def step(self, done, *rest):
            weights.append(run_of[0].model.fc.bias.detach().clone())

    run_of = []
    run, _ = train(small(tmp_path, ema=0.75, ema_every=2, epochs=2), Keeping(), run_of.append)
    taken = [w for w in (weights[1], weights[3 + 1], weights[6 + 1])]  # one report more ends each epoch
    expected = taken[0]
    for weight in taken[1:]:
        expected = 0.75 * expected + 0.25 * weight
    assert torch.allclose(run.ema.module.fc.bias, expected, atol=1e-6)


def test_mixing_draws_from_torchs_numbers():
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    mixing = Mixing(4, 0.2, 1.0)
    torch.manual_seed(3)
    first = mixing(images, labels)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, mixing(images, labels), strict=True))
    assert first[1].shape == (8, 4) and torch.allclose(first[1].sum(1), torch.ones(8))


def test_what_a_loader_can_not_do_is_said(tmp_path):
    reporter = Acting()
    train(small(tmp_path, pca_noise=0.1), reporter)
    assert any("left out" in text and "pca_noise 0.1" in text for text in reporter.messages)
