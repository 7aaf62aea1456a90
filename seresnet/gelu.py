"""What GELU's share of a normal distribution, and its derivative, are of a number, and polynomials that are near them: passes over images
(seresnet/kernels.py, seresnet/gpu_kernels.py) would take longer for an error function than for their memory."""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

# numba keeps compiled passes by the content of kernels.py alone: whoever changes numbers here changes a line there.
SATURATED = 4.0         # from here on the normal distribution is taken as constant: 3e-5 from 1
SATURATED_FINE = 5.5    # and in float32 from here on: 2e-8 from 1


def normal_share_above_half(u: float) -> float:
    """The share of a standard normal distribution below u, less one half: gelu(u) is u times it and a half (Hendrycks and Gimpel, arXiv
    1606.08415)."""
    return math.erf(u / math.sqrt(2)) / 2


def gelu_slope_above_half(u: float) -> float:
    """The derivative of gelu at u, less one half."""
    return normal_share_above_half(u) + u * math.exp(-u * u / 2) / math.sqrt(2 * math.pi)


def odd_polynomial(function: Callable[[float], float], degree: int = 8, saturated: float = SATURATED) -> list[np.float32]:
    """Coefficients c of the polynomial for which u * c(2 u^2 / saturated^2 - 1) is `function` (odd) up to `saturated`: least squares
    in Chebyshev's points."""
    v = np.cos((np.arange(400) + 0.5) * np.pi / 400)
    u = np.sqrt((v + 1) / 2) * saturated
    values = np.array([function(one) for one in u])
    return [np.float32(c) for c in np.polynomial.Polynomial.fit(v, values / u, degree, w=u, domain=[-1, 1]).coef]
