"""The kinds of steps of a program, each with its inputs, weights and result."""
