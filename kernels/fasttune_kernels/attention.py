"""Softmax attention, dispatched to a backend.

The layout is (B, L, H, D), which is how a Linear leaves its output: heads are split by a view and
merged by a view, and no backend is forced on the caller.

B batch, L query tokens, S key tokens, H heads, D head width.
"""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, per head.

    q is (B, L, H, D); k and v are (B, S, H, D); mask is (B, S) bool, True for the keys that are
    attended to, and every row of it needs one True. Returns (B, L, H, D) in q's dtype; scores and
    softmax are accumulated in float32 by the fused backends.
    """
    bias = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias
    )
    return out.transpose(1, 2)
