# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver++ 2S and its kin: steps of orders 1, 2 and 3 from one start in turn."""

import numpy as np

from gift_jax.sampling.schedulers import dpmsolver, levels
from gift_jax.sampling.schedulers.rows import (
    MEMORY,
    Config,
    Row,
    Schedule,
    Scheduler,
    X,
    schedule_of,
)

_START, _OUTPUTS = MEMORY[0], MEMORY[1:]


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `DPMSolverSinglestepScheduler`."""
    last = config["num_train_timesteps"] - dpmsolver.clipped(config)
    spacing = {"timestep_spacing": "linspace", "steps_offset": 0}  # the only one it has
    t, sigmas = levels.solver_levels({**config, **spacing}, steps, last=last)
    solver = dpmsolver.make_solver(config, sigmas)
    return schedule_of(_rows(solver, t, _orders(config, steps)))


def _orders(config, steps):
    """Returns the order of each step."""
    top = config["solver_order"]
    ends_at_zero = config["final_sigmas_type"] == "zero"
    orders = list(np.resize(np.arange(1, top + 1), steps))
    if config["lower_order_final"] or steps % top or ends_at_zero:
        if top == 2 and steps % 2 == 0:
            orders[-2:] = [1, 1]
        if top == 3 and steps % 3 == 0:
            orders[-3:] = [1, 2, 1]
    if ends_at_zero:
        orders[-1] = 1
    return orders


def _rows(solver, ts, orders):
    lam = solver.lam
    for i, (t, order) in enumerate(zip(ts, orders, strict=True)):
        now = solver.output(i)
        outputs = (now, *_OUTPUTS)
        start = X if order == 1 else _START
        first = i - order + 1
        h = lam[i + 1] - lam[first]
        d0, d1, d2 = outputs[order - 1], None, None
        if order == 2:
            d1 = (outputs[0] - d0) / ((lam[i] - lam[first]) / h)
        elif order == 3:
            r0, r1 = (lam[i] - lam[first]) / h, (lam[i - 1] - lam[first]) / h
            early, late = (outputs[1] - d0) / r1, (outputs[0] - d0) / r0
            d1 = late
            if solver.heun:
                d1 = (r0 * early - r1 * late) / (r0 - r1)
                d2 = 2 * (late - early) / (r0 - r1)
        half = order == 2 and not solver.heun
        x = solver.step(start, first, i + 1, d0, d1, d2, d1_half=half)
        yield Row(t, x, (start, now, _OUTPUTS[0]))


SCHEDULER = Scheduler(
    "dpmsolver_singlestep",
    "DPMSolverSinglestepScheduler",
    schedule,
    only={
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "deis"),
        "solver_order": (1, 2, 3),
        "use_flow_sigmas": (False,),
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large"),
    },
    unused=dpmsolver.UNUSED,
)
