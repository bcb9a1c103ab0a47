"""The state of torch's random generators at one moment, to run the same dropout again."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Randomness:
    """The state of the CPU's generator and, for a model on CUDA, of its device's."""

    cpu: torch.Tensor
    device: torch.device
    cuda: torch.Tensor | None = None

    @classmethod
    def now(cls, device: torch.device) -> "Randomness":
        """The state as it is; nothing is drawn, and no work on the device is waited for."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, cuda)

    def restore(self) -> None:
        """Have torch draw from here on what it drew from here on before."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
