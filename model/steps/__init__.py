"""The kinds of steps in a program, each with its inputs, weights and result."""
