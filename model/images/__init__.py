"""Images, decoded and prepared for the encoder of a vision model. Child processes do all work on their bytes."""
