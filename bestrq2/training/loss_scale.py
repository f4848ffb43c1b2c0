"""Loss scaling for fp16, whose smallest gradients would vanish."""

from typing import Any

SMALLEST, LARGEST = 1.0, 2.0**24


class LossScale:
    """A power of two that multiplies the loss; halved after an overflow, doubled after ``patience`` good steps.

    The rule of torch.amp.GradScaler, decided from the gradient norm, which the step computes anyhow: it covers sharded
    gradients and costs no extra pass (Micikevicius et al. 2018, "Mixed precision training").
    """

    def __init__(self, enabled: bool, value: float = 2.0**16, patience: int = 2000) -> None:
        self.enabled, self.patience = enabled, patience
        self.value = value if enabled else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> bool:
        """Take note of a step. Returns whether a step that was not finite is explained by the scale alone."""
        if not self.enabled:
            return False
        if finite:
            self.good_steps += 1
            if self.good_steps == self.patience and self.value < LARGEST:
                self.value, self.good_steps = self.value * 2, 0
            return False
        explained = self.value > SMALLEST
        self.value, self.good_steps = max(SMALLEST, self.value / 2), 0
        return explained

    def state(self) -> dict[str, Any]:
        return {"enabled": self.enabled, "value": self.value, "good_steps": self.good_steps}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from :meth:`state`, unless it is that of another precision, which knows no scale."""
        state = state or {"enabled": False}
        if self.enabled and state.get("enabled", state.get("value") != 1.0):  # old checkpoints do not say it
            self.value, self.good_steps = state["value"], state["good_steps"]
