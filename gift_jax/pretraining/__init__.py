# SPDX-License-Identifier: Apache-2.0
"""How the embedded model emoji-sd is made: tokenizer, CLIP, VAE, UNet."""
