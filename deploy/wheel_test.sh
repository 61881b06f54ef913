#!/usr/bin/env bash
# Usage: deploy/wheel_test.sh WHEEL [PYTHON]
# Installs a wheel in a new virtual environment, without a compiler, and runs the demo there: two workers answer a
# question. PYTHON creates the environment. Prints the seconds of each step. If this machine has the model in its cache,
# the demo uses that copy.
set -euo pipefail
wheel=$(realpath "${1:?usage: deploy/wheel_test.sh WHEEL [PYTHON]}")
root=$(realpath "$(dirname "$0")/..")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
models=${LLAMACLUST_HOME:-${XDG_CACHE_HOME:-~/.cache}/llamaclust}/models
export LLAMACLUST_HOME=$folder/home LLAMACLUST_STATE_DIR=$folder/state CC=false CXX=false
mkdir "$LLAMACLUST_HOME"
[ ! -d "$models" ] || ln -s "$models" "$LLAMACLUST_HOME/models"

cd "$folder" # In this folder, Python cannot import modules of the source tree.
SECONDS=0
"${2:-python3}" -m venv venv
venv/bin/python -m pip --disable-pip-version-check install -q -c "$root/constraints.txt" "$wheel"
installed=$SECONDS
venv/bin/python -c 'from llamaclust.cluster.front.http.page import assets; assert {"/", "/browser/main.js", "/browser/style.css"} <= {*assets()}'
venv/bin/python -c 'from llamaclust.kernels._native import tls_library; print(tls_library() or exit("error: the wheel has no OpenSSL"))'
venv/bin/python "$root/examples/demo.py"
echo "$(basename "$wheel"): $(($(stat -c %s "$wheel") / 1024)) KiB, installed in $installed s, answered after $SECONDS s"
