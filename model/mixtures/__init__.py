"""Mixtures of experts, whole or divided over stages."""
