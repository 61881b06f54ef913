"""The rows of a sequence in a microbatch: the choice of the rows, and the processing of their results."""
