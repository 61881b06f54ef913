#!/usr/bin/env bash
# Usage: deploy/image_test.sh IMAGE
# Tests an image: a cluster of two workers in a container, run by the image's user, answers the demo's question. The
# container is run by docker, podman or buildah. If this machine has the model, the container uses that copy.
set -euo pipefail
image=${1:?usage: deploy/image_test.sh IMAGE}
models=${LLAMACLUST_HOME:-${XDG_CACHE_HOME:-~/.cache}/llamaclust}/models

script='set -e
test "$(id -u)" = 10001
if [ -d /models ]; then mkdir -p "$LLAMACLUST_HOME"; ln -s /models "$LLAMACLUST_HOME/models"; fi
llamaclust up --detach >&2
python3 -I /opt/llamaclust/healthcheck.py >&2
echo "What is the capital of France?" | llamaclust chat --temperature 0 --system "You answer questions correctly and briefly, in English."
llamaclust down >&2'

mount=()
[ ! -d "$models" ] || mount=(--volume "$models:/models:ro")
case ${BUILDER:=$(cd "$(dirname "$0")" && ./builder.sh)} in
  buildah)
    container=$(buildah from --pull-never "$image")
    trap 'buildah rm "$container" >/dev/null' EXIT
    answer=$(buildah run --isolation "${BUILDAH_ISOLATION:-chroot}" "${mount[@]}" "$container" -- sh -c "$script") ;;
  *)
    answer=$("$BUILDER" run --rm --read-only --tmpfs /tmp --tmpfs /var/lib/llamaclust:uid=10001,gid=10001,mode=0700 --cap-drop ALL \
      --security-opt no-new-privileges "${mount[@]}" --entrypoint sh "$image" -c "$script") ;;
esac
echo "$answer"
case $answer in *Paris*) ;; *) echo "error: the image's answer is wrong" >&2; exit 1 ;; esac
