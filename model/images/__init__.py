"""Decodes images and prepares them for the encoder of a vision model. Only child processes read image bytes."""
