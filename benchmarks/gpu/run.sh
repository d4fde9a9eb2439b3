#!/bin/sh
# The GPU benchmarks on a bare machine with torch (and, for the training steps, numpy, safetensors and
# Pillow): no install, no network.
#
#   benchmarks/gpu/run.sh [--wheels FOLDER] [arguments of `fasttune bench gpu`]
#
# Wheels in FOLDER (diffusers, peft, bitsandbytes, torchao, liger-kernel, ...) are unpacked beside the source tree
# for this run, and are the contenders. Rows go to benchmarks/results, or to the folder $OUT.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ "${1:-}" = "--wheels" ]; then
    wheels=${2:?--wheels needs a folder}
    shift 2
    [ -d "$wheels" ] || { echo "run.sh: --wheels $wheels: no such folder" >&2; exit 2; }
    # A wheel is a zip file of what belongs into site-packages; pip is not always there.
    for wheel in "$wheels"/*.whl; do
        [ -e "$wheel" ] || { echo "run.sh: --wheels $wheels: no wheels in it" >&2; exit 2; }
        "$python" -m zipfile -e "$wheel" "$site"
    done
fi

export PYTHONPATH="$root:$root/kernels:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
cd "$root"
if [ -n "${OUT:-}" ]; then
    set -- --out "$OUT" "$@"
fi
status=0
"$python" -m benchmarks gpu "$@" || status=$?
exit "$status"
