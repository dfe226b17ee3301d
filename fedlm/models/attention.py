"""Causal self-attention of short sequences as plain products, with a backward pass of its own.

The fused kernel is up to 20 times slower than plain products at 16 to 32 tokens on some processors, and autograd over
the plain products makes a dozen small copies. Here queries, keys and values are laid out once, and so are their
gradients.

With the variances of noisy keys, attention is corrected for them (Re-Attention; `fedlm.models.re_attention.attention`):
the logit of key j loses |q|^2 s_j^2 / (2 W). Plain products add that matrix of rank one; the fused kernel gets it as
one more coordinate of queries, |q|^2, and of keys, -s_j^2 / (2 sqrt(W)).

Shape legend: B batch, T tokens, D model width, H heads, W = D / H.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_PLAIN = 64  # tokens; beyond it the fused kernel wins, and saves the (T, T) weights
_ALIGNMENT = 8  # fused kernels want head widths that are multiples of it


def causal_attention(qkv: Tensor, num_heads: int, key_noise: Tensor | None = None) -> Tensor:
    """Return softmax(Q K^T / sqrt(W)) V under the causal mask, all heads side by side.

    Arguments:
        qkv: (B, T, 3D), the queries, keys and values of all heads in this order; W = D / num_heads.
        num_heads: H.
        key_noise: Variance of a coordinate of each key, (B, T, H), to correct for; a constant: it gets no gradient.

    Returns:
        (B, T, D).
    """
    B, T, width = qkv.shape
    if T <= LONGEST_PLAIN:
        mixed: Tensor = _PlainAttention.apply(qkv, num_heads, key_noise)  # type: ignore[no-untyped-call]
        return mixed
    q, k, v = qkv.view(B, T, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, W) each
    if key_noise is None:
        fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, W)
    else:
        fused = _fused_corrected(q, k, v, key_noise)  # (B, H, T, W)
    return fused.transpose(1, 2).reshape(B, T, width // 3)


def _fused_corrected(q: Tensor, k: Tensor, v: Tensor, key_noise: Tensor) -> Tensor:
    """Return corrected attention (B, H, T, W) of such queries, keys and values, through the fused kernel."""
    W = q.shape[-1]
    scale = W**-0.5
    query_part = q.square().sum(-1, keepdim=True)  # (B, H, T, 1)
    key_part = key_noise.detach().transpose(1, 2)[..., None] * (-scale / 2)  # (B, H, T, 1)
    padding = -(W + 1) % _ALIGNMENT
    wide_q = F.pad(torch.cat([q, query_part], -1), (0, padding))  # (B, H, T, W + 1 + padding)
    wide_k = F.pad(torch.cat([k, key_part.to(k.dtype)], -1), (0, padding))
    wide_v = F.pad(v, (0, 1 + padding))
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=True, scale=scale)[..., :W]


@torch.no_grad()
def attention_variance(qkv: Tensor, value_noise: Tensor, num_heads: int, key_noise: Tensor) -> Tensor:
    """Return sum_j S_j^2 v_j with the corrected weights S: the variance of attention whose values have variance v.

    The weights are made again, for `LONGEST_PLAIN` queries at a time.

    Arguments:
        qkv: (B, T, 3D), as for `causal_attention`.
        value_noise: v, (B, T, D).
        num_heads: H.
        key_noise: (B, T, H).

    Returns:
        (B, T, D).
    """
    B, T, _ = qkv.shape
    q, k, _ = _split_heads(qkv, 3, num_heads).unbind(0)  # (BH, T, W) each
    v = _split_heads(value_noise, 1, num_heads)[0]  # (BH, T, W)
    noise = _noise_rows(key_noise)  # (BH, 1, T)
    future = _future(T, qkv.device)  # (T, T)
    parts = []
    for start in range(0, T, LONGEST_PLAIN):
        stop = min(start + LONGEST_PLAIN, T)
        scores = _scores(q[:, start:stop], k[:, :stop], future[start:stop, :stop], noise[..., :stop])
        parts.append(torch.bmm(torch.softmax(scores, -1).square_(), v[:, :stop]))  # (BH, stop - start, W)
    return _join_heads(torch.cat(parts, 1)[None], B)


@lru_cache(maxsize=8)
def _future(T: int, device: torch.device) -> Tensor:
    """Return (T, T): minus infinity above the diagonal, zero elsewhere."""
    return torch.full((T, T), -torch.inf, device=device).triu(1)


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, key_noise: Tensor | None) -> Tensor:
        B, T, _ = qkv.shape
        parts = _split_heads(qkv, 3, num_heads)  # (3, BH, T, W)
        q, k, v = parts.unbind(0)
        noise = None if key_noise is None else _noise_rows(key_noise).to(q.dtype)  # (BH, 1, T)
        p = torch.softmax(_scores(q, k, _future(T, qkv.device), noise), -1)  # (BH, T, T)
        ctx.save_for_backward(parts, p, noise)
        ctx.num_heads, ctx.scale = num_heads, q.shape[-1] ** -0.5
        return _join_heads(torch.bmm(p, v)[None], B)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs  # (B, T, D)
        parts, p, noise = ctx.saved_tensors
        q, k, v = parts.unbind(0)
        g = _split_heads(grad, 1, ctx.num_heads)[0]  # (BH, T, W)
        g_p = torch.bmm(g, v.transpose(1, 2))  # (BH, T, T)
        g_scores = p * g_p.sub_((g_p * p).sum(-1, keepdim=True))  # (BH, T, T)
        g_parts = torch.empty_like(parts)
        torch.bmm(g_scores.mul_(ctx.scale), k, out=g_parts[0])
        if noise is not None:  # of -|q|^2 s_j^2 / (2 W)
            g_parts[0].sub_(q * torch.bmm(g_scores, noise.transpose(1, 2)), alpha=ctx.scale)
        torch.bmm(g_scores.transpose(1, 2), q, out=g_parts[1])
        torch.bmm(p.transpose(1, 2), g, out=g_parts[2])
        return _join_heads(g_parts, grad.shape[0]), None, None


def _scores(q: Tensor, k: Tensor, future: Tensor, noise: Tensor | None) -> Tensor:
    """Return masked logits of queries (BH, Q, W) and keys (BH, T, W), (BH, Q, T).

    Arguments:
        future: (Q, T), minus infinity where a query may not look.
        noise: Variances of the keys to correct for, (BH, 1, T), or None.
    """
    scale = q.shape[-1] ** -0.5
    scores = torch.baddbmm(future.to(q.dtype), q, k.transpose(1, 2), alpha=scale)  # (BH, Q, T)
    if noise is not None:
        scores.baddbmm_(q.square().sum(-1, keepdim=True), noise, alpha=-(scale**2) / 2)
    return scores


def _noise_rows(key_noise: Tensor) -> Tensor:
    """Lay (B, T, H) out as (BH, 1, T)."""
    return key_noise.transpose(1, 2).flatten(0, 1)[:, None]


def _split_heads(x: Tensor, num_parts: int, num_heads: int) -> Tensor:
    """Lay (B, T, parts * D) out as (parts, BH, T, W)."""
    B, T, _ = x.shape
    heads = x.reshape(B, T, num_parts, num_heads, -1).permute(2, 0, 3, 1, 4)  # (parts, B, H, T, W)
    return heads.reshape(num_parts, B * num_heads, T, -1)


def _join_heads(x: Tensor, B: int) -> Tensor:
    """Undo `_split_heads`: (parts, BH, T, W) to (B, T, parts * D)."""
    num_parts, _, T, W = x.shape
    heads = x.view(num_parts, B, -1, T, W).permute(1, 3, 0, 2, 4)  # (B, T, parts, H, W)
    return heads.reshape(B, T, -1)
