"""Projector files (`mmproj`): the encoder of images of a vision model, and its inputs."""
