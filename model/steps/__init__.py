"""The kinds of steps in a program, with their inputs, weights and results."""
