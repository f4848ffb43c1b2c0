"""Models on a device without float64, such as an Apple GPU: the same codes, losses and features."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.utils.backend_registration")
TESTS = Path(__file__).resolve().parent.parent
SCRIPT = """
import contextlib
import io
import tempfile
from pathlib import Path

from device_stand_in import NAME, StandIn
import numpy as np
import torch
import bestrq2
from bestrq2 import embed, train
from bestrq2.config import load_config
from bestrq2.hardware import choose_device
from bestrq2.train import device_of
from bestrq2.training.distributed import Ranks
from model_kinds import features_of, model_of, ragged, relative_error

def refused(call):
    try:
        call()
    except (TypeError, RuntimeError):
        return True
    return False

def one_step(model, waveform, lengths):
    torch.manual_seed(5)
    output = model.train()(waveform, lengths, step=3)
    output.objective.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return output.codes.cpu(), output.loss.detach().cpu()

with StandIn():
    # The stand-in refuses what it stands for.
    here = torch.ones(4, device=NAME)
    assert here.device.type == NAME
    assert all(map(refused, (here.double, lambda: torch.ones(4).double().to(NAME), lambda: here + torch.ones(4))))
    waveform, lengths = ragged()
    there = waveform.to(NAME)
    for kind in ("strips", "options", "conformer", "streaming"):
        features = features_of(model_of(kind), waveform, lengths)
        codes, loss = one_step(model_of(kind), waveform, lengths)
        model = model_of(kind).to(NAME)
        assert {tensor.device.type for tensor in model.parameters()} == {NAME}
        found = features_of(model, there, lengths)
        assert found.device.type == NAME
        assert relative_error(found.cpu(), features) < 1e-5, kind
        found_codes, found_loss = one_step(model, there, lengths)
        assert torch.equal(found_codes, codes), kind
        torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=0)
        assert torch.equal(model.to("cpu").encoder.front_end.window, model_of(kind).encoder.front_end.window)
        torch.set_default_device(f"{NAME}:0")
        built = model_of(kind)
        torch.set_default_device(None)
        assert {parameter.device.type for parameter in built.parameters()} == {NAME}
        assert torch.equal(one_step(built, there, lengths)[0], codes), kind
    encoder = model_of("streaming").to(NAME).eval().encoder
    with torch.no_grad():
        state = encoder.start_stream(3)
        parts = [encoder.stream(piece, state)[0].cpu() for piece in there.split(7001, dim=1)]
        parts.append(encoder.stream(there[:, :0], state, final=True)[0].cpu())
    whole = features_of(model_of("streaming"), waveform, None)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    # The commands choose the device by themselves.
    with tempfile.TemporaryDirectory() as runs:
        data = str(Path(bestrq2.__file__).parent / "data" / "tiny")
        small = [f"model.{part}.{size}" for part in ("encoder", "predictor") for size in ("width=32", "depth=1")]
        small += ["train.steps=2", "train.batch_size=3", "train.pictures_every=0", "data.workers=0"]
        small += [f"validation.source={data}", "validation.every=2", "validation.clips=3"]
        recipe = ["--config", "best_rq2_tiny", "--data", data, *small]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert train.main(["--runs", runs, "--name", "run", *recipe]) == 0
            assert embed.main([f"{runs}/run", f"{data}/env_14_level-crossing.ogg", "--out", f"{runs}/features"]) == 0
        assert f"Device: {NAME}" in said.getvalue()
        assert np.isfinite(np.load(f"{runs}/features/clips.npy")).all()
assert choose_device("auto").type == NAME
assert device_of(load_config("best_rq2_tiny"), Ranks(0, 2, 0)).type == "cpu"
print("all the same")
"""


def test_a_device_without_float64():
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=TESTS, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "all the same", run.stderr[-3000:]
