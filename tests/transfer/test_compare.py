"""The comparison of recipes: from a plan to a table, again after an interruption, and its arithmetic."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks.transfer import compare as command
from benchmarks.transfer import scores, table
from benchmarks.transfer.kept_features import digest_of
from benchmarks.transfer.plan import Candidate, Plan, quick_plan, read_plan, steps_of
from bestrq2.config import ConfigError, load_config
from bestrq2.models import build_encoder

pytestmark = pytest.mark.usefixtures("plain_training")


def values(out):
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(row["candidate"], row["features"], row["seed"], row["task"]): row["value"] for row in rows}, rows


def test_quick_and_again(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--out", str(tmp_path)]
    stop = scores.train_run

    def interrupted(plan, candidate, seed, *rest):
        if (candidate.name, seed) == ("one-stage", 1):
            raise scores.Interrupted("stopped")
        return stop(plan, candidate, seed, *rest)

    monkeypatch.setattr(command, "train_run", interrupted)
    assert command.main(arguments) == 130
    first, _ = values(tmp_path)
    assert len(first) == 1 + 2 * 3
    assert "| two-step | 2 |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(command, "train_run", stop)
    assert command.main(arguments) == 0
    known, rows = values(tmp_path)
    assert len(known) == 1 + 2 * 4
    assert first.items() <= known.items()
    budgets = {row["candidate"]: float(row["flops"]) for row in rows if row["flops"]}
    assert budgets["one-stage"] == pytest.approx(budgets["two-step"], rel=0.05)
    assert all(row["commit"] for row in rows)
    assert all(float(row["minutes"]) >= 0 for row in rows if row["steps"])
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"
    # A score that is lost is computed again, without training, and is the same.
    (tmp_path / "scores" / "two-step-seed0--packaged.npz").unlink()
    capsys.readouterr()
    assert command.main(arguments) == 0
    assert "step/s" not in capsys.readouterr().err
    assert values(tmp_path)[0] == known
    # Other tasks on the same runs: scores of their own, no training.
    other = tmp_path / "held_out"
    command.compare(quick_plan(), scores.Suite(command.packaged_tasks()), None, tmp_path, other)
    assert "step/s" not in capsys.readouterr().err
    assert len(scores.all_scores(other)) == len(known)
    # So do those of another head, which chooses its own strength.
    assert command.main([*arguments, "--head", "ridge"]) == 0
    assert "step/s" not in capsys.readouterr().err
    task = json.loads((tmp_path / "ridge" / "identity.json").read_text())["tasks"]["packaged"]
    assert (task["head"], task["regularisation"]) == ("ridge", None)
    assert len(scores.all_scores(tmp_path / "ridge")) == len(known)
    assert values(tmp_path)[0] == known
    with pytest.raises(SystemExit):
        command.main(["--quick", "--held-out"])
    assert command.main([*arguments, "--corpora", str(tmp_path)]) == 2
    assert "error" in capsys.readouterr().err


def test_runs_on_other_audio_are_not_reused(tmp_path, monkeypatch, capsys):
    """Other tasks and heads have scores of their own, but the runs are the same: they must be those that were meant."""
    monkeypatch.setattr(command, "compare", lambda *_: None)
    out, packaged = tmp_path / "out", ["--quick", "--out", str(tmp_path / "out")]
    assert command.main(packaged) == 0
    for old in (False, True):  # folders from before runs had an identity of their own
        if old:
            (out / "runs" / "identity.json").unlink()
        for other in (["--corpora", str(tmp_path), "--held-out"], ["--corpora", str(tmp_path)], ["--steps", "7"]):
            assert command.main([*packaged, *other, "--head", "ridge"]) == 2, other
            assert "runs holds another comparison" in capsys.readouterr().err
    assert not (out / "ridge").exists()
    assert command.main([*packaged, "--head", "ridge"]) == 0


def test_equal_beginnings_are_scored_once(tmp_path, monkeypatch):
    """Recipes whose encoders begin alike share the score before training; others do not."""
    seen = []
    measure = scores.Suite.measure

    def counted(self, name, encoders, with_log_mel):
        seen.append(sorted(encoders))
        return measure(self, name, encoders, with_log_mel)

    monkeypatch.setattr(scores.Suite, "measure", counted)
    first = quick_plan().candidates[0]
    small = ("train.steps=2", "train.batch_size=2")
    candidates = [
        Candidate("a", first.config, (*first.overrides, *small)),
        Candidate("b", first.config, (*first.overrides, *small, "model.masking.ratio=[0.8,0.8]")),
        Candidate("c", first.config, (*first.overrides, *small, "model.encoder.width=64")),
    ]
    plan, suite = Plan("p", tuple(candidates), steps=2), scores.Suite(command.packaged_tasks())
    for candidate in candidates:
        run = scores.train_run(plan, candidate, 0, 2, None, tmp_path)
        scores.probe_run(suite, candidate, 0, run, tmp_path, {})
    assert [len(encoders) for encoders in seen] == [2, 1, 2]
    before = {s.candidate: s for s in scores.all_scores(tmp_path) if s.features == "random initialisation"}
    assert before["a"].run["initial"] == before["b"].run["initial"] != before["c"].run["initial"]
    np.testing.assert_array_equal(before["a"].samples, before["b"].samples)


def test_encoders_are_read_in_the_precision_of_the_plan():
    torch.manual_seed(0)
    encoder = build_encoder(load_config("best_rq2_tiny", []).model).eval()
    found = {}
    for precision in ("fp32", "bf16"):
        suite = scores.Suite(command.packaged_tasks(), precision=precision)
        found[precision] = np.stack(suite.features("packaged", {"encoder": encoder}, False).of["encoder"])
        assert found[precision].dtype == np.float32
    error = np.abs(found["bf16"] - found["fp32"]).max() / np.abs(found["fp32"]).max()
    assert 1e-5 < error < 0.05


def test_features_are_kept_for_other_heads_and_starts(tmp_path, monkeypatch):
    """A second suite on the same folder decodes and encodes no clip; another readout does."""
    torch.manual_seed(0)
    encoder = build_encoder(load_config("best_rq2_tiny", []).model).eval()
    first = scores.Suite(command.packaged_tasks(pooling="mean+std"), kept=tmp_path)
    found = first.features("packaged", {"encoder": encoder}, True)
    assert set(found.of) == {"encoder", "log-mel statistics"}
    monkeypatch.setattr(encoder, "encode_layers", lambda *arguments, **options: pytest.fail("encoded again"))
    again = scores.Suite(command.packaged_tasks(pooling="mean+std", head="ridge"), kept=tmp_path)
    monkeypatch.setattr(again, "clips", lambda name: pytest.fail("decoded again"))
    kept = again.features("packaged", {"encoder": encoder}, True)
    assert kept.usable == found.usable
    for kind, vectors in found.of.items():
        np.testing.assert_array_equal(np.stack(kept.of[kind]), np.stack(vectors))
    other = scores.Suite(command.packaged_tasks(pooling="mean"), kept=tmp_path)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        other.features("packaged", {"encoder": encoder}, False)


def test_digest_of_an_encoder():
    """The same weights with other settings are another encoder: kept features are not shared."""
    found = set()
    for change in ("model.encoder.heads=4", "model.encoder.heads=2", "model.front_end.floor_db=-60"):
        torch.manual_seed(0)
        encoder = build_encoder(load_config("best_rq2_tiny", [change]).model).eval()
        torch.manual_seed(0)
        again = build_encoder(load_config("best_rq2_tiny", [change]).model).eval()
        assert digest_of(encoder) == digest_of(again)
        found.add(digest_of(encoder))
    assert len(found) == 3


def test_equal_compute():
    plan = quick_plan()
    candidate = plan.candidates[0]
    steps, flops = steps_of(plan, candidate)
    twice = Plan("p", (candidate,), flops=2 * flops)
    assert steps_of(twice, candidate)[0] == 2 * steps
    wider = Candidate("wide", candidate.config, (*candidate.overrides, "train.batch_size=16"))
    assert steps_of(twice, wider)[0] == steps
    with pytest.raises(ConfigError, match=r"one step takes .* more than the budget"):
        steps_of(Plan("p", (candidate,), flops=10.0), candidate)
    # A second iteration does the forward pass of its teacher as well.
    teacher = f"model.targets.encoder={Path(__file__).parents[1] / 'fixtures' / 'run_0_1_0'}"
    again = Candidate("again", candidate.config, (*candidate.overrides, teacher))
    assert steps_of(Plan("p", (again,), steps=1), again)[1] > flops / steps


def score(candidate, seed, features, task, samples):
    samples = np.asarray(samples, float)
    found = (0.1, float(samples.mean()), 0.0, 1.0)
    return scores.Score(candidate, seed, features, task, "m", *found, samples, {})


def test_differences_are_paired():
    """Two candidates that differ by 0.1 in every resample and every seed, though each varies by much more."""
    noise = np.random.default_rng(0).uniform(-0.2, 0.2, size=(2, 2, 1000))
    plan = Plan("p", (Candidate("a", "x"), Candidate("b", "x")), (0, 1))
    found = []
    for seed in (0, 1):
        for number, task in enumerate(("t", "u")):
            base = 0.5 + 0.1 * seed + noise[seed, number]
            found += [score("a", seed, "encoder", task, base), score("b", seed, "encoder", task, base + 0.1)]
    results = table.Results(plan, ["t", "u"], found)
    gap = results.difference(("b", "encoder"), ("a", "encoder"), table.MEAN)
    assert [gap.value, gap.low, gap.high] == pytest.approx([10, 10, 10])
    assert gap.spread == pytest.approx(0, abs=1e-9)
    assert gap.sure
    own = results.cell(("a", "encoder"), "t")
    assert own.high - own.low > 10
    assert own.spread == pytest.approx(12.706 * 10 / 2, rel=0.2)  # t of one degree of freedom
    single = table.Results(plan, ["t", "u"], [s for s in found if s.seed == 0])
    assert not single.difference(("b", "encoder"), ("a", "encoder"), "t").sure
    assert "| b - a |" in table.text(results)
    # A seed of which a task is missing does not count.
    assert table.Results(plan, ["t", "u"], found[:-1]).seeds(("b", "encoder")) == [0]


def test_names_are_shown_as_they_are_written(tmp_path, capsys):
    """Not as TeX, which may be no formula, and not as the end of a cell or a line."""
    names = (r"a$\frac$b", "two|parts", "two\nlines")
    plan = Plan("p$\\alpha{$", tuple(Candidate(name, "x") for name in names), (0, 1))
    tasks, noise = ["t_1$x$", "u"], np.random.default_rng(0).uniform(size=1000)
    found = [score(name, seed, "encoder", task, noise) for name in names for seed in (0, 1) for task in tasks]
    for number, entry in enumerate(found):
        scores.write_score(tmp_path / "scores" / f"{number}.npz", entry)
    command.report(plan, tasks, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == [r"| a$\frac$b", r"| two\|parts", r"| two\nlines"]
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"scores", "scores.csv", "table.md", "table.png"}
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        assert {row["candidate"] for row in csv.DictReader(file)} == set(names)


def test_plan_files(tmp_path):
    path = tmp_path / "masks.yaml"
    path.write_text(
        "steps: 5\nseeds: [0, 2]\ncommon: [train.batch_size=4]\nreadout: {pooling: mean+std}\n"
        "candidates:\n  a: {config: best_rq2_tiny}\n  b: {config: own.yaml, set: [data.crop_seconds=1]}\n"
    )
    plan = read_plan(path)
    assert (plan.name, plan.seeds, plan.steps, plan.flops) == ("masks", (0, 2), 5, None)
    assert plan.precision == "fp32"
    assert plan.candidates[0] == Candidate("a", "best_rq2_tiny", ("train.batch_size=4",))
    assert plan.candidates[1].config == str(tmp_path / "own.yaml")
    assert plan.candidates[1].overrides == ("train.batch_size=4", "data.crop_seconds=1")
    for text, message in (
        ("candidates: {a: {config: x}}", "give either 'flops' or 'steps'"),
        ("steps: 1\nflops: 2\ncandidates: {a: {config: x}}", "give either"),
        ("steps: 1\ncandidates: {a: {recipe: x}}", "candidates.a: expected config"),
        ("steps: 1\nseed: 1\ncandidates: {a: {config: x}}", "unknown key 'seed'"),
        ("steps: 1", "expected a mapping with 'candidates'"),
        ("steps: 1\nprecision: fp8\ncandidates: {a: {config: x}}", "precision: expected one of fp32, bf16, got 'fp8'"),
        ("steps: 1\nreadout: {layer: 2}\ncandidates: {a: {config: x}}", "readout: expected some of"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_plan(path)


def test_our_plans():
    """They name configurations that exist and keys that are known; one-stage gets fewer steps for the same compute."""
    folder = Path(command.__file__).parent / "plans"
    for name in ("screening", "transfer"):
        plan = read_plan(folder / f"{name}.yaml")
        for candidate in plan.candidates:
            assert steps_of(plan, candidate)[0] > 400
    for name in ("learning_rate", "masks", "stages"):
        plan = read_plan(folder / f"{name}.yaml")
        budget = [steps_of(plan, candidate) for candidate in plan.candidates]
        assert budget[1][1] == pytest.approx(budget[0][1], rel=1e-3)
        assert budget[0][0] == pytest.approx(3000, abs=1)
        assert (budget[1][0] < budget[0][0]) == (name == "stages")
