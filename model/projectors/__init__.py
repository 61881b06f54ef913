"""Projector files (`mmproj`): a vision model's image encoder and its inputs."""
