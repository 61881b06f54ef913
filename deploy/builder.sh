#!/usr/bin/env bash
# Prints the name of the program with which to build images: the first of docker, podman and buildah that works.
for builder in docker podman buildah; do
  if command -v "$builder" >/dev/null && "$builder" info >/dev/null 2>&1; then
    echo "$builder"
    exit 0
  fi
done
echo "error: no docker, podman or buildah works here: install one (Debian, Ubuntu: apt-get install buildah)" >&2
exit 1
