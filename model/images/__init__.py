"""Images, decoded and prepared for the encoder of a vision model. Only child processes read their bytes."""
