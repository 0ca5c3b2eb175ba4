"""What a run shows: curves, reports, boards, the time that is left."""

import io
import sys
import types

import pytest

from fastres.errors import DataError, UserError
from fastres.train import progress
from fastres.train.boards import RUN_ID, Boards
from fastres.train.records import Row, write_log
from fastres.train.settings import Settings


def rows(count, offset=0.0):
    return [
        Row(n, 400 * n, 0.1, 1 / n, 0.9 - offset, 1.2 / n, 0.8 - offset + n / 100, 500.0 + n, 0.01, 10.0, 10.0 * n)
        for n in range(1, count + 1)
    ]


@pytest.fixture
def runs(tmp_path):
    for name, count in (("a", 5), ("b & <c>", 1)):
        (tmp_path / name).mkdir()
        write_log(tmp_path / name / "log.csv", rows(count, count / 100))
    (tmp_path / "a" / "config.yaml").write_text("model: <resnet>\n")
    return [str(tmp_path / "a"), str(tmp_path / "b & <c>")]


def lines(figure):
    return [line for axis in figure.axes for line in axis.get_lines()]


def test_styles_of_the_papers():
    pytest.importorskip("matplotlib")
    from fastres.train.curves import draw, error

    both = {"a": rows(30), "b": rows(5, 0.05)}
    figure = draw(both, "fig4")
    widths = [line.get_linewidth() for line in lines(figure)]
    assert len(widths) == 4 and widths[0] < widths[1], "the training error is thin, the test error bold"
    thin, bold = lines(figure)[:2]
    assert list(bold.get_ydata()) == error(both["a"], "test") and list(thin.get_ydata()) == error(both["a"], "train")
    assert bold.get_xdata()[-1] == 1.2 and "1e4" in figure.axes[0].get_xlabel()
    assert lines(draw(both, "fig6"))[0].get_linestyle() == "--" and draw(both, "fig6").axes[0].get_ylim() == (0, 20)
    train, test = draw(both, "fig1").axes
    assert list(train.get_lines()[1].get_ydata()) == error(both["b"], "train")
    assert list(test.get_lines()[1].get_ydata()) == error(both["b"], "test")
    assert "1e3" in draw({"b": rows(5)}, "fig4").axes[0].get_xlabel()
    assert {axis.get_ylabel() for axis in draw(both).axes} >= {"training images/s", "waiting for data (%)", "error (%)"}
    with pytest.raises(UserError, match="unknown style 'fig2'; expected overview, fig1"):
        draw(both, "fig2")
    with pytest.raises(UserError, match="b has no finished epoch"):
        draw({"a": rows(1), "b": []})


def test_the_report_is_one_file_and_escapes(runs, tmp_path):
    pytest.importorskip("matplotlib")
    from fastres.train.report import write_report

    write_report(tmp_path / "one.html", runs[:1])
    page = (tmp_path / "one.html").read_text()
    assert page.count("data:image/svg+xml") == 2 and 'src="http' not in page and "href" not in page
    assert "&lt;resnet&gt;" in page and "<td>2000</td>" in page and "20.00%" in page
    write_report(tmp_path / "two.html", [*runs, runs[0]])
    page = (tmp_path / "two.html").read_text()
    assert "b &amp; &lt;c&gt;" in page and "<c>" not in page and page.count("<h2>Epochs of") == 3
    write_log(tmp_path / "log.csv", [])
    with pytest.raises(DataError, match="no finished epoch"):
        write_report(tmp_path / "none.html", [str(tmp_path)])
    assert not (tmp_path / "none.html").exists()


def test_the_time_left_counts_this_process_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    left = progress.TimeLeft()
    left.begin_epoch(2, 4, 10, 5)  # continued in the middle of the second of four epochs
    assert left.seconds(5) is None and left.text(5) == ""
    now[0] += 10
    assert left.seconds(10) == pytest.approx(2.0 * 20) and left.text(10) == "0:00:40 left"
    left.begin_epoch(3, 4, 10, 0)
    now[0] += 30  # 5 + 10 batches in 40 s
    assert left.seconds(10) == pytest.approx(40 / 15 * 10)


def test_lines_and_bar_show_the_time_left(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    out = io.StringIO()
    reporter = progress.PlainReporter(Console(file=out, width=200))
    reporter.begin_epoch(1, 2, 10, 0)
    reporter.step(5, 1.0, 0.5, 100.0, 0.0)
    assert "left" in out.getvalue()
    bar = progress.BarReporter(Console(file=io.StringIO(), force_terminal=True, width=200))
    bar.begin_epoch(1, 2, 10, 0)
    bar.step(5, 1.0, 0.5, 100.0, 0.0)
    assert "left" in bar._progress.tasks[0].fields["figures"]
    bar.close()


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_weights_and_biases_get_the_rows_and_go_on_under_the_same_name(tmp_path, monkeypatch):
    started = []

    def init(**arguments):
        started.append((arguments, FakeRun()))
        return started[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    settings = Settings("resnet20", wandb="project")
    for row in rows(2):
        boards = Boards(settings, tmp_path, row.epoch, lambda text: None)
        boards.add(row)
        boards.close()
    (first, run), (second, _) = started
    assert first["id"] == second["id"] == (tmp_path / RUN_ID).read_text().strip() and first["resume"] == "allow"
    assert first["project"] == "project" and first["config"]["model"] == "resnet20"
    (step, values), *_ = run.logged
    assert step == 400 and values["epoch"] == 1 and values["test/acc"] == rows(1)[0].test_acc and run.finished


def test_weights_and_biases_that_can_not_start_say_why(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--wandb p needs Weights & Biases \(pip install 'fastres\[wandb\]'\)"):
        Boards(Settings("resnet20", wandb="p"), tmp_path, 1, print)

    def refuse(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match="can't start the run: no API key"):
        Boards(Settings("resnet20", wandb="p"), tmp_path, 1, print)
    assert not list(tmp_path.iterdir())
