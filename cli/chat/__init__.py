"""The conversation of `llamaclust chat`: options, commands, input, files in messages, answers on the screen."""
