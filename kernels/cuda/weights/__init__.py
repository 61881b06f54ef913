"""Packed weights in GPU memory."""
