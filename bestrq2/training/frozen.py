"""Training a head on a frozen encoder: embeddings are cached once, then only the head is trained."""

import json
import logging
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from bestrq2.config import Config, ConfigError, config_to_dict
from bestrq2.data import CropDataset, SampleOrder
from bestrq2.data.fingerprint import data_fingerprint
from bestrq2.hardware import choose_device, describe_device
from bestrq2.hashing import mix
from bestrq2.interchange import open_encoder
from bestrq2.layers.code_usage import CodeUsage
from bestrq2.models.build import build_masking, load_weights
from bestrq2.models.frozen import FrozenHead
from bestrq2.runs.checkpoint import Checkpoint, save_checkpoint
from bestrq2.runs.folder import MetricsLog, RunFolder
from bestrq2.runs.report import save_report

from .embedding_cache import EmbeddingCache, build_cache, module_digest
from .interrupt import StopSignal
from .optimizer import make_optimizer, optimizer_tensors, restore_optimizer, set_schedule

logger = logging.getLogger(__name__)


def build_head(config: Config, input_dim: int) -> FrozenHead:
    """The head that a configuration describes; its weights are a function of ``train.seed``."""
    torch.manual_seed(mix(config.train.seed, 1) >> 1)
    targets = config.model.targets
    masking = build_masking(config.model.masking, config.train.seed)
    return FrozenHead(
        input_dim,
        config.model.predictor,
        targets.codebook_size,
        targets.num_codebooks,
        None if config.frozen.every_frame else masking,
    )


def open_frozen(config: Config) -> nn.Module:
    """The encoder that ``--frozen-encoder`` names; see :func:`bestrq2.interchange.open_encoder`."""
    frozen = config.frozen
    return open_encoder(frozen.source or "", trust_remote_code=frozen.trust_remote_code)  # type: ignore[return-value]


def collate(cache: EmbeddingCache, index: list[int], order: SampleOrder) -> tuple[torch.Tensor, ...]:
    """Padded ``context (B, T, D)``, ``codes (B, T, G)`` and ``lengths (B,)`` of these places in the training order."""
    windows = [cache[order.item(i)[1]] for i in index]
    context = nn.utils.rnn.pad_sequence([window.context for window in windows], batch_first=True)
    codes = nn.utils.rnn.pad_sequence([window.codes for window in windows], batch_first=True)
    return context, codes, torch.tensor([len(window.codes) for window in windows])


def train_head(config: Config, dataset: CropDataset, run: RunFolder, checkpoint: Checkpoint | None) -> int:
    """Cache, train, and show that the encoder is what it was. Returns the exit code, as :func:`bestrq2.train.train`."""
    source, settings = config.frozen.source or "", config.train
    device = choose_device(settings.device)
    cache_root = Path(config.frozen.cache) if config.frozen.cache else run.path / "embeddings"
    cache = build_cache(cache_root, config, dataset.files, open_frozen(config), device)
    for skip in cache.skips:
        logger.warning(f"skipped {skip}")
    model = build_head(config, cache.width).to(device).train()
    optimizer = make_optimizer(model, config.optimizer)
    usage = CodeUsage(config.model.targets.num_codebooks, config.model.targets.codebook_size).to(device)
    done, elapsed = 0, 0.0
    if checkpoint is not None:
        if checkpoint.extra.get("encoder_sha256") != cache.digest:
            raise ConfigError(
                f"frozen.source: {source} is not the encoder that this run began with (its weights differ)"
            )
        tensors = checkpoint.training_state()
        load_weights(model, checkpoint.weights(), checkpoint.folder)
        restore_optimizer(model, optimizer, tensors)
        usage.load_state_dict({name: tensors[f"usage.{name}"] for name in usage.state_dict()})
        done, elapsed = checkpoint.step, checkpoint.extra["elapsed_seconds"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        f"Frozen encoder: {source}, sha256 {cache.digest[:16]}; {len(cache)} windows; head {trained:,} parameters"
    )
    run.write_versions(describe_device(device))
    log = MetricsLog(run.path, done)
    order = SampleOrder(len(cache), settings.seed)
    started = time.perf_counter()
    front = config.model.front_end
    column_seconds = config.model.encoder.patch_width * front.hop_length / front.sampling_rate
    audio_seconds = 0.0

    def save() -> None:
        training = optimizer_tensors(model, optimizer)
        training.update({f"usage.{name}": tensor for name, tensor in usage.state_dict().items()})
        extra = {
            "elapsed_seconds": elapsed + time.perf_counter() - started,
            "data": data_fingerprint(dataset),
            "encoder_sha256": cache.digest,
        }
        parent, values = run.checkpoints, config_to_dict(config)
        save_checkpoint(parent, done, model.state_dict(), training, values, extra, settings.keep_last)

    with (
        tqdm(total=settings.steps, initial=done, unit="step", mininterval=1, dynamic_ncols=True) as bar,
        StopSignal() as stop,
    ):
        while done < settings.steps and not stop.requested:
            torch.manual_seed(mix(settings.seed, 2, done) >> 1)
            rate = set_schedule(optimizer, done, settings.steps, config.optimizer)
            index = list(range(done * settings.batch_size, (done + 1) * settings.batch_size))
            context, codes, lengths = collate(cache, index, order)
            output = model(context.to(device), codes.to(device), lengths, done, torch.tensor(index))
            output.loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm or float("inf"))
            loss, accuracy, grad_norm = torch.stack((output.loss.detach(), output.accuracy, norm)).tolist()
            if loss - loss == 0.0 and grad_norm - grad_norm == 0.0:
                optimizer.step()
            else:
                logger.warning(f"step {done + 1}: loss {loss}, gradient norm {grad_norm}: update skipped")
            optimizer.zero_grad(set_to_none=True)
            usage.update(output.codes, output.valid)
            done += 1
            bar.update()
            audio_seconds += column_seconds * int(lengths.sum())
            if done % settings.log_every == 0 or done == settings.steps:
                found = usage.metrics()
                row = {"step": done, "loss": loss, "accuracy": accuracy, **found, "grad_norm": grad_norm}
                seconds = time.perf_counter() - started
                row |= {"learning_rate": rate, "elapsed_seconds": elapsed + seconds}
                row["audio_seconds_per_second"] = audio_seconds / seconds
                log.write(row)
                bar.set_postfix_str(
                    f"loss {loss:.3f}, acc {accuracy:.3f} (unigram {found['unigram']:.3f})", refresh=False
                )
            if done % settings.save_every == 0 or done == settings.steps or stop.requested:
                save()
    log.close()
    if stop.requested:
        logger.info(f"Stopped by {stop.name} after step {done}; continue with --resume {run.path}")
        return stop.exit_code
    after = module_digest(open_frozen(config))
    if after != cache.digest:
        raise ConfigError(f"frozen.source: {source} changed on disk during the run (sha256 {after[:16]})")
    proof = {"source": source, "sha256_before": cache.digest, "sha256_after": after}
    (run.path / "frozen.json").write_text(json.dumps(proof, indent=1) + "\n")
    save_report(run.path, f"head on {Path(source).name}, {done} steps")
    logger.info(f"Done: {done} steps in {run.path}; the encoder is unchanged (sha256 {after[:16]})")
    return 0
