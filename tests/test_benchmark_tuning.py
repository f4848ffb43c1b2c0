"""benchmarks/tune.py: the search, the rejection of bad candidates, and the files it writes. Only a GPU can be tuned."""

import json
import os
import subprocess
import sys

import pytest
import torch
from benchmark_cases import FOLDER, GOOD, provider, square_case
from bestrq2.kernels import tuning

from benchmarks import measure, tune


def test_tuning_needs_a_gpu_and_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("op", tune.tunable_ops())
def test_candidates_have_the_form_of_the_shipped_configuration(op):
    pytest.importorskip("triton")
    shipped = tuning.load_configs(op)
    for kernel, configs in tune.candidates_of(op).items():
        assert kernel in shipped
        assert len(configs) > 1
        for config in configs:
            assert set(config) == set(shipped[kernel]), f"{op} {kernel}: {config}"


@pytest.mark.parametrize("op", tune.tunable_ops())
def test_preselected_candidates_are_few_and_have_the_form_of_the_shipped_ones(op):
    pytest.importorskip("triton")
    shipped, listed = tuning.load_configs(op), tune.candidates_of(op)
    chosen = tune.preselected(op, 90)
    assert chosen
    for kernel, configs in chosen.items():
        assert 1 < len(configs) <= 6
        assert kernel in listed
        for config in configs:
            assert set(config) == set(shipped[kernel]), f"{op} {kernel}: {config}"
    assert not tune.preselected(op, 12)


def test_the_fastest_usable_configuration_is_chosen_and_noise_is_not():
    def trial(tile, **outcome):
        return {"config": {"tile": tile}, **outcome}

    trials = [trial(16, ms=5.0), trial(32, ms=3.0), trial(64, ms=2.99), trial(128, reason="wrong"), trial(256)]
    assert tune.choose(trials, {"tile": 16}) == {"tile": 64}
    assert tune.choose(trials, {"tile": 32}) == {"tile": 32}, "64 is within the noise of 32"
    assert tune.choose(trials, {"tile": 128}) == {"tile": 64}, "the present one does not work here"
    assert tune.choose(trials[3:], {"tile": 16}) is None
    assert [tune.part_of(name) for name in ("forward/64", "backward_key/64", "logits/16")] == [
        "forward",
        "backward",
        "both",
    ]


def test_a_later_layer_replaces_single_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    folder = tmp_path / "square"
    folder.mkdir()
    shipped = {"default": {"forward": {"tile": 16}, "backward": {"tile": 8}}, "sm_90": {"forward": {"tile": 64}}}
    for name, configs in shipped.items():
        (folder / f"{name}.json").write_text(json.dumps(configs))
    tune.write("square", "NVIDIA H100 80GB HBM3", 90, {"backward": {"tile": 32}}, tmp_path)
    for name, architecture, expected in (
        (None, None, (16, 8)),
        ("another GPU", 80, (16, 8)),
        ("another GPU", 89, (16, 8)),
        ("NVIDIA H200", 90, (64, 8)),
        ("a later one of its family", 91, (64, 8)),
        ("NVIDIA H100 80GB HBM3", 90, (64, 32)),
    ):
        configs = tuning.merged(tmp_path, "square", name, architecture)
        assert (configs["forward"]["tile"], configs["backward"]["tile"]) == expected
    files = {file.name: file for file in tuning.shipped("square")}
    assert files["default.json"].serves("forward") == (80, 100), "sm_90 has its own"
    assert files["default.json"].serves("backward") == tuning.ARCHITECTURES
    assert files["sm_90.json"].serves("forward") == (90,)
    device = files["NVIDIA_H100_80GB_HBM3.json"]
    assert (device.keys, device.serves("backward"), device.configs["forward"]) == (("backward",), (90,), {"tile": 64})
    (folder / "unnamed.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name its architecture"):
        tuning.shipped("square")


def test_override_replaces_a_configuration_and_counts_lookups(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "square").mkdir()
    (tmp_path / "square" / "default.json").write_text(json.dumps({"forward": {"tile": 16}, "backward": {"tile": 8}}))
    with tuning.override("square", {"forward": {"tile": 64}}) as used:
        assert used.lookups == 0
        assert tuning.load_configs("square") == {"forward": {"tile": 64}, "backward": {"tile": 8}}
        assert used.lookups == 1
    assert tuning.load_configs("square")["forward"] == {"tile": 16}


INTERPRETED = """
import json, sys
from benchmarks import tune

good = {"BM": 16, "BN": 64, "BK": 16, "PEEL": 0, "num_warps": 4, "num_stages": 2}
configs = [good, {**good, "BN": 3}, {**good, "BM": 32}]
options = dict(device="cpu", shape="40x16->16x64", seconds=100, budget=tune.Budget(repeats=1))
trials = tune.tune_kernel("quantize", "quantize/16/few", configs, {"quantize/16/few": good}, **options)
print(json.dumps(trials))
"""


def test_a_kernel_is_tuned_in_its_own_process():
    """In the interpreter: a configuration that does not compile is skipped, the others are timed."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    trials = json.loads(result.stdout.splitlines()[-1])
    assert [trial["config"]["BM"] for trial in trials] == [16, 16, 32]
    assert trials[0]["ms"] > 0
    assert trials[2]["ms"] > 0
    assert "Error" in trials[1]["reason"]


def test_a_candidate_that_kills_its_process_is_passed_over(tmp_path, monkeypatch):
    """Another process takes up behind it."""
    program = """
import json, os, sys
folder = sys.argv[-1]
request = json.load(open(folder + "/request.json"))
with open(folder + "/trials.jsonl", "a") as file:
    for config in request["configs"]:
        print(json.dumps({"config": config}), file=file, flush=True)
        if config["tile"] == 2:
            os.abort()
        print(json.dumps({"config": config, "ms": 1.0}), file=file, flush=True)
"""
    script = tmp_path / "child.py"
    script.write_text(program)
    run = tune.run_process
    monkeypatch.setattr(
        tune, "run_process", lambda command, *rest, **options: run([sys.executable, script, command[-1]], *rest)
    )
    trials = tune.tune_kernel("square", "forward", [{"tile": n} for n in (1, 2, 3)], {}, say=lambda text: None)
    assert [trial.get("ms") for trial in trials] == [1.0, None, 1.0]


def test_tuning_rejects_wrong_results_and_kernels_that_ignore_their_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "square").mkdir()
    (tmp_path / "square" / "default.json").write_text(json.dumps({"forward": {"exponent": 2}}))
    configured = provider("configured", lambda x: x ** tuning.load_configs("square")["forward"]["exponent"])
    budget = measure.Budget(repeats=2)
    case = square_case()
    assert tune.milliseconds("square", case, configured, {"forward": {"exponent": 2}}, budget) > 0
    with pytest.raises(tune.Unusable, match="wrong results"):
        tune.milliseconds("square", case, configured, {"forward": {"exponent": 3}}, budget)
    with pytest.raises(tune.Unusable, match="KeyError"):
        tune.milliseconds("square", case, configured, {"forward": {}}, budget)
    with pytest.raises(RuntimeError, match="load_configs"):
        tune.milliseconds("square", case, GOOD, {"forward": {"exponent": 2}}, budget)
