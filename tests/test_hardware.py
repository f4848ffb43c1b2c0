"""The rate of this machine that a run takes, and its notice of products without hardware."""

import logging

import pytest
import torch

from bestrq2 import hardware
from bestrq2.config import Config
from bestrq2.runs.folder import RunFolder
from bestrq2.training.describe import describe_run
from bestrq2.training.distributed import Ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(("in_hardware", "measured"), [(False, "float32"), (True, "bfloat16")])
def test_utilisation_is_never_measured_against_imitated_products(in_hardware, measured, monkeypatch):
    """Products of bf16 in software run at a hundredth of the rate of fp32: utilisation of 442 % was seen."""
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda device: in_hardware)
    monkeypatch.setattr(hardware, "_peak_flops", lambda device, dtype, threads: (1.0, str(dtype or torch.float32)))
    assert hardware.peak_flops(CPU, torch.bfloat16)[1] == f"torch.{measured}"
    assert hardware.peak_flops(CPU, None)[1] == "torch.float32"


def test_measured_rate():
    rate, source = hardware.peak_flops(CPU, None)
    assert rate > 1e8
    assert source == "measured float32 matrix product"


@pytest.mark.parametrize("in_hardware", [False, True])
def test_slow_precision_is_told(in_hardware, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(hardware, "has_fast_bf16", lambda device: in_hardware)
    run = RunFolder.create(tmp_path, "run", Config())
    with caplog.at_level(logging.INFO):
        describe_run(Config(), "Model", run, Ranks(), CPU, torch.bfloat16, (1e12, "not measured"))
    assert ("products in bfloat16 have no hardware here: fp32 is faster" in caplog.text) is not in_hardware
