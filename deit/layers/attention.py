r"""Self-attention of features in parts (arXiv:2502.05169, section 3).

Queries, keys and values are made irrep by irrep; a head holds its share of every irrep side by
side, q = [q_s, q_a]. The logits q_s.k_s + q_a.k_a are inner products under an orthogonal action,
so the group leaves them alone, and it acts on the values as on the features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn as fused_attn_is_available
from torch import Tensor, nn

from deit.groups import FLOP, Group
from deit.layers.drop import Dropout
from deit.layers.linear import Linear


class Attention(nn.Module):
    """Multi-head self-attention of parts (B, N, C / 2); for any group of parts C wide together.

    Args:
        dim: C, a multiple of `num_heads` times the group's order.
        num_heads: number of heads; each is C / num_heads wide and scaled by its square root.
        use_fused_attn: `scaled_dot_product_attention` in place of the explicit products; None
            chooses it where it is available and allowed. torch gives it first derivatives alone:
            second and forward ones need False, or `torch.nn.attention.sdpa_kernel` with MATH.
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
        **dd: Any,
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
        if use_fused_attn is None:
            use_fused_attn = not use_attn_mixer and bool(fused_attn_is_available())
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn
        self.rep, self.head_rep = group.regular(dim), group.regular(dim // num_heads)
        self.qkv = Linear(self.rep, group.regular(3 * dim), qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(self.rep, self.rep, **dd)
        self.proj_drop = Dropout(proj_drop)
        self.attn_mixer = (
            nn.Parameter(torch.empty(len(group.irreps), **dd)) if use_attn_mixer else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The mixer's initial value: the trivial irrep alone."""
        if self.attn_mixer is not None:
            with torch.no_grad():
                self.attn_mixer.zero_()[0] = 1.0

    def split_heads(self, qkv: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Parts of (B, N, 3C) to q, k, v, each (B, heads, N, C/heads), all irreps in a head."""
        heads = []
        for part, irrep in zip(qkv, self.rep.group.irreps, strict=True):
            if irrep.dim == 1:  # (B, N, 3, heads, width)
                heads.append(part.unflatten(-1, (3, self.num_heads, -1)))
            else:  # (B, N, d, 3, heads, width) -> (B, N, 3, heads, d * width)
                part = part.unflatten(-1, (irrep.dim, 3, self.num_heads, -1))
                heads.append(part.movedim(2, 4).flatten(-2))
        # by number: symbolic tracers cannot iterate over the result of unbind
        q_k_v = torch.cat(heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q_k_v[0], q_k_v[1], q_k_v[2]

    def merge_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, heads, N, C/heads) to the parts of (B, N, C)."""
        parts = []
        blocks = self.head_rep.split(x.transpose(1, 2))  # (B, N, heads, d * width)
        for block, irrep in zip(blocks, self.rep.group.irreps, strict=True):
            if irrep.dim > 1:  # (B, N, d, heads, width)
                block = block.unflatten(-1, (irrep.dim, -1)).movedim(3, 2)
            parts.append(block.flatten(2))
        return tuple(parts)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # same shapes
        q, k, v = self.split_heads(self.qkv(x))
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            if self.attn_mixer is not None:
                sizes = self.head_rep.sizes
                mixer = [self.attn_mixer[i].expand(n) for i, n in enumerate(sizes)]
                q = q * torch.cat(mixer).to(q.dtype)
            logits = (q * self.scale) @ k.mT
            y = self.attn_drop(logits.softmax(-1)) @ v
        return self.proj_drop(self.proj(self.merge_heads(y)))
