"""The conversation of `llamaclust chat`: commands, input, files in messages, answers on the screen."""
