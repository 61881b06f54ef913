"""Converters of model families with latent attention in all layers."""
