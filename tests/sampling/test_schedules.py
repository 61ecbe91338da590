# SPDX-License-Identifier: Apache-2.0
"""Every scheduler and option against today's PyTorch, step by step, without a UNet."""

import inspect
import sys
import types

import numpy as np
import pytest
from tiny_model import relative_error

from gift_jax.models.sd.scheduler_config import DEFAULTS, complete
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import schedules

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VELOCITY = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SPACINGS = [{"timestep_spacing": s} for s in ("linspace", "leading", "trailing")]
SIGMAS = [{f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")]
BETAS = [
    {"beta_schedule": "linear", "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": list(np.linspace(1e-3, 0.02, 1000))},
]
COMMON = [{}, VELOCITY, *SPACINGS, *BETAS]
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
DPM = [
    {"solver_order": order, "algorithm_type": algorithm, "solver_type": kind}
    | (SIGMA_MIN if "++" not in algorithm else {})
    for order in (1, 2, 3)
    for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    for kind in ("midpoint", "heun")
]
OPTIONS = {
    "DDIMScheduler": [
        *COMMON,
        {"set_alpha_to_one": False},
        {"clip_sample": False, "steps_offset": 1},
        VELOCITY | ZERO_SNR,
        {"rescale_betas_zero_snr": True},
    ],
    "DDPMScheduler": [
        *COMMON,
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log"},
        VELOCITY | ZERO_SNR,
    ],
    "PNDMScheduler": [
        *COMMON,
        {"skip_prk_steps": True},
        {"skip_prk_steps": True, "set_alpha_to_one": True} | VELOCITY,
        {"skip_prk_steps": True, "timestep_spacing": "trailing"},
    ],
    "EulerDiscreteScheduler": [
        *COMMON,
        *SIGMAS,
        SIGMA_MIN,
        SIGMAS[0] | {"sigma_min": 0.1, "sigma_max": 10.0},
        SIGMAS[1] | {"sigma_min": 0.1, "sigma_max": 10.0},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous"} | VELOCITY | SIGMAS[0],
        ZERO_SNR,
        VELOCITY | ZERO_SNR,
    ],
    "EulerAncestralDiscreteScheduler": [*COMMON, ZERO_SNR, VELOCITY | ZERO_SNR],
    "HeunDiscreteScheduler": [*COMMON, *SIGMAS, SIGMAS[0] | VELOCITY],
    "LMSDiscreteScheduler": [*COMMON, *SIGMAS, SIGMAS[0] | VELOCITY],
    "KDPM2DiscreteScheduler": [*COMMON, *SIGMAS],
    "KDPM2AncestralDiscreteScheduler": [{}, VELOCITY, *SPACINGS, *SIGMAS],
    "DPMSolverSDEScheduler": [*COMMON, *SIGMAS, SIGMAS[0] | VELOCITY],
    "DPMSolverMultistepScheduler": [
        *COMMON,
        *SIGMAS,
        SIGMAS[0] | {"sigma_min": 0.1, "sigma_max": 10.0},  # of an Euler folder
        {"use_lu_lambdas": True},
        {"lambda_min_clipped": -2.0},
        {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"},
        {"euler_at_final": True} | SIGMA_MIN,
        {"lower_order_final": False},
        {"algorithm_type": "deis", "solver_type": "logrho"} | SIGMA_MIN,
        ZERO_SNR,
        VELOCITY | ZERO_SNR,
        *[d for d in DPM if (d["solver_order"], d["algorithm_type"][-2:]) != (3, "er")],
        {"solver_order": 3, "algorithm_type": "dpmsolver"} | SIGMA_MIN,
    ],
    "DPMSolverSinglestepScheduler": [
        {},
        VELOCITY,
        *BETAS,
        *SIGMAS,
        SIGMA_MIN,
        {"lower_order_final": True} | SIGMA_MIN,
        {"lambda_min_clipped": -2.0},
        *[d for d in DPM if d["algorithm_type"] != "sde-dpmsolver"],
    ],
    "UniPCMultistepScheduler": [
        *COMMON,
        *SIGMAS,
        SIGMA_MIN,
        {"solver_order": 3},
        {"solver_order": 1},
        {"solver_order": 3, "lower_order_final": False} | SIGMA_MIN,
        {"solver_type": "bh1", "solver_order": 3} | SIGMA_MIN,
        {"solver_type": "heun"},
        {"predict_x0": False, "solver_order": 3} | SIGMA_MIN,
        {"predict_x0": False} | SIGMA_MIN | VELOCITY,
        {"disable_corrector": [0, 1, 3]},
        ZERO_SNR,
        VELOCITY | ZERO_SNR,
    ],
    "DEISMultistepScheduler": [
        *COMMON,
        *SIGMAS,
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_order": 3, "lower_order_final": False} | VELOCITY,
        {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    ],
    "LCMScheduler": [
        {},
        VELOCITY,
        *BETAS,
        {"original_inference_steps": 100},
        {"timestep_scaling": 2.0},
        VELOCITY | ZERO_SNR,
    ],
    "TCDScheduler": [{}, VELOCITY, {"original_inference_steps": 100}],
}


def label(options):
    short = {k: "..." if isinstance(v, list) else v for k, v in options.items()}
    return ",".join(f"{k}={v}" for k, v in short.items()) or "plain"


def torch_class(name):
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    with pytest.MonkeyPatch.context() as patch:  # its noise is given, not drawn
        patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler
    return DPMSolverSDEScheduler


def torch_scheduler(name, config):
    """A scheduler as StableDiffusionPipeline has it after loading."""
    parts = "vae", "text_encoder", "tokenizer", "unet", "safety_checker"
    pipeline = diffusers.StableDiffusionPipeline(
        **dict.fromkeys(parts),
        feature_extractor=None,
        scheduler=torch_class(name).from_config(config),
        requires_safety_checker=False,
    )
    return pipeline.scheduler


def output(x, t):
    """Stands in for the UNet."""
    return np.tanh(1.3 * x + 2.0 * t / 1000 - 1)


def torch_steps(scheduler, steps, z, noises, monkeypatch):
    """Yields (timestep, latents after it) of the pipeline's loop."""
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__],
        "randn_tensor",
        lambda *a, **k: torch.tensor(noises[-1]),
        raising=False,
    )
    scheduler.set_timesteps(steps)
    for name, value in vars(scheduler).items():
        if torch.is_tensor(value) and value.is_floating_point():
            setattr(scheduler, name, value.double())  # of the same float32 numbers
    x = torch.tensor(z).double() * scheduler.init_noise_sigma
    name = type(scheduler).__name__
    options = {"eta": 0.0} if name in ("DDIMScheduler", "TCDScheduler") else {}
    for i, t in enumerate(scheduler.timesteps):
        noises.append(NOISES[i])
        if name == "DPMSolverSDEScheduler":
            scheduler.noise_sampler = brownian(i)
        seen = scheduler.scale_model_input(x, t)
        m = torch.tensor(output(seen.numpy(), float(t)))
        x = scheduler.step(m, t, x, return_dict=False, **options)[0]
        yield float(t), x.numpy()


def brownian(call):
    """The increments over a step and over its first half, of independent noises."""

    def sample(sigma, after):
        if call % 2 == 0:
            return torch.tensor(NOISES[call])
        middle = (sigma * after) ** 0.5
        parts = (sigma - middle) ** 0.5 * NOISES[call - 1]
        parts = parts + (middle - after) ** 0.5 * NOISES[call]
        return parts / (sigma - after) ** 0.5

    return sample


RNG = np.random.default_rng(0)
Z = RNG.normal(size=(2, 4, 8, 8)).astype(np.float32)
NOISES = RNG.normal(size=(80, *Z.shape)).astype(np.float32)


def our_steps(table):
    """Yields (timestep, latents after it), in float64."""
    registers = schedules.start(Z.astype(np.float64))
    for i in range(len(table.t)):
        row = schedules.Schedule(*(column[i] for column in table))
        m = output(row.scale * registers[0], row.t)
        registers = schedules.advance(row, registers, m, NOISES[i])
        yield row.t, registers[0]


def tolerance(name, options):
    """1e-5, but where PyTorch rounds more (sigmas of 4096) or the solver diverges."""
    rounds = name.startswith("Euler") and "rescale_betas_zero_snr" in options
    unstable = {"solver_order": 3, "solver_type": "heun"}
    unstable |= {"algorithm_type": "sde-dpmsolver++"}
    return 1e-4 if rounds or unstable.items() <= options.items() else 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIONS)
def test_every_step_equals_pytorch(name, monkeypatch):
    largest = {}
    for options in OPTIONS[name]:
        config = SD | {"_class_name": name} | options
        for steps in (7, 24) if "KDPM2" not in name else (7,):
            scheduler = torch_scheduler(name, config)
            theirs = list(torch_steps(scheduler, steps, Z, [], monkeypatch))
            ours = list(our_steps(schedules.schedule(config, "", steps)))
            case = f"{label(options)} {steps}"
            t_ours, t_theirs = ([t for t, _ in side] for side in (ours, theirs))
            np.testing.assert_allclose(t_ours, t_theirs, atol=2e-3, err_msg=case)
            errors = [
                relative_error(a, b)
                for (_, a), (_, b) in zip(ours, theirs, strict=True)
            ]
            largest[case] = max(errors) / tolerance(name, options) * 1e-5
    worst = max(largest, key=largest.get)
    print(f"{name}: {len(largest)} cases, at most {largest[worst]:.1e} ({worst})")
    assert largest[worst] < 1e-5, {c: e for c, e in largest.items() if e >= 1e-5}


def table_or_error(config, steps):
    try:
        return schedules.schedule(config, "", steps)
    except UserError as error:
        return str(error)


def is_equal(a, b):
    return all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b, strict=True))


OTHER = {  # another value of a key whose default is None or empty
    "trained_betas": list(np.linspace(1e-3, 0.02, 1000)),
    "sigma_min": 0.5,
    "sigma_max": 5.0,
    "variance_type": "learned",
    "noise_sampler_seed": 3,
    "disable_corrector": [0],
    "solver_p": {},
    "shift_terminal": 0.1,
    "original_inference_steps": 40,
    "num_train_timesteps": 500,
    "lambda_min_clipped": -1.0,
    "solver_order": 1,
}


def other_value(key, default):
    if key in OTHER:
        return OTHER[key]
    if isinstance(default, bool):
        return not default
    return default * 1.5 + 1 if isinstance(default, int | float) else "other"


@pytest.mark.parametrize("kind", schedules.DDPM.schedulers, ids=lambda kind: kind.name)
def test_every_key_is_computed_or_refused_or_known_to_be_harmless(kind):
    defaults = DEFAULTS[kind.class_name]
    plain = {"_class_name": kind.class_name}
    karras = {"use_karras_sigmas": True} if "use_karras_sigmas" in defaults else {}
    bases = [plain, plain | karras]  # some keys have an effect with those alone
    if "final_sigmas_type" in defaults:
        bases.append(plain | SIGMA_MIN)
    tries = [(base, steps) for base in bases for steps in (14, 16)]
    tables = [table_or_error(*one) for one in tries]
    for key, default in defaults.items():
        change = {key: other_value(key, default)}
        changed = [table_or_error(base | change, steps) for base, steps in tries]
        is_refused = any(isinstance(table, str) for table in changed)
        harmless = key in (*schedules.UNUSED, *kind.unused)
        if is_refused:
            assert not harmless, (kind.name, key)
        else:
            same = all(map(is_equal, tables, changed))
            assert same == harmless, (kind.name, key)


@pytest.mark.parametrize("name", DEFAULTS)
def test_keys_and_defaults_are_those_of_diffusers(name):
    parameters = inspect.signature(torch_class(name).__init__).parameters
    theirs = {k: p.default for k, p in parameters.items() if k != "self"}
    assert theirs == DEFAULTS[name]


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "scheduler: beta_.*of no known key",
        ),
        (
            {"_class_name": "SASolverScheduler"},
            "'SASolverScheduler', which is not .*lms",
        ),
        ({"new_option": 3}, "new_option=3 is no key of diffusers' schedulers"),
        ({"thresholding": True}, "thresholding=True; must be False"),
        (
            {"use_karras_sigmas": "yes"},
            "use_karras_sigmas='yes'; must be true or false",
        ),
        ({"steps_offset": "1"}, "steps_offset='1'; must be a whole number"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True; must be False"),
        (
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_karras_sigmas and use_beta_sigmas; at most one",
        ),
        ({"algorithm_type": "other"}, "algorithm_type='other'; must be dpmsolver"),
        ({"algorithm_type": "dpmsolver"}, "'zero' must be sigma_min"),
        ({"solver_type": "other"}, "solver_type='other' must be midpoint or heun"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one' is not one of"),
        ({"beta_schedule": "exp"}, "beta_schedule='exp'; must be one of"),
        ({"trained_betas": [0.1]}, "trained_betas has 1 numbers; must be"),
        ({"trained_betas": "x"}, "trained_betas='x'; must be a list of numbers"),
        ({"prediction_type": "sample"}, "prediction_type='sample' is not one of"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(config, message):
    config = SD | {"_class_name": "DPMSolverMultistepScheduler"} | config
    with pytest.raises(UserError, match=message):
        schedules.schedule(config, "", 7)


@pytest.mark.parametrize(
    "name, config, steps, message",
    [
        (
            "ddim",
            ZERO_SNR,
            7,
            "prediction_type=epsilon divides by zero, and draws black",
        ),
        ("ddpm", ZERO_SNR, 7, "divides by zero"),
        ("lcm", ZERO_SNR, 7, "divides by zero"),
        ("unipc", {"solver_type": "bh1"}, 7, "final_sigmas_type=zero divides by zero"),
        ("unipc", {"predict_x0": False}, 7, "final_sigmas_type=zero divides by zero"),
        ("lcm", {}, 51, "steps=51 must be at most original_inference_steps=50"),
        ("pndm", {"skip_prk_steps": False}, 3, "steps=3 must be at least 4"),
        ("ddim", {"timestep_spacing": "trailing"}, 61, "reaches timestep -1"),
        ("dpmsolver++", {"timestep_spacing": "leading"}, 1000, "comes more than once"),
    ],
)
def test_where_pytorch_fails_or_draws_black_is_refused(name, config, steps, message):
    with pytest.raises(UserError, match=message):
        schedules.schedule(SD | config, name, steps)


@pytest.mark.filterwarnings("ignore")
def test_a_named_scheduler_is_the_one_that_pytorch_makes_of_the_config():
    euler = SD | {"_class_name": "EulerDiscreteScheduler", "sigma_min": 0.1}
    euler |= {"use_karras_sigmas": True, "interpolation_type": "linear"}
    for kind in schedules.DDPM.schedulers:
        own = euler | {"_class_name": kind.class_name} | kind.fixed
        ours = schedules.schedule(euler, kind.name, 7)
        assert is_equal(ours, schedules.schedule(own, "", 7))
        if kind.class_name != "DPMSolverSDEScheduler":
            theirs = torch_scheduler(kind.class_name, euler)
            theirs.set_timesteps(7)
            np.testing.assert_allclose(ours.t, theirs.timesteps, atol=2e-3)
    # what a config lists as left at its default gets that of the class
    unset = {
        "_use_default_values": ["timestep_spacing"],
        "timestep_spacing": "trailing",
    }
    full = complete(SD | unset, "DDIMScheduler")
    assert full["timestep_spacing"] == "leading"


def test_first_latents_have_the_schedulers_scale():
    table = schedules.schedule(SD, "euler", 7)
    assert table.scale[0] * np.sqrt(14.6146**2 + 1) == pytest.approx(14.6146, rel=1e-4)
