"""The whole training step: front end, codes, encoder, predictor, head and loss, backward, optimizer.

Shape labels: ``<model>-<clips>x<seconds>s`` with the models of :data:`MODELS`. Ours is what ``Trainer`` does in a step;
the others are the published way written out in plain PyTorch (``benchmarks/plain_step.py``), of the same sizes, with
weights of their own. ``fwd_ms`` is the whole step; ``pct_of_limit`` is the share of the machine's best rate of matrix
products (MFU): model FLOPs, backward counted as twice forward, over the rate that ``machine.py`` measures in the same
run. The note has the audio of a step and the share of
every stage, from a pass apart from the timed ones.

What is checked is the loss of the first step, which has to be that of a guess, ``log(codes)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Case, Provider, Results, Work, seeded
from benchmarks.ops.step_stages import DescribedCall
from benchmarks.plain_conformer import OneStage
from benchmarks.plain_step import Sizes, TwoStep

OP = "step"
BASELINE = "published, eager"

_STATISTICS = ["model.front_end.mean=-30", "model.front_end.std=15"]  # of the white noise that is trained on
_SMALL = [f"model.{part}.{key}" for part in ("encoder", "predictor") for key in ("width=192", "heads=3", "hidden=512")]
MODELS = {
    "tiny": ("best_rq2_tiny", _STATISTICS),
    "small": ("best_rq2_1_base", [*_STATISTICS, *_SMALL, "model.encoder.depth=6", "model.predictor.depth=2"]),
    "base": ("best_rq2_base", ["model.masking.ratio=[0.5,0.5]"]),
    "2.1base": ("best_rq2_1_base", _STATISTICS),
    "conformer": ("best_rq_conformer_base", _STATISTICS),
}
SHAPES = {
    "cpu": ("tiny-16x1.8s", "small-32x4s", "base-8x10s", "2.1base-8x10s", "conformer-4x8s"),
    "cuda": ("small-256x10s", "base-256x10s", "2.1base-256x10s", "conformer-64x16s"),
}
QUICK_SHAPES = ("tiny-16x1.8s",)
DTYPES = {"cpu": ("bfloat16", "float32"), "cuda": ("bfloat16", "float32")}


def make_case(shape: str, dtype: torch.dtype, device: torch.device) -> Case:
    """White noise ``(B, S)`` for a model that every provider builds itself."""
    match = re.fullmatch(rf"({'|'.join(map(re.escape, MODELS))})-(\d+)x([\d.]+)s", shape)
    if not match:
        raise ValueError(f"step: a shape reads like {SHAPES['cpu'][1]}, a model of {', '.join(MODELS)}; got {shape!r}")
    clips, seconds = int(match[2]), float(match[3])
    config = _config(match[1], seconds)
    samples = round(seconds * config.model.front_end.sampling_rate)
    model = _model(config)
    tokens = torch.full((clips,), model.encoder.num_tokens(samples))
    plan = model.masking.plan(tokens, 0, torch.arange(clips), torch.device("cpu"))
    state = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Case(
        op=OP,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs={
            "waveform": seeded(clips, samples, dtype=torch.float32, device=device, scale=0.1),
            "config": config,
            "seconds": seconds,
        },
        # Weights, gradients and both moments are read, weights and moments written.
        work=Work(flops=model.flops(plan), bytes=28.0 * state, arithmetic=str(dtype).removeprefix("torch.")),
        gold=lambda case: {"out": torch.tensor(math.log(case.inputs["config"].model.targets.codebook_size))},
        check=_first_loss,
        tolerance=0.1,
    )


def _config(name: str, seconds: float) -> Any:
    from bestrq2.config import load_config

    recipe, overrides = MODELS[name]
    return load_config(recipe, [*overrides, f"data.crop_seconds={seconds}"])


def _model(config: Any) -> Any:
    from bestrq2.models.build import build_model

    torch.manual_seed(config.train.seed)
    return build_model(config)


def _first_loss(results: Results, gold: Results) -> tuple[float, str]:
    loss, guess = float(results["out"]), float(gold["out"])
    return abs(loss - guess) / guess, f"first loss {loss:.3f}, of a guess {guess:.3f}"


def _autocast(case: Case) -> Any:
    return torch.autocast(case.device.type, torch.bfloat16, enabled=case.dtype == torch.bfloat16)


def _ours(compiled: bool) -> Callable[[Case], Callable[[], Tensor]]:
    def build(case: Case) -> Callable[[], Tensor]:
        from bestrq2.layers.code_usage import CodeUsage
        from bestrq2.training.compilation import compile_blocks
        from bestrq2.training.optimizer import (
            accept_bf16_gradients,
            clip_gradients,
            make_optimizer,
            set_schedule,
        )

        config, waveform = case.inputs["config"], case.inputs["waveform"]
        model = _model(config).to(case.device)
        if compiled:
            compile_blocks(model)
        optimizer = make_optimizer(model, config.optimizer)
        autocast = torch.bfloat16 if case.dtype == torch.bfloat16 else None
        accept_bf16_gradients(model, config, autocast, ranks=1)
        usage = CodeUsage(model.quantizer.num_codebooks, model.quantizer.codebook_size).to(case.device)
        lengths, index = torch.full((len(waveform),), waveform.shape[1]), torch.arange(len(waveform))
        done = 0

        def call(mark: Callable[[str], None] = lambda stage: None) -> Tensor:
            nonlocal done
            set_schedule(optimizer, done, config.train.steps, config.optimizer)
            model.num_predicted(lengths, done)
            with _autocast(case):
                output = model(waveform, lengths, step=done, index=index)
            model.flops(output.plan)
            mark("forward")
            output.loss.backward()
            mark("backward")
            usage.update(output.codes, output.plan.predicted_valid())
            clip_gradients(model, config.optimizer.max_grad_norm, optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = output.loss.detach().cpu()
            mark("optimizer")
            done += 1
            return loss

        stages = {"front end": model.encoder.front_end, "codes": model.quantizer, "head and loss": model.head}
        stages["encoder"] = model.encoder.encoder
        if hasattr(model, "predictor"):
            stages["predictor"] = model.predictor
        return DescribedCall(case, call, stages, "masks and embedding")

    return build


def _plain(compiled: bool = False, fused_attention: bool = False) -> Callable[[Case], Callable[[], Tensor]]:
    def build(case: Case) -> Callable[[], Tensor]:
        config, waveform = case.inputs["config"], case.inputs["waveform"]
        sizes = plain_sizes(config, case.inputs["seconds"], fused_attention)
        torch.manual_seed(0)
        model = (OneStage if sizes.conformer else TwoStep)(sizes).to(case.device)
        run = torch.compile(model) if compiled else model
        betas = (config.optimizer.betas[0], config.optimizer.betas[1])
        optimizer = torch.optim.AdamW(
            model.parameters(), config.optimizer.learning_rate, betas, weight_decay=config.optimizer.weight_decay
        )

        def call(mark: Callable[[str], None] = lambda stage: None) -> Tensor:
            with _autocast(case):
                loss = run(waveform)
            mark("forward")
            loss.backward()
            mark("backward")
            if config.optimizer.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss = loss.detach().cpu()
            mark("optimizer")
            return loss

        if compiled:
            return DescribedCall(case, call, {}, "forward")
        stages: dict[str, torch.nn.Module] = {"front end": model.spectrogram, "codes": model.quantizer}
        if isinstance(model, OneStage):
            return DescribedCall(case, call, stages, "encoder, head and loss")
        stages |= {"encoder": model.encoder, "predictor": model.predictor}
        return DescribedCall(case, call, stages, "head and loss")

    return build


def plain_sizes(config: Any, seconds: float, fused_attention: bool = False) -> Sizes:
    """The sizes of a configuration for the plain models."""
    encoder, predictor, front, targets = (
        config.model.encoder,
        config.model.predictor,
        config.model.front_end,
        config.model.targets,
    )
    conformer = encoder.kind == "conformer"
    normalized = front.normalize == "global"
    two_step = config.model.name == "best_rq2"
    return Sizes(
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads,
        hidden=encoder.hidden,
        predictor_width=predictor.width if two_step else 0,
        predictor_depth=predictor.depth if two_step else 0,
        predictor_heads=predictor.heads if two_step else 0,
        predictor_hidden=predictor.hidden if two_step else 0,
        modern=encoder.norm == "rms_norm",
        conformer=conformer,
        n_fft=front.n_fft,
        win_length=front.win_length,
        hop_length=front.hop_length,
        num_mels=front.num_mels,
        patch_height=front.num_mels if conformer else encoder.patch_height,
        patch_width=encoder.frames_per_token,
        codes=targets.codebook_size,
        ratio=config.model.masking.ratio[0],
        seconds=seconds,
        drop_path=encoder.drop_path,
        dropout=encoder.dropout,
        fused_attention=fused_attention,
        standardise=targets.normalize == "patch",
        mean=front.mean if normalized else 0.0,
        std=front.std if normalized else 1.0,
        sampling_rate=front.sampling_rate,
    )


PROVIDERS = [
    Provider("bestrq2", _ours(compiled=False)),
    Provider("ours, blocks compiled", _ours(compiled=True), note="train.compile=true"),
    Provider(BASELINE, _plain(), note="stored scores, torch.optim.AdamW by default"),
    Provider("published, SDPA", _plain(fused_attention=True), note="scaled_dot_product_attention"),
    Provider("published, torch.compile", _plain(compiled=True), note="the whole forward pass compiled"),
]
