"""Operations of the trained networks, one file each, behind one public function each.

Networks call these and never a backend: which kernel runs is decided here, by device and shape.
"""

from fasttune_kernels.attention import attention

__all__ = ["attention"]
