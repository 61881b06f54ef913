"""The encoder of images of a vision model, beside a stage of the model."""
