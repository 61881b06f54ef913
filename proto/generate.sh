#!/bin/sh
# Usage: proto/generate.sh [PYTHON]
# Regenerates the stubs in this folder from the .proto files, with pinned tools in a temporary virtual environment.
set -eu
python="${1:-python3}"
cd "$(dirname "$0")/.."
tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
"$python" -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip --disable-pip-version-check -q install grpcio-tools==1.80.0 mypy-protobuf==5.1.0
mkdir "$tools/out"
PATH="$tools/venv/bin:$PATH" "$tools/venv/bin/python" -m grpc_tools.protoc -Illamaclust/proto=proto \
  --python_out="$tools/out" --mypy_out="$tools/out" $(ls proto/*.proto | sed 's|^|llamaclust/|')
cp "$tools"/out/llamaclust/proto/*_pb2.py "$tools"/out/llamaclust/proto/*_pb2.pyi proto/
cat proto/*.proto | sha256sum | cut -d' ' -f1 > proto/protos.sha256
