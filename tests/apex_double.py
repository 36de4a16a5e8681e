"""A stand-in for apex's FusedLAMB: its signatures, what it refuses, and its updates.

The kernels of apex read tensors by raw pointers, so they take lists of one dtype, float32, float16
or bfloat16, laid out without gaps, and plain numbers for everything else.
"""

from __future__ import annotations

import sys
import types

import torch

from deit.train import optim


class FusedLAMB(torch.optim.Optimizer):
    """What its constructor takes otherwise has apex's default."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(bias_correction=True, grad_averaging=True, max_grad_norm=1.0)
        super().__init__(params, defaults)

    def zero_grad(self):
        for p in self._parameters():
            p.grad = None

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        everything = [p for p in self._parameters() if p.grad is not None]
        norm = torch.stack([p.grad.float().norm() for p in everything]).norm()
        for group in self.param_groups:
            # looked up without a default, as apex does
            (beta1, beta2), limit = group["betas"], group["max_grad_norm"]
            assert group["bias_correction"]
            assert group["grad_averaging"]
            assert type(group["lr"]) is float
            group["step"] = group["step"] + 1 if "step" in group else 1
            assert type(group["step"]) is int, "an integer argument of the kernel"
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                self._check([p, p.grad, m, v])
                grad = p.grad.float() / max(1.0, (norm / limit).item())
                m.copy_(beta1 * m + (1 - beta1) * grad)
                v.copy_(beta2 * v + (1 - beta2) * grad * grad)
                c1, c2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
                update = (m / c1) / ((v / c2).sqrt() + group["eps"]) + group["weight_decay"] * p
                a, b = p.float().norm(), update.norm()
                trusted = group["weight_decay"] != 0 and a > 0 and b > 0
                p.sub_(group["lr"] * (a / b if trusted else 1.0) * update)
        return loss

    @staticmethod
    def _check(tensors):
        assert tensors[0].dtype in (torch.float32, torch.float16, torch.bfloat16)
        assert len({(t.dtype, t.shape, t.layout) for t in tensors}) == 1
        formats = (torch.contiguous_format, torch.channels_last)[: 1 + (tensors[0].ndim == 4)]
        for t in tensors:
            assert any(t.is_contiguous(memory_format=each) for each in formats)


def install(monkeypatch) -> type[FusedLAMB]:
    """Have `--opt fusedlamb` find apex, as on a GPU. Its module is called apex too."""
    monkeypatch.setattr(FusedLAMB, "__module__", "apex.optimizers.fused_lamb")
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    module = types.SimpleNamespace(FusedLAMB=FusedLAMB)
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(optim, "_on_one_gpu", lambda groups: True)
    return FusedLAMB
