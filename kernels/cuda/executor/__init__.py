"""Compiles programs to kernel launches over buffers at fixed addresses, and runs the launches."""
