"""Architectures with latent attention (MLA)."""
