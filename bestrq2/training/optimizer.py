"""AdamW with warm-up and cosine decay, and its state as plain named tensors."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from bestrq2.config import Config, OptimizerConfig
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.layers.cross_attention import CrossBlock
from bestrq2.layers.transformer import Block
from bestrq2.ops.common import native
from bestrq2.ops.common.dispatch import forced_backend
from bestrq2.training.distributed import placed_like, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


def _steps(share: float, steps: int) -> int:
    """Whole steps of a share as it is written: of 100 and 0.29 they are 29, where floats give 28.999999999999996."""
    return math.floor(Fraction(str(share)) * steps)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of update ``step`` (0-based): linear warm-up to the peak, then by ``config.schedule`` to ``final_ratio`` of
    it: "cosine", "linear", "constant" (stays at the peak), or "stable" (at the peak until the last ``cooldown`` share
    of all steps, then linear: warm-up, stable, decay)."""
    warmup = _steps(config.warmup, steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    start = warmup
    if config.schedule == "stable":
        start = max(warmup, steps - _steps(config.cooldown, steps))
    progress = min(1.0, max(0, step - start) / max(1, steps - 1 - start))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}.get(config.schedule, 1 - progress)
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * left)


def weight_decay(step: int, steps: int, config: OptimizerConfig) -> float:
    """Weight decay of update ``step``: constant, or by a cosine from ``weight_decay`` to ``final_weight_decay``."""
    if config.final_weight_decay is None:
        return config.weight_decay
    left = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps - 1))))
    return config.final_weight_decay + (config.weight_decay - config.final_weight_decay) * left


def set_schedule(optimizer: torch.optim.Optimizer, step: int, steps: int, config: OptimizerConfig) -> float:
    """Give every parameter group its learning rate and weight decay for update ``step``; returns the rate."""
    rate, decay = learning_rate(step, steps, config), weight_decay(step, steps, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decayed"] else 0.0
    return rate


def is_plain(tensor: Tensor | None, *dtypes: torch.dtype) -> bool:
    """Return True for a contiguous tensor on the CPU of one of ``dtypes`` that the C++ loops take."""
    return (
        tensor is not None
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in dtypes
        and tensor.is_contiguous()
        and forced_backend() in (None, "cpu")
        and native.extension_obstacle() is None
    )


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose update is one loop over all tensors on CPUs (csrc/optimizer), where it also takes
    bf16 gradients of float32 parameters.

    Attributes:
        gradient_factor: the next update multiplies the gradients by it, as it reads them.
    """

    gradient_factor = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        factor, self.gradient_factor = self.gradient_factor, 1.0
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if closure is not None or not all(
            is_plain(p, torch.float32) and is_plain(p.grad, torch.float32, torch.bfloat16) for p in updated
        ):
            if factor != 1.0:
                torch._foreach_mul_([p.grad for p in updated], factor)
            return super().step(closure)
        for group in self.param_groups:
            tensors, numbers = [], []
            low, high = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                count = float(state["step"])
                addresses = [x.data_ptr() for x in (p, state["exp_avg"], state["exp_avg_sq"], p.grad)]
                tensors.append((*addresses, p.grad.dtype == torch.bfloat16, p.numel()))
                numbers.append(
                    (1 - group["lr"] * group["weight_decay"], group["lr"] / (1 - low**count), (1 - high**count) ** -0.5)
                )
            native.extension().adamw(tensors, numbers, low, high, group["eps"], factor, torch.get_num_threads())
        return None


def accept_bf16_gradients(model: nn.Module, config: Config, autocast: torch.dtype | None, ranks: int) -> bool:
    """Let the weights of Transformer blocks have the bf16 gradients that autocast computes, on a CPU.

    They are not copied to float32 then; their values are the same. Not done where it would change a result: sums of
    gradients (accumulation, several ranks) would be rounded to bf16. Clipping is left to the update, see
    :func:`clip_gradients`.

    Returns:
        whether it was done.
    """
    summed = ranks > 1 or config.train.accumulate > 1
    # torch before 2.10 has one dtype for a tensor and its gradient.
    if autocast != torch.bfloat16 or summed or not hasattr(Tensor, "grad_dtype"):
        return False
    blocks = (module for module in model.modules() if isinstance(module, (Block, CrossBlock)))
    for layer in (layer for block in blocks for layer in block.modules()):
        if type(layer) is nn.Linear and layer.weight.requires_grad and is_plain(layer.weight, torch.float32):
            layer.weight.grad_dtype = torch.bfloat16
    return True


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over all trainable parameters; ``decay_all=False`` spares norms, biases and tokens the decay: whatever is a
    vector, and biases of several codebooks or heads, which are matrices.

    Raises:
        ConfigError: for betas, epsilon or decay that AdamW cannot take.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_weight = sum(size > 1 for size in parameter.shape) >= 2 and not name.endswith("bias")
            (decayed if config.decay_all or is_weight else plain).append(parameter)
    groups = [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False}]
    low, high = config.betas
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    try:
        return AdamW(
            [g for g in groups if g["params"]], config.learning_rate, (low, high), config.epsilon, fused=fused or None
        )
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error


def clip_gradients(
    model: nn.Module, most: float | None, loss_scale: float = 1.0, optimizer: torch.optim.Optimizer | None = None
) -> Tensor:
    """Divide the gradients by ``loss_scale``, then rescale them to a norm of ``most`` at most (None: as they are).

    Args:
        optimizer: rescales them in its next update instead, where it is an :class:`AdamW` and they are on a CPU. That
            costs no pass over them, and does not round bf16 gradients once more.

    Returns:
        the norm before rescaling, 0-d float32 on the device (a collective call when sharded).
    """
    if isinstance(optimizer, AdamW):
        optimizer.gradient_factor = 1.0  # an update that was skipped left its own
    parameters = [p for p in model.parameters() if p.grad is not None]
    grads = [p.grad for p in parameters if p.grad is not None]
    if loss_scale != 1.0:
        torch._foreach_mul_(grads, 1.0 / loss_scale)
    if grads and all(is_plain(g, torch.float32, torch.bfloat16) for g in grads):
        tensors = [(g.data_ptr(), g.dtype == torch.bfloat16, g.numel()) for g in grads]
        norm = torch.tensor(native.extension().norm_of(tensors, torch.get_num_threads()), dtype=torch.float32)
        factor = 1.0 if most is None else float(most / (norm + 1e-6))  # that of torch's clip_grads_with_norm_
        if factor < 1:  # else nothing to do, or the norm is NaN
            if isinstance(optimizer, AdamW):
                optimizer.gradient_factor = factor
            else:
                torch._foreach_mul_(grads, factor)
        return norm
    norm = nn.utils.get_total_norm(grads) if most is None else nn.utils.clip_grad_norm_(parameters, most)
    return whole(norm).float()


def step_if_finite(optimizer: Any, values: Tensor) -> None:
    """Hand an update to the device, which leaves it out where one of ``values`` is not finite, without a wait.

    ``optimizer``: a fused AdamW, whose kernel reads this flag.
    """
    optimizer.grad_scale, optimizer.found_inf = None, (~values.isfinite().all()).float()
    optimizer.step()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by parameter name, for a checkpoint (a collective call when sharded)."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = whole(torch.as_tensor(value))
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`.

    Raises:
        CheckpointError: if a parameter's moments are missing or of another shape.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if f"optimizer.step.{name}" not in tensors:
            continue  # never updated before the checkpoint was written
        count = tensors[f"optimizer.step.{name}"].clone()
        fused = optimizer.param_groups[0].get("fused")
        state = {"step": count.to(parameter.device) if fused else count}
        for key in MOMENTS:
            value = tensors.get(f"optimizer.{key}.{name}")
            if value is None or value.shape != parameter.shape:
                found = None if value is None else tuple(value.shape)
                raise CheckpointError(f"optimizer.{key}.{name}: expected {tuple(parameter.shape)}, found {found}")
            state[key] = placed_like(value, parameter)
        optimizer.state[parameter] = state
