"""Blocks of states of sequences: which one a sequence reads and writes, and which ones others may go on from."""
