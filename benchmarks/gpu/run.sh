#!/bin/sh
# The GPU benchmarks on a bare machine: no install, no network. Needs Python 3.11 or newer with torch for the
# GPU, numpy, safetensors, Pillow and tqdm.
#
#   benchmarks/gpu/run.sh [arguments of `fasttune bench gpu`]
#
# `--wheels FOLDER` unpacks wheels (diffusers, peft, bitsandbytes, torchao, liger-kernel, ...) for this run: they are
# the contenders. Rows go to benchmarks/results, or to the folder $OUT.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}

"$python" - <<'CHECK' || exit 2
import importlib.util
import sys

if sys.version_info < (3, 11):
    sys.exit(f"run.sh: {sys.executable} is Python {sys.version.split()[0]}; it takes 3.11 or newer "
             "(PYTHON=/path/to/python run.sh chooses another)")
needed = {"torch": "torch", "numpy": "numpy", "safetensors": "safetensors", "PIL": "Pillow", "tqdm": "tqdm"}
missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
if missing:
    sys.exit(f"run.sh: {sys.executable} lacks {', '.join(missing)}: install it there, or choose another "
             "with PYTHON=/path/to/python")
CHECK

export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
if [ -n "${OUT:-}" ]; then
    set -- --out "$OUT" "$@"
fi
# -P: a folder named benchmarks where this is called from is not ours
exec "$python" -P -m benchmarks gpu "$@"
