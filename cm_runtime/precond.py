"""Preconditioning: the step from the network F to the consistency function f, for NumPy, torch and graphs alike.

    f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, c_noise(sigma))

Nothing else computes a c_ coefficient, the CUDA sources apart. Coefficients have the dtype of ``sigma``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

import numpy as np

from cm_runtime.choices import Form
from cm_runtime.errors import ConfigError
from cm_runtime.schedule import LARGEST, SMALLEST

FORMS: tuple[Form, ...] = get_args(Form)

# A NumPy or torch array of noise levels, a NumPy scalar, or a value of a graph: it must support arithmetic alone.
Sigma = TypeVar("Sigma")


@dataclass(frozen=True)
class Precond:
    """A preconditioning form with its constants.

    boundary    arXiv 2303.01469, appendix C: c_skip = 1 and c_out = 0 at ``sigma_boundary``
    edm         arXiv 2206.00364, table 1: the same with ``sigma_boundary`` = 0
    piecewise   arXiv 2303.01469, eq. 4: x itself up to ``sigma_boundary``, F above it

    Args:
        form: one of the above.
        sigma_data: standard deviation of the data.
        sigma_boundary: where f is the identity; 0 for edm.

    Raises:
        ConfigError: a constant is out of range, or does not fit the form.

    Example:
        >>> Precond("boundary").c_skip(np.float32(0.002))
        np.float32(1.0)
    """

    form: Form
    sigma_data: float = 0.5
    sigma_boundary: float = 0.002

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"precond must be one of {', '.join(FORMS)}, not {self.form!r}")
        if not SMALLEST <= self.sigma_data <= LARGEST:
            raise ConfigError(f"sigma_data must be positive, from {SMALLEST:g} to {LARGEST:g}, not {self.sigma_data}")
        if self.form == "edm" and self.sigma_boundary != 0:
            raise ConfigError(f"the edm form has its boundary at sigma 0, not {self.sigma_boundary}")
        if self.form != "edm" and not 0 < self.sigma_boundary <= LARGEST:
            limits = f"above 0 and up to {LARGEST:g}"
            raise ConfigError(f"the {self.form} form needs sigma_boundary {limits}, not {self.sigma_boundary}")

    def c_skip(self, sigma: Sigma) -> Sigma:
        """The share of x in f; sigma: any shape."""
        s: Any = sigma
        share: Sigma
        if self.form == "piecewise":
            share = (s <= self.sigma_boundary) * (s * 0 + 1)
        else:
            share = c_skip(s, self.sigma_data, self.sigma_boundary)
        return share

    def c_out(self, sigma: Sigma) -> Sigma:
        """The share of F in f; sigma: any shape."""
        s: Any = sigma
        share: Sigma
        if self.form == "piecewise":
            share = (s > self.sigma_boundary) * (s * 0 + 1)
        else:
            share = c_out(s, self.sigma_data, self.sigma_boundary)
        return share

    def c_in(self, sigma: Sigma) -> Sigma:
        """The scale of F's input: unit variance when the data's is sigma_data^2; sigma: any shape."""
        s: Any = sigma
        scale: Sigma = 1 / (s**2 + self.sigma_data**2) ** 0.5
        return scale

    def c_noise(self, sigma: Sigma) -> Sigma:
        """F's input for the noise level: 250 ln(sigma); sigma: any shape, above 0.

        The authors' code adds 1e-44 inside the logarithm, which changes nothing above 0 and is a float32
        subnormal that engines flush.
        """
        s: Any = sigma
        level: Sigma = 250 * (s.log() if hasattr(s, "log") else np.log(s))
        return level


def c_skip(sigma: Any, sigma_data: Any, sigma_boundary: Any) -> Any:
    """sigma_data^2 / ((sigma - sigma_boundary)^2 + sigma_data^2), exactly 1 at the boundary (arXiv 2303.01469, app. C).

    Constants are numbers, or values of a graph where an exporter writes the formula.
    """
    variance = sigma_data**2
    total = (sigma - sigma_boundary) ** 2 + variance
    if hasattr(total, "new_full"):  # torch's number / array multiplies by the reciprocal, which can miss 1
        variance = total.new_full((), variance)
    return variance / total


def c_out(sigma: Any, sigma_data: Any, sigma_boundary: Any) -> Any:
    """sigma_data (sigma - sigma_boundary) / sqrt(sigma^2 + sigma_data^2) (arXiv 2303.01469, appendix C)."""
    return sigma_data * (sigma - sigma_boundary) / (sigma**2 + sigma_data**2) ** 0.5


def precond(form: str, sigma_data: float = 0.5, sigma_boundary: float | None = None) -> Precond:
    """Return the named form; its boundary defaults to 0 for edm and to 0.002 for the others. Raises ConfigError."""
    if sigma_boundary is None:
        sigma_boundary = 0.0 if form == "edm" else 0.002
    return Precond(cast("Form", form), sigma_data, sigma_boundary)
