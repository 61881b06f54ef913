"""Drafts of a small model, computed in the process of a coordinator."""
