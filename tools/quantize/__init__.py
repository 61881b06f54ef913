"""Quantization of model files, importance matrices."""
