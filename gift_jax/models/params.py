# SPDX-License-Identifier: Apache-2.0
"""What all models have in common: configs, random parameters, parameters' shapes."""

import dataclasses

import jax


def from_config(cls, config: dict, **others):
    """Returns cls(**fields), the fields of a config.json's dict that cls has.

    Lists become tuples, so that the result is hashable. Args: others: further fields.
    """
    names = {field.name for field in dataclasses.fields(cls) if field.init}
    names -= {"parent", "name", *others}
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name in names
    }
    return cls(**fields, **others)


def init_params(module, key: jax.Array) -> dict:
    """Returns a model's random parameters, nested.

    Args: module: a Flax module that has `example_inputs()`.
    """
    return module.init(key, *module.example_inputs())["params"]


def parameter_shapes(module) -> dict:
    """Returns the parameters' shapes (nested ShapeDtypeStructs), computing none."""
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
