"""f itself: the consistency function as a torch module, preconditioning included."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cm_runtime.choices import Form
from cm_runtime.files.records import Record
from cm_runtime.networks.unet import UNet, UNetConfig
from cm_runtime.precond import Precond, precond
from cm_runtime.schedule import LARGEST, SMALLEST, NoiseRange


class ModelConfig(Record):
    """Everything that fixes f but the weights; unknown keys are refused."""

    network: UNetConfig
    precond: Form
    sigma_data: float = Field(0.5, gt=0)
    sigma_boundary: float = Field(ge=0, description="where f is the identity: 0 for the edm form")
    sigma_min: float = Field(NoiseRange.sigma_min, ge=SMALLEST, description="the sampler's, not the form's")
    sigma_max: float = Field(NoiseRange.sigma_max, le=LARGEST)
    rho: float = Field(NoiseRange.rho, ge=0.1, le=100)

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        precond(self.precond, self.sigma_data, self.sigma_boundary)
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must lie below sigma_max {self.sigma_max:g}")
        return self

    @property
    def noise_range(self) -> NoiseRange:
        """sigma_min, sigma_max and rho as one value."""
        return NoiseRange(self.sigma_min, self.sigma_max, self.rho)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.network.image_channels, self.network.image_size, self.network.image_size


class ConsistencyModel(nn.Module):
    """f(x, sigma, label) = c_skip x + c_out F(c_in x, c_noise, label), unclamped (arXiv 2303.01469, eq. 5).

    The same module is the EDM teacher's denoiser D (arXiv 2206.00364, eq. 7) while it is trained as one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.precond: Precond = precond(config.precond, config.sigma_data, config.sigma_boundary)
        self.F = UNet(config.network)

    def forward(
        self, x: Tensor, sigma: Tensor, label: Tensor | None = None, dropout_key: Tensor | None = None
    ) -> Tensor:
        """x: (N,C,H,W) float32, sigma: (N,) float32, label: (N,) int64 with classes -> (N,C,H,W) float32.

        A model in float64 takes and gives float64. dropout_key: (N, 2) int64, see `dropout.Dropout`; in training only.
        """
        return self.skip_scale(x, self.network(x, sigma, label, dropout_key), sigma)

    def network(
        self, x: Tensor, sigma: Tensor, label: Tensor | None = None, dropout_key: Tensor | None = None
    ) -> Tensor:
        """F(c_in x, c_noise, label), for the inputs of `forward`."""
        s = _full(sigma).reshape(-1, 1, 1, 1)
        F: Tensor = self.F(self.precond.c_in(s) * x, self.precond.c_noise(_full(sigma)), label, dropout_key)
        return F

    def skip_scale(self, x: Tensor, F: Tensor, sigma: Tensor) -> Tensor:
        """c_skip(sigma) x + c_out(sigma) F in float32; an export has one graph node in its place."""
        s = _full(sigma).reshape(-1, 1, 1, 1)
        return self.precond.c_skip(s) * _full(x) + self.precond.c_out(s) * _full(F)


def _full(value: Tensor) -> Tensor:
    """In float32 whatever the network's precision, but for float64, which is kept."""
    return value if value.dtype == torch.float64 else value.float()


def build(config: ModelConfig, device: str | torch.device = "cpu") -> ConsistencyModel:
    """A model of ``config`` with fresh weights on ``device``."""
    with torch.device(device):
        return ConsistencyModel(config)
