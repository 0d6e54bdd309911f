#!/usr/bin/env bash
# bench_http.sh SHAPE OUTPUT: measures a published shape with random weights on a GPU machine.
# Needs what the runtime image holds, and INTERNVL_RUNTIME_TOKENIZER_MODEL for InternLM2.
set -euo pipefail
cd "$(dirname "$0")/../.."
WORK=$(mktemp -d -p "${BENCH_WORK:-/tmp}")
export WORK PICTURE=1792x1344 INTERNVL_RUNTIME_PREPARATION_THREADS=8
trap 'rm -rf "$WORK"' EXIT
PYTHONPATH="runtime:hack${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
python3 -m internvl_runtime synthesize --shape "$1" --output "$WORK/model" > /dev/null
CONCURRENCY="${CONCURRENCY:-1 16}" hack/bench.sh "{\"folder\": {\"path\": \"$WORK/model\"}}" "$2"
INTERNVL_RUNTIME_CACHE_ROOT="$WORK/cache" python3 -m gpu.count_syncs "$WORK/engine" \
  | tee "$2/waits.txt"
