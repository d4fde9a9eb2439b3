"""The Triton kernels of flash attention; `flash_attention.py` launches them and says how they work.

All walk over blocks and compute softmax in base 2, which is one instruction: `scale` is log2(e) /
sqrt(E). Offsets of tokens and batches have 64 bits.
"""

from fasttune_kernels.jit import jit, tl
from fasttune_kernels.short_attention import load_rows


@jit
def _scores(q, k, mask_ptr, keys, num_keys, scale, HAS_MASK: tl.constexpr):
    """(queries, keys), in base 2; -inf for keys outside or masked."""
    kept = keys < num_keys
    if HAS_MASK:
        kept = tl.load(mask_ptr + keys, mask=kept, other=0) != 0
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return scores + tl.where(kept, 0.0, float("-inf"))[None, :]


@jit
def flash_attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,  # (B, S), contiguous
    out_ptr,
    lse_ptr,
    num_queries,
    num_keys,
    num_heads,
    scale,  # of the scores, in base 2
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    HAS_MASK: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    head = tl.program_id(1) % num_heads
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    columns = tl.arange(0, BLOCK_WIDTH)
    q_ptr += batch * q_stride_b + head * (q_stride_h * 8)
    k_ptr += batch * k_stride_b + head * (k_stride_h * 8)
    v_ptr += batch * v_stride_b + head * (v_stride_h * 8)
    mask_ptr += batch * num_keys
    q = load_rows(q_ptr, rows.to(tl.int64), num_queries, q_stride_l, BLOCK_WIDTH, WIDTH)
    out = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), tl.float32)
    top = tl.full((BLOCK_QUERIES,), -1e30, tl.float32)  # finite: a block may have no key at all
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)

    for start in range(0, num_keys, BLOCK_KEYS):
        keys = start + tl.arange(0, BLOCK_KEYS)
        k = load_rows(k_ptr, keys.to(tl.int64), num_keys, k_stride_s, BLOCK_WIDTH, WIDTH)
        scores = _scores(q, k, mask_ptr, keys, num_keys, scale, HAS_MASK)
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(v_ptr, keys.to(tl.int64), num_keys, v_stride_s, BLOCK_WIDTH, WIDTH)
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher

    inside = (rows < num_queries)[:, None] & (columns < WIDTH)[None, :]
    offsets = rows.to(tl.int64)[:, None] * (num_heads * WIDTH) + columns[None, :]
    out_ptr += (batch * num_queries * num_heads + head) * WIDTH
    tl.store(out_ptr + offsets, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    lse = (top + tl.log2(total)) * 0.6931471805599453  # ln 2
    lse_ptr += (batch * num_heads + head) * num_queries
    tl.store(lse_ptr + rows, lse, mask=rows < num_queries)


@jit
def flash_attention_dq(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,  # written: rowsum(dout * out)
    dq_ptr,
    num_queries,
    num_keys,
    num_heads,
    scale,  # of the scores, in base 2
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    HAS_MASK: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    head = tl.program_id(1) % num_heads
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    wide = rows.to(tl.int64)
    columns = tl.arange(0, BLOCK_WIDTH)
    q_ptr += batch * q_stride_b + head * (q_stride_h * 8)
    k_ptr += batch * k_stride_b + head * (k_stride_h * 8)
    v_ptr += batch * v_stride_b + head * (v_stride_h * 8)
    mask_ptr += batch * num_keys
    token = num_heads * WIDTH
    own = (batch * num_queries * num_heads + head) * WIDTH
    row_of = (batch * num_heads + head) * num_queries + rows
    q = load_rows(q_ptr, wide, num_queries, q_stride_l, BLOCK_WIDTH, WIDTH)
    dout = load_rows(dout_ptr + own, wide, num_queries, token, BLOCK_WIDTH, WIDTH)
    out = load_rows(out_ptr + own, wide, num_queries, token, BLOCK_WIDTH, WIDTH)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row_of, delta, mask=rows < num_queries)
    lse = tl.load(lse_ptr + row_of, mask=rows < num_queries, other=float("inf"))
    lse = lse * 1.4426950408889634  # log2 e
    dq = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), tl.float32)

    for start in range(0, num_keys, BLOCK_KEYS):
        keys = start + tl.arange(0, BLOCK_KEYS)
        k = load_rows(k_ptr, keys.to(tl.int64), num_keys, k_stride_s, BLOCK_WIDTH, WIDTH)
        v = load_rows(v_ptr, keys.to(tl.int64), num_keys, v_stride_s, BLOCK_WIDTH, WIDTH)
        p = tl.exp2(_scores(q, k, mask_ptr, keys, num_keys, scale, HAS_MASK) - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq += tl.dot(ds, k, input_precision="ieee")

    inside = (rows < num_queries)[:, None] & (columns < WIDTH)[None, :]
    offsets = own + wide[:, None] * token + columns[None, :]
    dq *= scale * 0.6931471805599453  # ln 2
    tl.store(dq_ptr + offsets, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@jit
def flash_attention_dkdv(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,  # (C, B, S, H, E)
    dv_ptr,
    num_queries,
    num_keys,
    num_heads,
    batch_size,
    scale,  # of the scores, in base 2
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    queries_per_program,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    chunk = tl.program_id(2)
    head = tl.program_id(1) % num_heads
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    keys = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    columns = tl.arange(0, BLOCK_WIDTH)
    q_ptr += batch * q_stride_b + head * (q_stride_h * 8)
    k_ptr += batch * k_stride_b + head * (k_stride_h * 8)
    v_ptr += batch * v_stride_b + head * (v_stride_h * 8)
    token = num_heads * WIDTH
    dout_ptr += (batch * num_queries * num_heads + head) * WIDTH
    lse_ptr += (batch * num_heads + head) * num_queries
    delta_ptr += (batch * num_heads + head) * num_queries
    k = load_rows(k_ptr, keys.to(tl.int64), num_keys, k_stride_s, BLOCK_WIDTH, WIDTH)
    v = load_rows(v_ptr, keys.to(tl.int64), num_keys, v_stride_s, BLOCK_WIDTH, WIDTH)
    kept = keys < num_keys
    if HAS_MASK:
        kept = tl.load(mask_ptr + batch * num_keys + keys, mask=kept, other=0) != 0
    bias = tl.where(kept, 0.0, float("-inf"))
    dk = tl.zeros((BLOCK_KEYS, BLOCK_WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_KEYS, BLOCK_WIDTH), tl.float32)

    first = chunk * queries_per_program
    for start in range(first, min(first + queries_per_program, num_queries), BLOCK_QUERIES):
        rows = start + tl.arange(0, BLOCK_QUERIES)
        wide = rows.to(tl.int64)
        q = load_rows(q_ptr, wide, num_queries, q_stride_l, BLOCK_WIDTH, WIDTH)
        dout = load_rows(dout_ptr, wide, num_queries, token, BLOCK_WIDTH, WIDTH)
        lse = tl.load(lse_ptr + rows, mask=rows < num_queries, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < num_queries, other=0.0)
        # transposed, (keys, queries): p and ds are left operands as they are
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale + bias[:, None]
        p = tl.exp2(scores - (lse * 1.4426950408889634)[None, :])  # log2 e
        if HAS_DV:
            dv += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")
        if HAS_DK:
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk += tl.dot(ds, q, input_precision="ieee")

    inside = (keys < num_keys)[:, None] & (columns < WIDTH)[None, :]
    share = (chunk * batch_size + batch) * num_keys * token + head * WIDTH
    offsets = share + keys.to(tl.int64)[:, None] * token + columns[None, :]
    if HAS_DK:
        dk *= scale * 0.6931471805599453  # ln 2
        tl.store(dk_ptr + offsets, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    if HAS_DV:
        tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)
