"""Commands on models: download, convert, quantize, split, evaluate, benchmark."""
