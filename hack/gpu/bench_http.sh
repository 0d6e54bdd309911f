#!/usr/bin/env bash
# bench_http.sh SHAPE OUTPUT: on a GPU machine, a synthetic model of a published shape from weights
# to answers, and the figures of its server. Needs what the runtime image holds, and
# INTERNVL_RUNTIME_TOKENIZER_MODEL for InternLM2.
set -euo pipefail
cd "$(dirname "$0")/../.."
shape=$1 output=$2
work=$(mktemp -d -p "${BENCH_WORK:-/tmp}")
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="runtime:hack${PYTHONPATH:+:$PYTHONPATH}" INTERNVL_RUNTIME_CACHE_ROOT="$work/cache"
export INTERNVL_RUNTIME_TERMINATION_LOG=/dev/null INTERNVL_RUNTIME_PREPARATION_THREADS=8
mkdir -p "$work/cache" "$output"

runtime() { python3 -m internvl_runtime "$@"; }
told() { tail -n 1 | python3 -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }
timed() { echo "$SECONDS s: $1" >&2; }

runtime synthesize --shape "$shape" --output "$work/model" > /dev/null
timed "weights drawn"
source="{\"folder\": {\"path\": \"$work/model\"}}"
weights=$(runtime resolve --source "$source" | told weights)
runtime fetch --source "$source" --weights "$weights" > /dev/null
checkpoint=$(runtime convert --weights "$weights" | told checkpoint)
timed "converted"
torch=$(python3 -c "import torch; print(torch.__version__.partition('+')[0])")
engine=$(runtime build --checkpoint "$checkpoint" --architecture "cpu-$(uname -m)" \
  --versions "{\"torch\": \"$torch\"}" --flags '{"maxBatchSize": 32, "maxSequenceTokens": 8192,
  "maxInputTokens": 8191, "maxBatchedTokens": 4096, "maxTilesPerImage": 12,
  "maxTilesPerRequest": 52}' | told engine)
timed "built"
INTERNVL_RUNTIME_HOST=127.0.0.1 python3 -m internvl_runtime serve --engine "$work/cache/engines/$engine" \
  --step-log "$output/steps.jsonl" > "$output/server.log" 2>&1 &
server=$!
trap 'kill $server; wait $server || true; rm -rf "$work"' EXIT
until curl -sf http://127.0.0.1:8000/readyz > /dev/null; do
  kill -0 $server || { tail -n 30 "$output/server.log"; exit 1; }
  sleep 1
done
timed "ready"
for concurrency in 1 16; do
  runtime bench --url http://127.0.0.1:8000 --picture 1792x1344 --words 40 --max-tokens 64 \
    --concurrency $concurrency --requests $((24 + 4 * concurrency)) --warmup $((2 * concurrency)) \
    --output "$output/c$concurrency"
  timed "measured at concurrency $concurrency"
done
python3 -m gpu.count_syncs "$work/cache/engines/$engine" | tee "$output/syncs.txt"
