# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver and DPM-Solver++, for the ODE and the SDE: one step of orders 1 to 3.

Shared by the multistep and the singlestep schedulers (arXiv:2206.00927, 2211.01095).
"""

from dataclasses import dataclass

import numpy as np

from gift_jax.sampling.schedulers import levels
from gift_jax.sampling.schedulers.rows import NOISE, Config, refuse, x0_and_eps

_PREDICTS_X0 = ("dpmsolver++", "sde-dpmsolver++")
# what a value means that another class wrote
_ALGORITHMS = {"deis": "dpmsolver++"}
_TYPES = {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
UNUSED = ("flow_shift", "use_dynamic_shifting", "time_shift_type")


@dataclass(frozen=True)
class Solver:
    """The levels of a sampling, "steps + 1", and how a step goes from one to the next.

    alpha, sigma: of x = alpha x0 + sigma eps. lam: log(alpha / sigma).
    """

    config: Config
    algorithm: str
    heun: bool
    alpha: np.ndarray
    sigma: np.ndarray
    lam: np.ndarray

    def output(self, i: int) -> np.ndarray:
        """Returns what is extrapolated, at level i: x0, or for plain DPM-Solver eps."""
        x0, eps = x0_and_eps(self.config, self.alpha[i], self.sigma[i])
        return x0 if self.algorithm in _PREDICTS_X0 else eps

    def step(self, x, i: int, end: int, d0, d1=None, d2=None, *, d1_half=False):
        """Returns the latents at level `end`, of those at level i.

        Args: d0, d1, d2: the output there and its first two derivatives, each times a
          power of the step; None: 0. d1_half: d1 weighs half of d0, as in "midpoint".
        """
        h = self.lam[end] - self.lam[i]
        with np.errstate(all="ignore"):  # h is infinite at the end: d1 and d2 are None
            keep, weights, noise = self._weights(i, end, h)
        if d1_half:
            weights = weights[0], weights[0] / 2
        new = keep * x + noise * NOISE
        for weight, d in zip(weights, (d0, d1, d2), strict=False):
            if d is not None:
                new = new + weight * d
        return new

    def _weights(self, i: int, end: int, h):
        """Returns the weights of x, of (d0, d1, d2) and of the noise."""
        a, s = self.alpha[end], self.sigma[end]
        by_sigma, by_alpha = s / self.sigma[i], a / self.alpha[i]
        if self.algorithm == "dpmsolver++":
            drop = np.expm1(-h)
            d2 = 0.5 - (drop + h) / h**2
            return by_sigma, (-a * drop, a * (drop / h + 1), a * d2), 0.0
        if self.algorithm == "sde-dpmsolver++":
            drop, g = np.expm1(-2 * h), 2 * h
            d2 = (-drop - g) / g**2 - 0.5
            noise = s * np.sqrt(-drop)
            weights = -a * drop, a * (drop / g + 1), a * d2
            return by_sigma * np.exp(-h), weights, noise
        rise = np.expm1(h)
        d2 = 0.5 - (rise - h) / h**2
        weights = np.array([-s * rise, -s * (rise / h - 1), s * d2])
        if self.algorithm == "dpmsolver":
            return by_alpha, weights, 0.0
        return by_alpha, 2 * weights[:2], s * np.sqrt(np.expm1(2 * h))


def make_solver(config: Config, sigmas: np.ndarray) -> Solver:
    """Returns the Solver of a config, over the sigmas "steps" and what ends them.

    Raises: UserError for an algorithm or a solver type that the classes do not have.
    """
    label = config["algorithm_type"]
    algorithm = _ALGORITHMS.get(label, label)
    kind = _TYPES.get(config["solver_type"], config["solver_type"])
    if kind not in ("midpoint", "heun"):
        refuse("solver_type", kind, "must be midpoint or heun")
    if label not in _PREDICTS_X0 and config["final_sigmas_type"] == "zero":
        rule = f"must be sigma_min with algorithm_type={label}"
        refuse("final_sigmas_type", "zero", rule)
    sigmas = np.append(sigmas, levels.last_sigma(config, sigmas))
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    alpha = 1 / np.hypot(sigmas, 1)
    with np.errstate(divide="ignore"):
        lam = -np.log(sigmas)
    return Solver(config, algorithm, kind == "heun", alpha, sigmas * alpha, lam)


def clipped(config: Config) -> int:
    """Returns how many of the last timesteps lambda_min_clipped leaves out."""
    lam_T = -np.log(levels.training_sigmas(config))
    return int(np.searchsorted(lam_T[::-1], config["lambda_min_clipped"]))
