"""Buffers that follow from the architecture: kept in the state dict, checked when loaded."""

import torch
from torch import Tensor, nn


class FixedBuffers(nn.Module):
    """A module with buffers that no checkpoint may change.

    Published checkpoints store token orders and fixed zeros. A loaded value that differs means
    weights for another geometry (or none that is equivariant), so loading it is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fixed: dict[str, tuple[Tensor, str]] = {}

    def register_fixed(
        self,
        name: str,
        value: Tensor,
        rule: str,
        device: torch.device | str | None = None,
    ) -> None:
        """Register a persistent buffer; `rule` says in an error what its value must be.

        `value` is on the CPU; it is kept there too, as what a loaded tensor is compared with.
        """
        self._fixed[name] = (value, rule)
        if device is None:  # `get_default_device` does not know of `with` blocks in torch 2.6
            device = torch.empty(0).device
        self.register_buffer(name, value.to(device, copy=True))

    def unregister_fixed(self, name: str) -> None:
        """Remove a buffer that a change of the architecture has done away with."""
        del self._fixed[name], self._buffers[name]

    def reset_parameters(self) -> None:
        """Write the fixed values again, for modules that were made on the meta device."""
        for name, (value, _) in self._fixed.items():
            getattr(self, name).copy_(value)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        for name, (value, rule) in self._fixed.items():
            loaded = state_dict.get(prefix + name)
            if loaded is None or loaded.is_meta:
                continue
            if not torch.equal(loaded.cpu().to(value.dtype), value):  # or of another shape
                errors.append(f"{prefix}{name} in the checkpoint is not {rule}")
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
