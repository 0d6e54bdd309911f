#!/usr/bin/env bash
# packed_kernels.sh SHAPE OUTPUT: builds a published shape with random weights on a GPU machine, then
# serves it in a process without compiler that has seen nothing of the build but the cache folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
output=$2
work=$(mktemp -d -p "${BENCH_WORK:-/tmp}")
mkdir -p "$output" "$work/home"
server=
finish() {
  [ -z "$server" ] || { kill "$server" 2> /dev/null && wait "$server"; } || true
  rm -rf "$work"
}
trap finish EXIT
export PYTHONPATH="runtime${PYTHONPATH:+:$PYTHONPATH}" INTERNVL_RUNTIME_CACHE_ROOT="$work/cache"
export INTERNVL_RUNTIME_TERMINATION_LOG=/dev/null
mkdir -p "$work/cache"
runtime() { python3 -m internvl_runtime "$@"; }
told() { tail -n 1 | python3 -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }
timed() { echo "$SECONDS s: $1"; }

runtime synthesize --shape "$1" --output "$work/model" > /dev/null
source="{\"folder\": {\"path\": \"$work/model\"}}"
weights=$(runtime resolve --source "$source" | told weights)
runtime fetch --source "$source" --weights "$weights" > /dev/null
timed "resolved"
checkpoint=$(runtime convert --weights "$weights" --quantization "${QUANTIZATION:-None}" \
  | tee "$output/convert.jsonl" | told checkpoint)
timed "converted"
runtime build --checkpoint "$checkpoint" --flags '{"maxBatchSize": 32, "maxTilesPerImage": 12,
  "maxSequenceTokens": 8192, "maxInputTokens": 8191, "maxBatchedTokens": 4096,
  "maxTilesPerRequest": 13}' | tee "$output/build.jsonl"
engine=$work/cache/engines/$(told engine < "$output/build.jsonl")
timed "built"
(cd "$engine" && find . -type f -printf '%s %P\n') | sort -k 2
cp "$engine/manifest.json" "$engine/verification.json" "$output"

python=$(command -v python3)
alone() { env -i HOME="$work/home" PATH="$work/home" PYTHONPATH="$PYTHONPATH" LANG=C.UTF-8 \
  ${LD_LIBRARY_PATH:+LD_LIBRARY_PATH="$LD_LIBRARY_PATH"} FLASHINFER_DISABLE_JIT=1 "$@"; }
alone "$python" -c 'import shutil, sys; sys.exit(shutil.which("nvcc") or shutil.which("c++"))'
serving=$SECONDS
alone INTERNVL_RUNTIME_HOST=127.0.0.1 INTERNVL_RUNTIME_METRICS_PORT=0 \
  "$python" -m internvl_runtime serve --engine "$engine" > "$output/server.log" 2>&1 &
server=$!
until python3 -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz')" 2> /dev/null
do
  kill -0 "$server" || { tail -n 30 "$output/server.log"; exit 1; }
  sleep 0.5
done
echo "ready $((SECONDS - serving)) s after its start, without nvcc, c++ and JIT"
runtime bench --url http://127.0.0.1:8000 --picture 1792x1344 --concurrency 1 --requests 8 \
  --output "$output/bench"
find "$work/home" -name '*.so' -o -name '*.o'
