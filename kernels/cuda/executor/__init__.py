"""Compiles programs to launches over buffers at fixed addresses, and runs them."""
