"""Encoders as graphs: torch.export always, ONNX where onnxruntime is installed."""

import json
import os

import pytest
import torch

from bestrq2 import export
from bestrq2.config import ConfigError, config_from_dict, load_config
from bestrq2.errors import BestRQError
from bestrq2.interchange.exportable import ExportableLogMel, exportable
from bestrq2.interchange.graphs import describe, largest_error, trace, write_onnx, write_torch_export
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.layers import LogMel
from bestrq2.models import build_encoder, build_model

SMALL = ["model.encoder.depth=1", "model.encoder.width=32", "model.encoder.heads=2", "model.encoder.hidden=48"]
SCALED = ["model.front_end.mean=-40", "model.front_end.std=15"]
PREDICTOR = ["model.predictor.width=32", "model.predictor.heads=2"]
CHUNKS = ["model.encoder.conformer.chunk_size=8", "model.encoder.conformer.left_context=12"]
RMS = ["norm=rms_norm", "feed_forward=swiglu", "qk_norm=true"]
ENCODERS = {
    "strips": ("best_rq2_tiny", [*SCALED, "data.crop_seconds=1"]),
    "grid": ("best_rq2_base", [*PREDICTOR, "data.crop_seconds=2"]),
    "conformer": ("best_rq_conformer_tiny", []),
    "chunks": ("streaming_conformer", [*SCALED, *CHUNKS, "model.encoder.conformer.activation=gelu"]),
}


@pytest.fixture(scope="module", params=ENCODERS)
def case(request):
    recipe, overrides = ENCODERS[request.param]
    config = load_config(recipe, [*SMALL, *overrides])
    torch.manual_seed(0)
    encoder = build_model(config).encoder.eval().requires_grad_(False)
    for parameter in encoder.parameters():  # biases of attention and norms start at constants
        parameter.add_(0.05 * torch.randn_like(parameter))
    return config, encoder, trace(encoder)


def test_form_without_branches_is_exact(case):
    """The module before tracing, on every length around the first frames and the borders of windows."""
    _, encoder, _ = case
    graph = exportable(encoder)
    assert largest_error(encoder, graph) < 1e-5
    out_of_range(graph)
    hop = round(encoder.hop_size_in_ms * 16)
    borders = [1, 2, 7, hop, 2 * hop - 1, 16000, 16000 + hop, 32000 + 3 * hop]
    lengths = torch.tensor(sorted({max(1, border + step) for border in borders for step in (-1, 0)}))
    waveform = 0.1 * torch.randn(len(lengths), int(lengths.max()))
    expected, counts = encoder.encode(waveform, lengths)
    features, found = graph(waveform, lengths)
    assert torch.equal(found, counts)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def out_of_range(run):
    """Lengths below 1 and above the samples that are there: a graph has no other way to refuse them than NaN."""
    waveform = 0.1 * torch.randn(4, 5000)
    features, counts = run(waveform, torch.tensor([0, 5000, 5001, 10**12]))
    assert features.isnan().flatten(1).all(1).tolist() == [True, False, True, True]
    alone, frames = run(waveform[1:2], torch.tensor([5000]))
    assert counts[1] == frames[0] == alone.shape[1] == features.shape[1]
    torch.testing.assert_close(features[1], alone[0])


CONFORMER = "model.encoder.conformer."
VARIANTS = {
    "rms, swiglu, normalised queries": ("best_rq2_tiny", [f"model.encoder.{x}" for x in RMS]),
    "rotary grid": ("best_rq2_tiny", ["model.encoder.patch_height=16", "model.encoder.position=rope"]),
    "joined rows": ("best_rq2_tiny", ["model.encoder.patch_height=16", "model.encoder.join_rows=concatenate"]),
    "bands and frames left over": ("best_rq2_tiny", ["model.encoder.patch_height=13", "model.encoder.patch_width=3"]),
    "window of one column": ("best_rq2_tiny", ["data.crop_seconds=0.05"]),
    "causal convolution, batch norm": (
        "streaming_conformer",
        [f"{CONFORMER}conv_mode=causal", f"{CONFORMER}conv_norm=batch_norm", f"{CONFORMER}chunk_size=5"],
    ),
    "8x, gelu, full convolution in chunks": (
        "streaming_conformer",
        [f"{CONFORMER}channels=[8,8,8]", f"{CONFORMER}activation=gelu", f"{CONFORMER}conv_mode=full", *CHUNKS],
    ),
    "chunk longer than the clip": ("streaming_conformer", [f"{CONFORMER}chunk_size=1000"]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_without_branches(variant):
    recipe, overrides = VARIANTS[variant]
    config = load_config(recipe, [*SMALL, *SCALED, *overrides])
    encoder = build_encoder(config.model, config.data.crop_seconds).eval().requires_grad_(False)
    for tensor in encoder.state_dict().values():  # running statistics, too
        tensor.add_(0.05 * torch.rand_like(tensor))
    assert largest_error(encoder, exportable(encoder)) < 2e-5


def test_torch_export(case, tmp_path):
    config, encoder, program = case
    said = write_torch_export(tmp_path / "encoder.pt2", program, encoder, config)
    assert "checked by torch.export.load" in said
    extra = {"bestrq2.json": ""}
    module = torch.export.load(tmp_path / "encoder.pt2", extra_files=extra).module()
    assert json.loads(extra["bestrq2.json"])["hop_size_in_ms"] == str(encoder.hop_size_in_ms)
    # Nothing of ours is needed to run it: no operator of the library is in the graph.
    assert not any("bestrq2" in str(node.target) for node in program.graph.nodes)
    for clips, samples in ((1, 1), (1, 30000), (5, 4000)):
        waveform, lengths = 0.1 * torch.randn(clips, samples), torch.full((clips,), samples)
        features, counts = module(waveform, lengths)
        expected, expected_counts = encoder.encode(waveform)
        assert torch.equal(counts, expected_counts)
        torch.testing.assert_close(features[:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)
    out_of_range(module)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["strips", "chunks"], indirect=True)  # between them all operators of the four
def test_onnx(case, tmp_path, monkeypatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    config, encoder, program = case
    path = tmp_path / "encoder.onnx"
    assert "checked by onnxruntime" in write_onnx(path, program, encoder, config)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.onnx"]  # weights inside
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["sampling_rate"] == "16000"
    assert float(metadata["hop_size_in_ms"]) == encoder.hop_size_in_ms
    assert config_from_dict(json.loads(metadata["bestrq2_config"])) == config
    assert [entry.name for entry in session.get_inputs()] == ["waveform", "lengths"]
    for clips, lengths in ((1, [1]), (1, [20001]), (4, [40000, 2, 9999, 25000])):
        waveform, lengths = 0.1 * torch.randn(clips, max(lengths)), torch.tensor(lengths)
        inputs = {"waveform": waveform.numpy(), "lengths": lengths.numpy()}
        features, counts = session.run(["features", "feature_lengths"], inputs)
        expected, expected_counts = encoder.encode(waveform, lengths)
        assert counts.tolist() == expected_counts.tolist()
        found = torch.from_numpy(features)[:, : expected.shape[1]]
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    names = ["features", "feature_lengths"]
    out_of_range(
        lambda waveform, lengths: [
            torch.from_numpy(out)
            for out in session.run(names, {"waveform": waveform.numpy(), "lengths": lengths.numpy()})
        ]
    )


SHORT = {"win_length": 400, "hop_length": 160, "num_mels": 40}


@pytest.mark.parametrize("settings", [{}, {"n_fft": 400, **SHORT}, {"n_fft": 405, **SHORT}])
def test_spectrogram_by_matrix_product(settings):
    log_mel = LogMel(mean=-40, std=13, floor_db=-60, **settings)
    lengths = torch.tensor([16000, 9001, 1, 2, 700])
    waveform = torch.randn(5, 16000) * torch.tensor([1.0, 1e-4, 1.0, 0.3, 1e-6])[:, None]
    expected, counts = log_mel(waveform, lengths)
    begin = torch.zeros(5, dtype=torch.int64)
    found = ExportableLogMel(log_mel)(waveform, torch.arange(5), begin, lengths, expected.shape[1])
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(found[row, :count], expected[row, :count], atol=2e-6, rtol=0)


def test_a_wrong_graph_is_not_accepted(case, tmp_path):
    config, encoder, _ = case
    if "tiny" not in config.recipe:
        pytest.skip("one of each kind suffices")

    def wrong(change):
        graph = exportable(encoder)
        return lambda waveform, lengths: change(*graph(waveform, lengths))

    assert largest_error(encoder, wrong(lambda f, n: (1.001 * f, n))) > 1e-3
    for change, message in (
        (lambda f, n: (f, n + 1), "frames"),
        (lambda f, n: (f[:, 1:], n), "frames"),
        (lambda f, n: (f + 1, n), "zero behind"),
        (lambda f, n: (f / 0, n), "finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            largest_error(encoder, wrong(change))
    other = torch.export.export(Other(), (torch.zeros(2, 9), torch.ones(2, dtype=torch.int64)))
    (tmp_path / "wrong.pt2").write_text("what was there")
    with pytest.raises(ConfigError, match=r"wrong\.pt2: not written, it fails its check"):
        write_torch_export(tmp_path / "wrong.pt2", other, encoder, config)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("wrong.pt2", "what was there")]


class Other(torch.nn.Module):
    def forward(self, waveform, lengths):
        return 2 * waveform[..., None], lengths


def test_command(case, tmp_path, capsys, monkeypatch):
    config, encoder, program = case
    if config.recipe != "best_rq2_tiny":
        pytest.skip("one encoder suffices")
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    write_encoder_file(tmp_path / "encoder.safetensors", config, weights)
    arguments = [str(tmp_path / "encoder.safetensors")]
    monkeypatch.setattr(export, "trace", lambda _: program)  # the graph of the same weights
    assert export.main([*arguments, "--torch-export", str(tmp_path / "new" / "a.pt2")]) == 0
    told = capsys.readouterr()
    assert "a.pt2: checked by torch.export.load" in told.out
    assert [line.split()[0] for line in told.err.splitlines() if line.endswith(" ...")] == ["tracing", "writing"]
    monkeypatch.delattr(export, "trace")  # what follows is refused before the graph is made
    for option, name in (("--onnx", "a.pt2"), ("--torch-export", "a.onnx")):
        assert export.main([*arguments, option, str(tmp_path / name)]) == 2
        assert "expected a file name ending in" in capsys.readouterr().err
    assert export.main([*arguments, "--onnx", str(tmp_path / "l\udce4t.onnx")]) == 2
    assert r"l\xe4t.onnx: expected a name in UTF-8" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert export.main([*arguments, "--onnx", str(tmp_path / "a.onnx")]) == 2
    assert "pip install 'bestrq2[onnx]'" in capsys.readouterr().err


def test_what_cannot_become_a_graph_is_told_what_can(case):
    _, encoder, _ = case
    with pytest.raises(BestRQError, match=r"torch\.jit\.script cannot compile an encoder: .*graphs\.trace"):
        torch.jit.script(torch.nn.Sequential(encoder))
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"no single graph can follow: compile without fullgraph"):
        compiled(torch.zeros(1, 1600))


def test_description_is_text(case):
    config, encoder, _ = case
    values = describe(encoder, config)
    assert all(isinstance(value, str) for value in values.values())
    assert values["output_dim"] == "32"


def test_a_full_disk_is_an_error(tmp_path, limited_files):
    """torch's writer would end the process: its destructor raises."""
    config = load_config("best_rq2_tiny", SMALL)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    with limited_files(1000), pytest.raises(OSError, match=r"File too large: '.*a\.pt2'") as caught:
        write_torch_export(tmp_path / "new" / "a.pt2", program, build_encoder(config.model), config)
    assert caught.value.filename == str(tmp_path / "new" / "a.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_onnx_file_that_does_not_fit(tmp_path, limited_files):
    pytest.importorskip("onnxscript")
    config = load_config("best_rq2_tiny", SMALL)
    encoder = build_encoder(config.model)
    program = torch.export.export(Other(), (torch.zeros(2, 9), torch.ones(2, dtype=torch.int64)))
    (tmp_path / "a.onnx").write_text("what was there")
    with limited_files(1000), pytest.raises(OSError, match=r"File too large") as caught:
        write_onnx(tmp_path / "a.onnx", program, encoder, config)
    assert caught.value.filename == str(tmp_path / "a.onnx")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.onnx", "what was there")]
