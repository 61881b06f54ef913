"""Architectures whose attention is latent."""
