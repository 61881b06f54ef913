"""Quantization of model files, and importance matrices."""
