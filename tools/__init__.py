"""Programs on the layers below: benchmark, perplexity, model catalog."""
