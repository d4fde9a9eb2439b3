"""Distances between a prediction and its target, one number a sample, in float32."""

from torch import Tensor

from fasttune_kernels.diffusion_loss import Kind, diffusion_loss

LossName = Kind
"""The losses by their names in the config; `diffusion_loss` has their definitions."""


def distance(prediction: Tensor, target: Tensor, *, loss: LossName, huber_delta: float) -> Tensor:
    """The loss by its name: (B, ...), (B, ...) -> (B,) float32, with a gradient to the prediction.

    The Huber loss is twice torch's: the squared error for small errors, so that a learning rate found
    with mse still fits.
    """
    return diffusion_loss(prediction, target, None, kind=loss, huber_delta=huber_delta)
