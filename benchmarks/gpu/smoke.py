"""Small odd shapes of every operation and dtype against float64, and a few training steps. Its own process each."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Request, read_request
from benchmarks.processes import Running

ALL = ("float32", "bfloat16", "float16")
SHAPES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "quantize": (
        ("1000x80->16x1000x3", ALL),
        ("333x37->13x131", ALL),
        ("65536x64->16x1024", ("float32",)),  # the tiles of many rows
        ("300x40->64x257", ("float32",)),
    ),
    "masked_cross_entropy": (
        ("333x136->501", ALL),
        ("201of777x130->1030", ALL),
        ("3000x64->10000", ALL),  # rows that fit no block, several chunks
        ("257x64->300x3", ALL),
    ),
    "chunked_attention": (
        ("B2H2T333d64-c16l30r0", ALL),
        ("B1H2T200d72-c16l64r5", ALL),
        ("B2H1T130d64", ALL),
        ("B1H1T1d64-c16l16r0", ALL),  # one row
        ("B1H3T97d128-c7l10r3", ALL),
        ("B2H2T30d20-c8l8r0", ALL),
    ),
    "short_attention": (
        ("B3H2N64d64", ALL[1:]),
        ("B5H2N128d64-ragged", ALL[1:]),
        ("B4H2N47d72-ragged", ALL[1:]),
        ("B2H3N100d128", ALL[1:]),
    ),
}
TINY: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "quantize": (("33x16->16x64", ALL[:1]),),
    "masked_cross_entropy": (("9of13x16->33", ALL[:1]),),
    "chunked_attention": (("B1H1T20d16-c8l8r0", ("float32", "float16")),),
    "short_attention": (("B2H1N20d16-ragged", ("float16",)),),
}
MODELS = ("best_rq2_tiny", "best_rq2_conformer_tiny")
BACKENDS = ("bestrq2[triton]", "bestrq2[cuda]")
Check = dict[str, Any]


def main(request: Request) -> int:
    # A process for every shape: most of the time goes to compilations.
    parts = [f"{op}:{number}" for op, shapes in SHAPES.items() for number in range(len(shapes))]
    names = ["chunked_attention", "short_attention", MODELS[0]] if request.rehearse else [*parts, *MODELS]
    running = [
        (name, Running(command(request, name), request.work / f"smoke-{name}.log", environment_of(name)))
        for name in names
    ]
    while request.left() > 1.5 and any(process.process.poll() is None for _, process in running):
        time.sleep(0.1)
        _report(request, names)
    failed = []
    for name, process in running:
        ended = process.wait(0)
        if not ended.good:
            failed.append((name, ended.text))
    return _report(request, names, failed)


def command(request: Request, name: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.smoke", str(request.work / "smoke.request.json"), name]


def environment_of(name: str) -> dict[str, str]:
    """Of a rehearsal: operations run in Triton's interpreter, models would take minutes there."""
    return {key: value for key, value in os.environ.items() if name not in MODELS or key != "TRITON_INTERPRET"}


def _report(request: Request, names: list[str], failed: list[tuple[str, str]] | None = None) -> int:
    checks: list[Check] = []
    for name in names:
        path = request.work / f"smoke-{name}.jsonl"
        if path.exists():
            checks += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    for name, how in failed or ():
        checks.append(
            {"op": name.partition(":")[0], "what": name, "status": "died", "note": f"{how} after the checks above"}
        )
    bad = [check for check in checks if check["status"] not in ("ok", "skipped")]
    good = sum(check["status"] == "ok" for check in checks)
    broken = list(dict.fromkeys(check["op"] for check in bad))
    request.note({"checks": checks, "broken": broken, "line": f"{good} right, {len(bad)} not"})
    return 1 if bad else 0


def run_checks(request: Request, name: str, backends: tuple[str, ...] = BACKENDS) -> int:
    """Check an operation, one of its shapes (``operation:number``) or a model: lines of ``smoke-<name>.jsonl``."""
    bad = 0
    with (request.work / f"smoke-{name}.jsonl").open("w") as file:
        for check in _model(request, name) if name in MODELS else _operation(request, name, backends):
            print(json.dumps({"op": name.partition(":")[0], **check}), file=file, flush=True)
            print(check, flush=True)
            bad += check["status"] not in ("ok", "skipped")
    return 1 if bad else 0


def _operation(request: Request, op: str, backends: tuple[str, ...]) -> Iterator[Check]:
    import torch

    from benchmarks.common import Skip, evaluate, load_operation
    from benchmarks.memory import short_reason

    op, _, number = op.partition(":")
    module = load_operation(op)
    shapes = (TINY if request.rehearse else SHAPES)[op]
    for shape, dtypes in shapes[int(number) :][:1] if number else shapes:
        for dtype in dtypes:
            case = module.make_case(shape, getattr(torch, dtype), torch.device(request.device))
            for provider in (p for p in module.PROVIDERS if p.name in backends):
                check: Check = {"what": f"{op} {shape} {dtype} {provider.name}", "status": "ok", "note": ""}
                try:
                    error, remark = case.errors(evaluate(case, provider.prepare(case)))
                    check["note"] = f"error {error:.1e} {remark}"
                    if not error <= case.tolerance:
                        check["status"] = "wrong"
                except Skip as reason:
                    check |= {"status": "skipped", "note": str(reason)}
                except Exception as error:
                    check |= {"status": "failed", "note": short_reason(error)}
                yield check


def _model(request: Request, recipe: str) -> Iterator[Check]:
    """Three steps on the device; the loss of the first within 2 % of the CPU's, all finite and not the same."""
    import torch

    from bestrq2.config import load_config
    from bestrq2.models import build_model

    losses = []
    for device in (request.device, "cpu"):
        torch.manual_seed(0)
        config = load_config(recipe)
        model = build_model(config).to(device)
        samples = int(config.data.crop_seconds * config.model.front_end.sampling_rate)
        waveform = torch.randn(2, samples, generator=torch.Generator().manual_seed(1)).to(device)
        lengths = torch.tensor([samples, samples // 2])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for step in range(3 if device == request.device else 1):
            out = model(waveform, lengths, step=step, index=torch.arange(2))
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(out.loss.item())
        losses.append(found)
        if request.device == "cpu":
            break
    first, finite = losses[-1][0], all(loss == loss and abs(loss) < 1e4 for loss in losses[0])
    right = finite and abs(losses[0][0] - first) <= 0.02 * abs(first) and len(set(losses[0])) == 3
    yield {
        "what": f"{recipe}, three steps",
        "status": "ok" if right else "wrong",
        "note": f"losses {losses[0]}, on the CPU {first:.4f}",
    }


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.exit(main(read_request(Path(sys.argv[1]))))
    sys.exit(run_checks(read_request(Path(sys.argv[1])), sys.argv[2], tuple(sys.argv[3:]) or BACKENDS))
