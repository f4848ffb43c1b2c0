"""Reports: self-contained, complete, possible at any time and from any state of a run folder; kept batches."""

import base64
import logging
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from bestrq2.config import load_config
from bestrq2.data import Batch
from bestrq2.errors import Skip, printable
from bestrq2.report import main, report
from bestrq2.runs.bad_batches import save_bad_batch
from bestrq2.runs.checkpoint import save_checkpoint
from bestrq2.runs.folder import RunFolder
from bestrq2.runs.metrics import MetricsLog
from bestrq2.runs.record import RunRecord
from bestrq2.runs.report import save_report, write_report
from bestrq2.runs.report_curves import PANELS, draw_curves, running_mean

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def make_run(runs, name, steps=80, overrides=(), books=1) -> RunFolder:
    config = load_config("best_rq2_tiny", ["train.steps=100", f"model.targets.num_codebooks={books}", *overrides])
    run = RunFolder.create(runs, name, config)
    run.write_versions("cpu, 1 thread")
    log = MetricsLog(run.path, 0)
    generator = np.random.default_rng(0)
    for step in range(steps + 1):
        row = {"step": step, "perplexity": 40.0, "codes_used": 300.0, "unigram": 0.2}
        if step:
            row |= {"loss": 6 / step**0.5, "accuracy": 0.5, "grad_norm": generator.random(), "learning_rate": 1e-3}
            row |= {"mfu": 0.3, "audio_seconds": step * 10.0, "elapsed_seconds": step * 1.5, "memory_gib": 0.7}
            row |= {"skipped_files": 3, "skipped_steps": 0}
        row |= {f"perplexity/{book}": 30.0 + book for book in range(books) if books > 1}
        log.write(row)
        if step and step % 40 == 0:
            log.write({"step": step, "validation/loss": 3.0 - step / 100, "probe/accuracy": 0.6 + step / 1000})
    log.close()
    return run


def add_pictures(run: RunFolder, steps) -> None:
    (run.path / "pictures").mkdir()
    for step in steps:
        Image.new("RGB", (40 + step, 20)).save(run.path / "pictures" / f"step-{step:08d}.png")


def test_everything_of_a_run_is_in_one_file(tmp_path):
    run = make_run(tmp_path, 'a & <b> "run"')
    add_pictures(run, range(0, 80, 8))
    (run.path / "pictures" / "step-00000004.partial").write_bytes(b"half a pic")
    (run.path / "skipped.txt").write_text(
        '/data/<img src="x">.wav: truncated (12 % missing)\n/data/c: missing.wav: not finite\n'
        '/data/<img src="x">.wav: truncated (12 % missing)\n'
    )
    (run.path / "skipped-rank1.txt").write_text("/data/d.wav: truncated\n")
    for step, score in ((40, 1.25), (80, 1.5)):
        weights = {"weight": torch.zeros(2**18)}
        save_checkpoint(run.checkpoints, step, weights, {}, {}, {"score": score}, keep_last=5)
    batch = Batch(torch.zeros(1, 100), torch.tensor([100]), torch.tensor([0]))
    kept = save_bad_batch(run.path, 9, 0, batch, float("nan"), 1.0)
    path = save_report(run.path)
    assert path == run.path / "report.html"
    source = path.read_text()
    assert not re.search(r"https?://|@import|url\(|<script|<link", source)
    page = Page(source)
    pictures = page.images()
    assert len(pictures) == 1 + 6  # the curves, and six of ten pictures, the first and the last among them
    assert [picture.width for picture in pictures[1:]][:: len(pictures) - 2] == [40, 112]
    for expected in (
        'a & <b> "run"',
        "step 80 of 100 (80%)",
        "masked accuracy, last tenth 50.00 %",
        "always the commonest code 20.00 %",
        "best validation loss 2.2000 nats at step 80",
        "probe accuracy, last 0.68",
        "peak memory 0.70 GiB",
        "2 min 0 s",
        'truncated 2 /data/<img src="x">.wav: truncated (12 % missing)',
        "not finite 1 /data/c: missing.wav: not finite",
        "step-00000040",
        "1.0 MB 1.2500 (best)",
        "1.0 MB 1.5000 Configuration",
        "train.steps 100 200000",
        "codebook_size: 512",
        f"--bad-batch {kept}",
        "torch 2.",
        "cpu, 1 thread",
        "6 of 10",
    ):
        assert expected in page.text, expected
    with Image.open(run.path / "report.png") as curves:
        assert curves.width > 1000


def columns_drawn(monkeypatch, tmp_path, runs):
    """Titles of the panels and labels of the curves."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    assert draw_curves(tmp_path / "x.png", runs, "title")
    return {axis.get_title(): axis for axis in figures[0].axes}


def test_panels_show_what_was_logged(tmp_path, monkeypatch):
    run = make_run(tmp_path, "run", books=3)
    log = MetricsLog(run.path, 80)
    log.write({"step": 81, "loss_scale": 1024.0, "skipped/too_short": 2, "domain/music": 0.4, "domain/{x}": 0.6})
    log.close()
    panels = columns_drawn(monkeypatch, tmp_path, [RunRecord(run.path)])
    assert "loss_scale" in panels  # a column without a panel is still drawn
    assert [line.get_label() for line in panels["domain"].lines] == ["music", "{x}"]
    assert "Throughput" not in panels  # never logged here
    lines = {line.get_label(): line for line in panels["Perplexity of each codebook"].lines}
    assert set(lines) == {"codebook 0", "codebook 1", "codebook 2"}
    assert lines["codebook 2"].get_ydata().tolist() == [32.0] * 81
    loss = {line.get_label(): line for line in panels["Loss"].lines}
    assert loss["validation"].get_xdata().tolist() == [40, 80]
    assert loss["validation"].get_ydata().tolist() == pytest.approx([2.6, 2.2])
    assert [line.get_label() for line in panels["Skipped so far"].lines] == ["files", "files: too_short"]
    assert panels["Masked accuracy"].lines[-1].get_ydata().tolist() == pytest.approx([20.0] * 81)  # percent
    assert all(axis.get_xlabel() == "step" for axis in panels.values())


def test_every_column_of_the_log_is_drawn_or_known():
    from bestrq2.runs.metrics import COLUMNS
    from bestrq2.runs.report_curves import QUIET

    known = {pattern for panel in PANELS for pattern, _ in panel.curves} | QUIET
    assert set(COLUMNS) <= known


def test_comparison_overlays_runs_and_names_what_differs(tmp_path, monkeypatch, capsys):
    first = make_run(tmp_path, "first")
    second = make_run(tmp_path, "second", steps=40, overrides=["optimizer.learning_rate=0.5"])
    out = tmp_path / "both.html"
    assert main([str(first.path), str(second.path), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    page = Page(out.read_text())
    assert "optimizer.learning_rate 0.002 0.5" in page.text
    assert "step 80 of 100 (80%): going on, or stopped step 40 of 100" in page.text
    assert (tmp_path / "both.png").exists()
    panels = columns_drawn(monkeypatch, tmp_path, [RunRecord(first.path), RunRecord(second.path)])
    lines = [line for line in panels["Learning rate"].lines if len(line.get_xdata())]
    assert [int(max(line.get_xdata())) for line in lines] == [80, 40]
    assert lines[0].get_color() != lines[1].get_color()


def test_report_of_a_run_that_goes_on(tmp_path):
    run = make_run(tmp_path, "run", steps=5)
    with (run.path / "metrics.csv").open("a") as file:
        file.write("6,0.12")  # the line that is being written
    (run.path / "versions.json").write_text('[{"started": "20')
    assert main([str(run.path)]) == 0
    text = Page((run.path / "report.html").read_text()).text
    assert "step 5 of 100" in text
    assert "Not recorded." in text


def test_broken_configuration_does_not_hinder_a_report(tmp_path):
    run = make_run(tmp_path, "run", steps=5)
    (run.path / "config.yaml").write_text("a: [1, 2\nb: {")
    assert save_report(run.path) is not None
    assert "config.yaml cannot be read" in (run.path / "report.html").read_text()


def test_nothing_logged_is_no_report(tmp_path, capsys):
    run = RunFolder.create(tmp_path, "run", load_config("best_rq2_tiny"))
    assert save_report(run.path) is None
    assert main([str(run.path)]) == 2
    assert "nothing was logged yet" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "expected a run folder" in capsys.readouterr().err
    assert main([str(run.path), "--out", "x.pdf"]) == 2
    with pytest.raises(SystemExit):
        main([])


def test_unwritable_report_is_a_warning(tmp_path, caplog):
    run = make_run(tmp_path, "run", steps=3)
    (run.path / "report.html.partial").mkdir()
    assert save_report(run.path) is None
    assert "the report could not be written" in caplog.text


def test_running_mean_leaves_out_what_is_not_finite():
    values = np.array([1.0, 2, np.nan, 4, 5, np.inf, 7])
    expected = [np.nanmean(np.where(np.isfinite(values), values, np.nan)[max(0, k - 1) : k + 2]) for k in range(7)]
    assert running_mean(values, 3) == pytest.approx(expected)


@pytest.mark.parametrize("in_run", [True, False])
def test_bad_batch_is_described_and_drawn(tmp_path, capsys, in_run):
    waveform = torch.randn(3, 8000) * 0.1
    waveform[1, 100:110] = float("nan")
    waveform[2, 3] = float("-inf")
    batch = Batch(waveform, torch.tensor([8000, 8000, 1]), torch.tensor([4, 5, 6]))
    run = RunFolder.create(tmp_path, "run", load_config("best_rq2_tiny")).path if in_run else tmp_path
    path = save_bad_batch(run, 7, 0, batch, float("nan"), 2.0, files=["a.wav", "b.wav", "c.wav"])
    assert main(["--bad-batch", str(path)]) == 0
    output = capsys.readouterr().out
    assert "Step 7, rank 0: loss nan, gradient norm 2" in output
    row = next(line for line in output.splitlines() if "b.wav" in line).split()
    assert row[:3] == ["1", "5", "0.50" if in_run else "8000"]
    assert row[6:8] == ["10", "0"]
    assert "Not finite already in the audio: clips 1\n" in output  # the inf of clip 2 lies behind its end
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 1000
    assert main(["--bad-batch", str(path.with_suffix(".json"))]) == 0  # the file beside it
    assert capsys.readouterr().out == output
    path.write_bytes(b"no tensors")
    assert main(["--bad-batch", str(path)]) == 2
    assert "not a batch kept by training" in capsys.readouterr().err


# TeX, hidden from legends, HTML, a byte that is not UTF-8, a line break, half of a surrogate pair, no Latin letters.
NAMES = ["a$\\frac$b", "_run", "<b>50%</b> & {}", "b\udce9", "two\nlines", "\ud83d", "测试 🎧 $x$", "'\""]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_runs_are_drawn_and_written_as_they_are(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **o: (figures.append(figure), save(figure, *a, **o)))
    run = make_run(tmp_path, "run", steps=4)
    records = []
    for name in NAMES:
        record = RunRecord(run.path)
        record.name = name
        records.append(record)
    path = write_report(records, tmp_path / "all.html", " and ".join(NAMES))
    legend = [text.get_text().strip() for text in figures[0].legends[0].get_texts()]
    assert legend == [printable(name) for name in NAMES]
    text = Page(path.read_text()).text
    for name in NAMES[:3]:
        assert name in text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [make_run(tmp_path / place, name, steps=4).path for place, name in (("a", "x"), ("b", "x"), ("a", "y"))]
    report([*folders, folders[0] / "."], tmp_path / "all.html")
    text = Page((tmp_path / "all.html").read_text()).text
    assert "a/x b/x y a/x state" in text
    assert "b/x: Configuration" in text


def test_a_report_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    run = make_run(tmp_path, "run", steps=4)
    monkeypatch.setattr("bestrq2.runs.report.draw_curves", lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING, "bestrq2"):
        assert save_report(run.path) is None
    assert "the report could not be written: division by zero" in caplog.text


def test_skipped_files_are_listed_once(tmp_path):
    run = RunFolder.create(tmp_path, "run", load_config("best_rq2_tiny"))
    bad, other = Skip("a.wav", "truncated"), Skip("b\udce9\n.wav", "missing")
    run.note_skips([bad, other, bad])
    run.note_skips([bad])
    again = RunFolder(run.path)  # of the process that resumes
    again.note_skips([other, Skip("a.wav", "missing")])
    assert (run.path / "skipped.txt").read_text(encoding="utf-8").splitlines() == [
        "a.wav: truncated",
        r"b\xe9\n.wav: missing",
        "a.wav: missing",
    ]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "svg", ""])
def test_the_backend_of_the_environment_does_not_matter(tmp_path, backend):
    """Matplotlib itself cannot be imported with the first one where it is not installed. Others stay as they are, for
    the user's own figures."""
    code = """
import sys
from bestrq2.charts import plain_text
assert "matplotlib" not in sys.modules
with plain_text():
    from matplotlib.figure import Figure
    Figure().savefig(sys.argv[1])
import matplotlib, os
print(os.environ["MPLBACKEND"], matplotlib.get_backend(auto_select=False))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": backend},
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[0] == backend or not backend
    if backend == "svg":
        assert words[1] == "svg"
    assert Image.open(tmp_path / "a.png").size


def test_a_home_that_cannot_be_written_is_no_matter(tmp_path):
    """Matplotlib then takes a temporary folder, and told of it in two lines."""
    (tmp_path / "file").touch()
    home = {"HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MPLCONFIG", "XDG"))}
    code = "from bestrq2.charts import plain_text\nwith plain_text(): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**plain, **home})
    assert (done.returncode, done.stderr) == (0, "")
