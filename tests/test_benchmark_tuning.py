"""benchmarks/tune.py: the search, the rejection of bad candidates, and the files it writes. Only a GPU can be tuned."""

import pytest
import torch
from benchmark_cases import GOOD, provider, square_case
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


def test_search_takes_the_fastest_usable_candidate_of_each_kernel():
    times = {16: 5.0, 32: 3.0, 64: 2.99, 128: 1.0}  # 64 is within the noise of 32; 128 does not work
    asked = []

    def milliseconds(kernel, configs):
        asked.append((kernel, {name: config["tile"] for name, config in configs.items()}))
        if configs[kernel]["tile"] == 128:
            raise tune.Unusable("too much shared memory")
        return times[configs[kernel]["tile"]]

    said = []
    candidates = {name: [{"tile": size} for size in (32, 64, 128)] for name in ("forward", "backward")}
    start = {"forward": {"tile": 16}, "backward": {"tile": 32}, "other": {"tile": 8}}
    chosen = tune.search(candidates, start, milliseconds, said.append)
    assert chosen == {"forward": {"tile": 32}, "backward": {"tile": 32}, "other": {"tile": 8}}
    assert ("backward", {"forward": 32, "backward": 64, "other": 8}) in asked, "later kernels use the earlier choice"
    assert start["forward"] == {"tile": 16}, "the shipped configuration is not modified"
    assert any("too much shared memory" in line for line in said)
    with pytest.raises(RuntimeError, match="no usable configuration of forward"):
        tune.search({"forward": [{"tile": 128}]}, {}, milliseconds, said.append)


def test_override_replaces_a_configuration_and_counts_lookups(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tune.write("square", "default", {"forward": {"tile": 16}, "backward": {"tile": 8}}, tmp_path)
    tune.write("square", "NVIDIA H100 80GB HBM3", {"forward": {"tile": 128}}, tmp_path)
    assert (tmp_path / "square" / "NVIDIA_H100_80GB_HBM3.json").exists()
    assert tuning.load_configs("square", "NVIDIA H100 80GB HBM3") == {"forward": {"tile": 128}}
    assert tuning.load_configs("square", "another GPU")["forward"] == {"tile": 16}
    with tuning.override("square", {"forward": {"tile": 64}}) as used:
        assert used.lookups == 0
        assert tuning.load_configs("square") == {"forward": {"tile": 64}, "backward": {"tile": 8}}
        assert used.lookups == 1
    assert tuning.load_configs("square")["forward"] == {"tile": 16}


def test_tuning_rejects_wrong_results_and_kernels_that_ignore_their_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tune.write("square", "default", {"forward": {"exponent": 2}}, tmp_path)
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
