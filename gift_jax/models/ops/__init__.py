# SPDX-License-Identifier: Apache-2.0
"""The heavy operations of every model: a plain reference, and what is faster.

`kernels.Kernels` chooses between them; `layers` are the Flax modules built on it.
"""
