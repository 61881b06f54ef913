"""The kinds of steps of a program: results, inputs and weights of each."""
