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
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        amsgrad=False,
        adam_w_mode=True,
        grad_averaging=True,
        set_grad_none=True,
        max_grad_norm=1.0,
        use_nvlamb=False,
    ):
        if amsgrad:
            raise RuntimeError("FusedLAMB does not support the AMSGrad variant.")
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps)
        defaults |= dict(weight_decay=weight_decay, grad_averaging=grad_averaging)
        super().__init__(params, defaults | dict(max_grad_norm=max_grad_norm))
        self.set_grad_none = set_grad_none
        self.use_nvlamb = use_nvlamb
        self.steps = 0

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.steps += 1
        everything = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in everything:
            self._check([p, p.grad])
        norm = torch.stack([p.grad.float().norm() for p in everything]).norm()
        for group in self.param_groups:
            # looked up without a default, as apex does
            beta1, beta2 = group["betas"]
            limit, averaging = group["max_grad_norm"], group["grad_averaging"]
            assert group["bias_correction"]
            assert averaging
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
                ratio = 1.0
                if self.use_nvlamb or group["weight_decay"] != 0:
                    a, b = p.float().norm(), update.norm()
                    ratio = a / b if a > 0 and b > 0 else 1.0
                p.sub_(group["lr"] * ratio * update)
        return loss

    @staticmethod
    def _check(tensors):
        if tensors[0].dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise RuntimeError("FusedLAMB only support fp16, bfloat16 and fp32.")
        if any(t.is_sparse for t in tensors):
            raise RuntimeError("FusedLAMB does not support sparse gradients")
        if len({t.dtype for t in tensors}) > 1 or len({t.shape for t in tensors}) > 1:
            raise RuntimeError("the tensors of an update differ in dtype or size")
        layouts = (torch.contiguous_format, torch.channels_last)
        for t in tensors:
            if not any(t.is_contiguous(memory_format=f) for f in layouts[: 1 + (t.ndim == 4)]):
                raise RuntimeError("A tensor was not contiguous.")


def install(monkeypatch) -> type[FusedLAMB]:
    """Have `--opt fusedlamb` find apex, as on a GPU. Its module is called apex too."""
    monkeypatch.setattr(FusedLAMB, "__module__", "apex.optimizers.fused_lamb")
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    module = types.SimpleNamespace(FusedLAMB=FusedLAMB)
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(optim, "_on_one_gpu", lambda groups: True)
    return FusedLAMB
