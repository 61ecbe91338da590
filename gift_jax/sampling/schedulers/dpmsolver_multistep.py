# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver++ 2M and its kin (arXiv:2211.01095, algorithm 2)."""

from gift_jax.sampling.schedulers import dpmsolver, levels
from gift_jax.sampling.schedulers.rows import (
    MEMORY,
    Config,
    Row,
    Schedule,
    Scheduler,
    X,
    keep,
    refuse,
    schedule_of,
)

_SHORT = 15  # fewer steps than this end with lower orders


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `DPMSolverMultistepScheduler`."""
    if config["solver_order"] == 3 and config["algorithm_type"] == "sde-dpmsolver":
        refuse("solver_order", 3, "must be 1 or 2 with algorithm_type=sde-dpmsolver")
    last = config["num_train_timesteps"] - dpmsolver.clipped(config)
    to_nearest = config["beta_schedule"] != "squaredcos_cap_v2"
    t, sigmas = levels.solver_levels(config, steps, last=last, to_nearest=to_nearest)
    return schedule_of(_rows(config, t, dpmsolver.make_solver(config, sigmas)))


def _rows(config, ts, solver):
    steps, lam = len(ts), solver.lam
    short = config["lower_order_final"] and steps < _SHORT
    last_first = (
        short or config["euler_at_final"] or config["final_sigmas_type"] == "zero"
    )
    for i, t in enumerate(ts):
        order = min(config["solver_order"], i + 1)
        if i == steps - 1 and last_first:
            order = 1
        elif i == steps - 2 and short:
            order = min(order, 2)
        now, h = solver.output(i), lam[i + 1] - lam[i]
        d1 = d2 = None
        if order > 1:
            r0 = (lam[i] - lam[i - 1]) / h
            d1 = (now - MEMORY[0]) / r0
        if order > 2:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            bend = d1 - (MEMORY[0] - MEMORY[1]) / r1
            d1, d2 = d1 + r0 / (r0 + r1) * bend, bend / (r0 + r1)
        half = order == 2 and not solver.heun
        x = solver.step(X, i, i + 1, now, d1, d2, d1_half=half)
        yield Row(t, x, keep(now, 2))


_ONLY = {
    "algorithm_type": (
        "dpmsolver++",
        "sde-dpmsolver++",
        "dpmsolver",
        "sde-dpmsolver",
        "deis",
    ),
    "solver_order": (1, 2, 3),
    "use_flow_sigmas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large"),
}
_CLASS = "DPMSolverMultistepScheduler"
PLUS_PLUS = Scheduler(
    "dpmsolver++",
    _CLASS,
    schedule,
    _ONLY,
    fixed={"algorithm_type": "dpmsolver++"},
    unused=dpmsolver.UNUSED,
)
SDE_PLUS_PLUS = Scheduler(
    "sde-dpmsolver++",
    _CLASS,
    schedule,
    _ONLY,
    fixed={"algorithm_type": "sde-dpmsolver++"},
    unused=dpmsolver.UNUSED,
)
