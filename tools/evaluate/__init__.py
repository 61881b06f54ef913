"""Model quality: perplexity, KL divergence, HellaSwag."""
