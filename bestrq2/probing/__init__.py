"""Probes of frozen features, with baselines and bootstrap intervals.

from bestrq2.probing import ProbeTask, run_probe
values = run_probe(encoder, ProbeTask(manifest="clips.csv", label="instrument", group="recording"))
values["balanced_accuracy"], values["log_mel/balanced_accuracy"], values["random/balanced_accuracy"]
"""

from .in_memory import run_probe
from .task import ProbeTask, packaged_task

__all__ = ["ProbeTask", "packaged_task", "run_probe"]
