# SPDX-License-Identifier: Apache-2.0
"""Immunize text-to-image diffusion models against malicious fine-tuning, in JAX."""

__version__ = "0.1.0"
