"""KV memory of the cluster as the scheduler sees it: blocks, windows, states of sequences, shared prefixes."""
