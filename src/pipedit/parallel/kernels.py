"""Attention on one device: whole, or in parts whose results are merged exactly by their log-sum-exp. No communication.

Shape legend: B batch, n heads, Q query rows, K keys, D head width. Tensors may be strided views, such as
x[S, B, 3, n, D].permute(...); only the last dimension must be contiguous, so nothing is copied here.
"""

import torch
import torch.nn.functional as F

_FLASH_WIDEST_HEAD = 256


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[B, n, Q, D] from q [B, n, Q, D] and k, v [B, n, K, D]; scaled by 1 / sqrt(D). `mask` [B, 1, 1, K] bool, True
    where the key counts. The same call as diffusers' native backend, so the same bits. A row without keys is 0."""
    if not q.numel():  # without heads, torch 2.11 divides by zero on the CPU and ends the process
        return torch.empty_like(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention`, and the natural logarithm of each row's sum of exponentials, [B, n, Q], which `merge` needs.

    The output has q's dtype, the log-sum-exp is float32 (float64 for float64). A row that sees no key gives 0 and
    -inf. Kernels: on CPU flash, for every floating dtype and width. On CUDA flash for float16 and bfloat16 without a
    mask, memory-efficient otherwise (float32, masks, heads wider than 256, GPUs older than Ampere).

    Raises ValueError for a dtype, width or device that none of these covers: there is no slower way behind them.
    """
    # The kernels check none of this: a last dimension with strides gives wrong numbers, and no keys end the process.
    assert all(x.stride(-1) == 1 or x.shape[-1] <= 1 for x in (q, k, v)), "the last dimension must be contiguous"
    assert k.shape == v.shape and q.dtype == k.dtype == v.dtype, (q.dtype, k.shape, v.shape)
    if not (q.numel() and k.numel()):
        return _without_keys(q)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=_bias(q, mask))
    elif q.device.type == "cuda":
        out, lse = _on_cuda(q, k, v, mask)
    else:
        raise ValueError(f"no attention kernel on {q.device.type} returns the log-sum-exp; use cpu or cuda")
    if mask is not None:  # what the kernels return for a row without keys differs: 0, inf or no number
        empty = ~mask.any(-1)
        out = out.masked_fill(empty.unsqueeze(-1), 0.0)
        lse = lse.masked_fill(empty, -torch.inf)
    return out, lse


def merge(total: torch.Tensor, total_lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Adds the attention over further keys to `total` [B, n, Q, D] and `total_lse` [B, n, Q], both changed in place.

    `total` is float32 (float64) whatever the dtype of `part`, so that rounding does not grow with the number of
    parts. Either side may be without keys (0 and -inf). Ring attention, arXiv 2310.01889, section 3; here with
    sigmoids of differences, which cannot overflow.
    """
    assert total.dtype == total_lse.dtype, f"{total.dtype} total: parts are summed up in {total_lse.dtype}"
    added = torch.sigmoid(part_lse - total_lse)
    added.masked_fill_(part_lse == -torch.inf, 0.0)  # -inf - -inf is no number; a true NaN has to stay one
    kept = torch.sigmoid(total_lse - part_lse)
    kept.masked_fill_(part_lse == -torch.inf, 1.0)
    total.mul_(kept.unsqueeze(-1)).addcmul_(part, added.unsqueeze(-1))
    torch.logaddexp(total_lse, part_lse, out=total_lse)


def _without_keys(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.zeros_like(q), torch.full(q.shape[:-1], -torch.inf, dtype=dtype, device=q.device)


def _on_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    width, half = q.shape[-1], q.dtype in (torch.float16, torch.bfloat16)
    multiple = 8 if half else 4  # 16 bytes, what the kernels load at once
    if not half and q.dtype != torch.float32:
        raise ValueError(f"no CUDA attention kernel takes {q.dtype}; use float32, bfloat16 or float16")
    if width % multiple:
        raise ValueError(f"CUDA attention kernels for {q.dtype} take heads of a multiple of {multiple}, not {width}")
    if half and mask is None and width <= _FLASH_WIDEST_HEAD and torch.cuda.get_device_capability(q.device) >= (8, 0):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, _bias(q, mask, k.shape[2]), True)[:2]
    return out, lse[..., : q.shape[2]]  # padded to 32 rows by the memory-efficient kernel


def _bias(q: torch.Tensor, mask: torch.Tensor | None, keys: int | None = None) -> torch.Tensor | None:
    """What is added to the scores: 0 or -inf, in q's dtype (a bool mask is refused, another dtype misread). With
    `keys`, rows of aligned memory and expanded to all of q's rows, as the memory-efficient kernel wants them."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    if keys is None:
        return bias
    return F.pad(bias, (0, -keys % 16))[..., :keys].expand(*q.shape[:3], keys)
