"""What needs a GPU: kernels, training steps and contenders, in one run."""
