# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x, 2.x and XL in one safetensors file, by their original names."""
