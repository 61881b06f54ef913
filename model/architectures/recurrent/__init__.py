"""Architectures whose layers keep a recurrent state of each sequence."""
