"""fasttune: a minimal, fast trainer for image diffusion models."""

__version__ = "0.1.0"
