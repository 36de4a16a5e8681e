"""LAMB (arXiv:1904.00962) with the updates of apex's FusedLAMB, in PyTorch alone.

For the gradient g of a tensor w, after clipping the global norm of all gradients to
`max_grad_norm`, with bias-corrected moments m and v:

    u = m / (sqrt(v) + eps) + weight_decay * w
    w = w - lr * (|w| / |u|) * u        the ratio is 1 if either norm is zero,
                                        and for tensors without weight decay

Every operation works on all tensors of a group at once (`torch._foreach_*`), and nothing waits for
the device: norms and ratios stay there. Parameters sharded by FSDP2 are updated shard by shard;
only their norms are communicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

_CPU_CHUNK = 1 << 16  # elements


class Lamb(Optimizer):
    """LAMB as apex's FusedLAMB and timm's Lamb have it.

    State dicts move freely between this class and apex's, so that a run may change machines;
    timm's can be loaded too.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate; with `capturable` it may be a tensor.
        betas: decay of the running means of g and of g^2.
        eps: added to the denominator.
        weight_decay: decay, inside the trust ratio.
        max_grad_norm: clip the norm of all gradients together to this; None for no clipping.
            `p.grad` itself is not changed.
        capturable: keep the step count on the device, so that a CUDA graph can replay `step`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        capturable: bool = False,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"negative lr {lr}, eps {eps} or weight_decay {weight_decay}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {betas}")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "capturable": capturable,
            "step": 0,  # one count for the group, as in apex and timm
            # What apex looks for in a group that it loads; it is always so here.
            "bias_correction": True,
            "grad_averaging": True,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            # timm keeps the count in a tensor, and so does `capturable`, on the device.
            step = group["step"]
            if group["capturable"]:
                group["step"] = torch.as_tensor(step, dtype=torch.float64, device=_device(group))
            else:
                group["step"] = int(step)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Parameters without a gradient are left alone.

        Args:
            closure: computes the gradients and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        everything = [p for params in active for p in params]
        if any(p.grad.is_sparse for p in everything):
            raise RuntimeError("Lamb does not take sparse gradients")
        # One norm for all groups, as in apex; the first group says what to clip at.
        limit = self.param_groups[0]["max_grad_norm"]
        clip = None
        if limit is not None and everything:
            norm = torch.linalg.vector_norm(_norms([p.grad for p in everything], everything))
            clip = (norm / limit).clamp(min=1)
        for group, params in zip(self.param_groups, active, strict=True):
            if group["capturable"] and not isinstance(group["step"], Tensor):
                group["step"] = torch.zeros((), dtype=torch.float64, device=_device(group))
            group["step"] += 1
            for chunk in _chunks(params):
                self._update(group, chunk, clip)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], clip: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        weights = _local(params)
        grads = _local([p.grad for p in params])
        means = _local([self.state[p]["exp_avg"] for p in params])
        squares = _local([self.state[p]["exp_avg_sq"] for p in params])
        if clip is not None:
            grads = torch._foreach_div(grads, clip.to(grads[0].dtype))

        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)

        # Both bias corrections are scalars. Taken out of the fraction they save two passes over
        # all tensors:  m/c1 / (sqrt(v/c2) + eps) = scale * m / (sqrt(v) + eps sqrt(c2)).
        root = (1 - beta2 ** group["step"]) ** 0.5
        scale = root / (1 - beta1 ** group["step"])
        denominators = torch._foreach_sqrt(squares)
        _add_number(denominators, group["eps"] * root)
        updates = torch._foreach_div(means, denominators)

        decay = group["weight_decay"]
        rate = -group["lr"] * scale
        if decay == 0:
            _add_scaled(weights, updates, rate)
            return
        _add_scaled(updates, weights, decay / scale)
        weight_norms = _norms(params, params)
        update_norms = _norms(updates, params) * scale
        ratios = torch.where(
            (weight_norms > 0) & (update_norms > 0), weight_norms / update_norms, 1.0
        )
        torch._foreach_addcmul_(weights, updates, (ratios * rate).to(weights[0].dtype).unbind())


def _chunks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """The lists to work on one after the other.

    A GPU takes all tensors at once, in the fewest launches. A CPU is two to three times faster
    with lists that stay in its cache from one operation to the next.
    """
    chunk: list[Tensor] = []
    for p in params:
        if chunk and not p.is_cuda and sum(q.numel() for q in chunk) + p.numel() > _CPU_CHUNK:
            yield chunk
            chunk = []
        chunk.append(p)
    if chunk:
        yield chunk


def _device(group: dict[str, Any]) -> torch.device:
    return group["params"][0].device


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """This process's shards of sharded tensors, other tensors as they are; no copies."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def _add_number(targets: list[Tensor], number: float | Tensor) -> None:
    """targets += number, which may be on the device."""
    if isinstance(number, Tensor):
        # Without alpha the overload for plain numbers is chosen, which reads the tensor back.
        torch._foreach_add_(targets, number.to(targets[0].dtype), alpha=1)
    else:
        torch._foreach_add_(targets, number)


def _add_scaled(targets: list[Tensor], tensors: list[Tensor], factor: float | Tensor) -> None:
    """targets += factor * tensors; a factor on the device costs `tensors`' worth of memory."""
    if isinstance(factor, Tensor):
        scaled = torch._foreach_mul(tensors, factor.to(tensors[0].dtype))
        torch._foreach_add_(targets, scaled)
    else:
        torch._foreach_add_(targets, tensors, alpha=factor)


def _norms(tensors: list[Tensor], params: list[Tensor]) -> Tensor:
    """Euclidean norms (n,) of n tensors laid out like `params`, of the whole where sharded."""
    norms = torch._foreach_norm(_local(tensors))
    dtype = torch.promote_types(norms[0].dtype, torch.float32)
    stacked = torch.stack([norm.to(dtype) for norm in norms])
    sharded = [p for p in params if hasattr(p, "to_local")]
    if not sharded:
        return stacked
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    assert len(sharded) == len(params), "all parameters of an optimizer are sharded, or none"
    assert all(p.device_mesh == mesh for p in sharded), "the parameters are on several meshes"
    squares = stacked.square()
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            dist.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt()
