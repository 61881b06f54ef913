"""Architectures whose layers keep a recurrent state for each sequence."""
