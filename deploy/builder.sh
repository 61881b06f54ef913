#!/usr/bin/env bash
# The program that builds images here: the first of docker, podman, buildah that works.
for builder in docker podman buildah; do
  if command -v "$builder" >/dev/null && "$builder" info >/dev/null 2>&1; then
    echo "$builder"
    exit 0
  fi
done
echo "error: no docker, podman or buildah that works here: install one (Debian, Ubuntu: apt-get install buildah)" >&2
exit 1
