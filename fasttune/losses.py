"""Distances between a prediction and its target, one number a sample, in float32."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import huber_loss, l1_loss, mse_loss

LossName = Literal["mse", "huber", "l1"]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error: (B, ...), (B, ...) -> (B,) float32."""
    return mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error: (B, ...), (B, ...) -> (B,) float32."""
    return l1_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)


def huber(prediction: Tensor, target: Tensor, *, delta: float) -> Tensor:
    """Twice the Huber loss: (B, ...), (B, ...) -> (B,) float32.

    With e the error, e^2 where |e| <= delta and delta (2 |e| - delta) beyond. The factor two makes
    it the squared error for small errors, so that a learning rate found with mse still fits.
    """
    loss = huber_loss(prediction.float(), target.float(), reduction="none", delta=delta)
    return 2 * loss.flatten(1).mean(1)


def distance(prediction: Tensor, target: Tensor, *, loss: LossName, huber_delta: float) -> Tensor:
    """The loss by its name in the config: (B, ...), (B, ...) -> (B,) float32."""
    if loss == "mse":
        return mse(prediction, target)
    if loss == "l1":
        return l1(prediction, target)
    return huber(prediction, target, delta=huber_delta)
