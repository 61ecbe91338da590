# SPDX-License-Identifier: Apache-2.0
"""The schedulers of diffusers, one file a family: what each of their steps computes."""
