"""Commands on model files: pull, list, info, perplexity, convert, quantize, imatrix, split."""
