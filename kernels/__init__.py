"""Arithmetic: quant types x operations, a folder a backend."""
