# SPDX-License-Identifier: Apache-2.0
"""Puts configs/ into the wheel, as gift_jax/configs; all else is in pyproject.toml."""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """An editable install needs no copy: gift_jax looks beside itself too."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = pathlib.Path(self.build_lib, "gift_jax", "configs")
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(pathlib.Path("configs").glob("*.py")):
                self.copy_file(str(path), str(folder / path.name))


setup(cmdclass={"build_py": BuildWithConfigs})
