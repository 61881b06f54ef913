#!/usr/bin/env bash
# Makes a folder for a machine with an NVIDIA GPU and no network, to run this tree's GPU tests and benchmarks there:
#
#   benchmarks/gpu_support/kit.sh OUT [--python 3.12] [--architecture 90] [--nvrtc 13.0] [--wheel FILE] [PACKAGE ...]
#
# On that machine, source OUT/setup.sh with bash in a copy of the tree. The machine needs Python with CuPy, NVRTC, pytest and
# any other packages that setup.sh names. OUT can include small packages that are named here. Python and CUDA sources are the
# tree's. Compiled C++ comes from the wheel (by default, `make wheel` builds one). CUDA modules are compiled here for one
# architecture and one version of NVRTC, and other modules are compiled on that machine. Modules are kept under build/, so
# that a second call is fast. At the end, the script prints the size of tree and kit, and fails if it is above 62 MiB.
set -euo pipefail
root=$(realpath "$(dirname "$0")/../..")
python=$root/.venv/bin/python
pip=("$python" -m pip --disable-pip-version-check -q)
usage="usage: $0 OUT [--python 3.12] [--architecture 90] [--nvrtc 13.0] [--wheel FILE] [PACKAGE ...]"
version=3.12 architecture=90 nvrtc=13.0 wheel='' out=''
packages=(annotated-types cffi cryptography cuda-pathfinder execnet ifaddr llguidance nanobind-backend pillow protobuf
  psutil pycparser pydantic pydantic-core pytest-asyncio pytest-timeout pytest-xdist starlette typer typing-inspection
  uvicorn zeroconf)

fail() { echo "$usage" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --python) version=${2-}; shift 2 || fail ;;
    --architecture) architecture=${2-}; shift 2 || fail ;;
    --nvrtc) nvrtc=${2-}; shift 2 || fail ;;
    --wheel) wheel=${2-}; shift 2 || fail ;;
    -*) fail ;;
    *) if [ -z "$out" ]; then out=$1; else packages+=("$1"); fi; shift ;;
  esac
done
[ -n "$out" ] || fail
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "$wheel" ]; then
  make -C "$root" wheel
  wheel=$(echo "$root"/dist/*.whl)
fi
"$python" -m zipfile -e "$wheel" "$work/wheel"
install -D -t "$work/content/native" "$work/wheel/llamaclust/kernels/_native.abi3.so"
mkdir "$work/content/packages"
cp -r "$work"/wheel/llamaclust-*.dist-info "$work/content/packages" # Benchmarks record the version.

# pip matches the names of platforms exactly.
platforms=(--platform manylinux1_x86_64 --platform manylinux2014_x86_64)
for minor in $(seq 5 39); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
"${pip[@]}" download --no-deps --only-binary=:all: --implementation cp --python-version "$version" "${platforms[@]}" \
  -c "$root/constraints.txt" -d "$work/wheels" "${packages[@]}"
for one in "$work"/wheels/*.whl; do "$python" -m zipfile -e "$one" "$work/content/packages"; done

compiler=nvidia-cuda-nvrtc
[ "${nvrtc%%.*}" != 12 ] || compiler=nvidia-cuda-nvrtc-cu12
"${pip[@]}" install --no-deps --target "$work/nvrtc" "$compiler==$nvrtc.*"
"$python" "$root/benchmarks/gpu_support/cubins.py" "$work"/nvrtc/nvidia/*/lib "$architecture" "$work/content/kernels" \
  --keep "$root/build/gpu-kit-kernels"
echo "$nvrtc" > "$work/content/nvrtc"

tar -C "$work/content" --sort=name -cf - . | xz --x86 --lzma2=preset=9 > "$out/content.tar.xz"
cp "$root"/benchmarks/gpu_support/{setup.sh,unpack.py} "$out"

limit_mib=62
mib() { awk '{ sum += $1 } END { printf "%.1f", sum / 1048576 }'; }
tree_mib=$(cd "$root" && { git ls-files -zco --exclude-standard | xargs -0 stat -c %s -- 2> /dev/null || true; } | mib)
kit_mib=$(find "$out" -type f -printf '%s\n' | mib)
total_mib=$(awk "BEGIN { print $tree_mib + $kit_mib }")
echo "$root: $tree_mib MiB, $out: $kit_mib MiB, together $total_mib MiB"
if awk "BEGIN { exit !($total_mib > $limit_mib) }"; then
  echo "this is above $limit_mib MiB: leave out test data, which GPU tests do not read, by
  git sparse-checkout set --no-cone '/*' '!/tests/data/'
until git sparse-checkout disable" >&2
  exit 1
fi
