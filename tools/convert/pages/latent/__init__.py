"""Pages of families with latent attention in all layers."""
