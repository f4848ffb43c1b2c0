"""Time the tiles that the machine code suggests, one kernel after the other; ``tuned.json`` after each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from bestrq2.kernels import tuning

from benchmarks import tune
from benchmarks.gpu.plan import Request, read_request
from benchmarks.measure import Budget

# The most valuable first: what the reference workloads launch.
KERNELS = {
    "chunked_attention": ("forward/64", "backward_query/64", "backward_key/64", "band/64", "table_gradient/64"),
    "short_attention": ("forward/64/64", "backward/64/64", "forward/64/128", "backward/64/128"),
    "quantize": ("quantize/16", "quantize/16/few"),
    "masked_cross_entropy": (
        *("chunk", "softmax_gradient/whole", "logits/16", "hidden_gradient/16", "weight_gradient/16", "loss/16"),
    ),
}
TINY = {
    "quantize": {
        "quantize/16/few": [
            {"BM": rows, "BN": 64, "BK": 16, "PEEL": 0, "num_warps": 4, "num_stages": 2} for rows in (16, 32)
        ]
    }
}


def main(request: Request) -> int:
    if request.device == "cuda":
        device, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    else:
        device, architecture = "rehearsal", 90
    found: dict[str, Any] = {"device": device, "architecture": architecture, "tiles": {}, "trials": []}
    tried = 0
    for op, kernels in KERNELS.items():
        if op in request.broken:
            continue
        candidates = TINY.get(op, {}) if request.rehearse else tune.preselected(op, architecture)
        chosen = dict(tuning.merged(tuning.FOLDER, op, device, architecture))
        general = dict(chosen)
        for kernel in kernels:
            if kernel not in candidates or request.left() < 3:
                continue
            try:
                trials = tune.tune_kernel(
                    op,
                    kernel,
                    candidates[kernel],
                    chosen,
                    device=request.device,
                    shape="40x16->16x64" if request.rehearse else None,
                    seconds=request.left() - 1,
                    budget=Budget(repeats=1) if request.rehearse else Budget(seconds=0.1, at_least=5, at_most=30),
                )
            except RuntimeError as error:  # its process died before the first tile; other kernels may do better
                print(error, flush=True)
                continue
            best = tune.choose(trials, chosen.get(kernel))
            tried += len(trials)
            if best is not None:
                chosen[kernel] = best
            found["trials"] += [{"op": op, "kernel": kernel, **trial} for trial in trials]
            changed = {name: config for name, config in chosen.items() if config != general.get(name)}
            found["tiles"][op] = changed
            (request.out / "tuned.json").write_text(json.dumps(found, indent=1) + "\n")
            changes = [
                f"{name}: {_text(config)}" for tiles in found["tiles"].values() for name, config in tiles.items()
            ]
            request.note({"line": f"{tried} tiles tried; " + ("; ".join(changes) or "none is better")})
    return 0 if tried else 1


def _text(config: dict[str, Any]) -> str:
    return " ".join(str(value) for value in config.values())


if __name__ == "__main__":
    sys.exit(main(read_request(Path(sys.argv[1]))))
