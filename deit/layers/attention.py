r"""Self-attention on packed features (arXiv:2502.05169, section 3).

Queries, keys and values are made irrep by irrep; a head holds its share of every irrep side by
side, q = [q_s, q_a]. The logits q_s.k_s + q_a.k_a are inner products under an orthogonal action,
so the group leaves them alone, and the values go through packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn as fused_attn_is_available
from torch import Tensor, nn

from deit.groups import FLOP, Group
from deit.layers import fused
from deit.layers.linear import Linear

__all__ = ["Attention"]


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, C) -> (B, N, C).

    Args:
        dim: C, a multiple of `num_heads` times the group's order.
        num_heads: number of heads; each is C / num_heads wide and scaled by its square root.
        use_fused_attn: `scaled_dot_product_attention` in place of the explicit products; None
            chooses it where it is available and allowed.
        use_attn_mixer: weigh the irreps' logits, m_0 q_s.k_s + m_1 q_a.k_a, by learned factors
            shared by the heads (key `attn_mixer`), initially 1 for the trivial irrep and 0 for the
            others.

    Raises:
        ValueError: if the width does not divide, or a mixer is asked for with fused attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_fused_attn: bool | None = None,
        use_attn_mixer: bool = False,
        group: Group = FLOP,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % (num_heads * group.order):
            raise ValueError(
                f"width {dim} cannot be split into {num_heads} heads that each hold all irreps of "
                f"{group.name}: use a multiple of {num_heads * group.order}"
            )
        if use_attn_mixer and use_fused_attn:
            raise ValueError(
                "the attention mixer weighs the logits, which fused attention never forms: "
                "use either use_attn_mixer or use_fused_attn"
            )
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = (
            not use_attn_mixer and bool(fused_attn_is_available())
            if use_fused_attn is None
            else use_fused_attn
        )
        self.rep, self.head_rep = group.regular(dim), group.regular(dim // num_heads)
        self.qkv = Linear(self.rep, group.regular(3 * dim), qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(self.rep, self.rep, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.attn_mixer = (
            nn.Parameter(torch.empty(len(group.irreps), **dd)) if use_attn_mixer else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The mixer's initial value: the trivial irrep alone."""
        if self.attn_mixer is not None:
            with torch.no_grad():
                self.attn_mixer.zero_()[0] = 1.0

    def split_heads(self, qkv: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Irreps' blocks of (B, N, 3C) to q, k, v, each (B, heads, N, C/heads), heads packed."""
        heads = []
        for block, irrep in zip(qkv, self.qkv.group.irreps, strict=True):
            # (B, N, d, 3, heads, width) -> (3, B, heads, N, d, width)
            block = block.unflatten(-1, (irrep.dim, 3, self.num_heads, -1))
            heads.append(block.permute(3, 0, 4, 1, 2, 5).flatten(-2))
        heads = torch.cat(heads, -1)
        return heads[0], heads[1], heads[2]

    def merge_heads(self, x: Tensor) -> list[Tensor]:
        """(B, heads, N, C/heads) with packed heads to the irreps' blocks of (B, N, C)."""
        blocks = []
        for block, irrep in zip(self.head_rep.split(x), self.rep.group.irreps, strict=True):
            # (B, heads, N, d, width) -> (B, N, d, heads, width)
            block = block.unflatten(-1, (irrep.dim, -1)).permute(0, 2, 3, 1, 4)
            blocks.append(block.flatten(2))
        return blocks

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        y = fused.attention(x, self)
        if y is not None:
            return y
        q, k, v = self.split_heads(self.qkv.map(self.rep.split(x)))
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            if self.attn_mixer is not None:
                sizes = self.head_rep.sizes
                mixer = [self.attn_mixer[i].expand(n) for i, n in enumerate(sizes)]
                q = q * torch.cat(mixer).to(q.dtype)
            logits = (q * self.scale) @ k.mT
            x = self.attn_drop(logits.softmax(-1)) @ v
        return self.proj_drop(torch.cat(self.proj.map(self.merge_heads(x)), -1))
