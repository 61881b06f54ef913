"""From a program to launches over buffers at fixed addresses, and their execution."""
