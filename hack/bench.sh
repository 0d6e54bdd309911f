#!/usr/bin/env bash
# bench.sh SOURCE OUTPUT: from weights to answers on this machine, and the figures of the server.
# SOURCE is JSON as for `internvl-runtime resolve`; the variables below may be set. A WORK folder
# that is given stays, with the engine as WORK/engine.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$1 output=$2
: "${PYTHON:=python3}" "${PICTURE:=1280x720}" "${MAX_TOKENS:=64}" "${CONCURRENCY:=1 4 16}"
: "${MAX_SEQUENCE_TOKENS:=8192}" "${MAX_BATCHED_TOKENS:=4096}"
work=${WORK:-$(mktemp -d)}
server=
finish() {
  [ -z "$server" ] || { kill "$server" && wait "$server"; } || true
  [ -n "${WORK:-}" ] || rm -rf "$work"
}
trap finish EXIT
export PYTHONPATH="runtime${PYTHONPATH:+:$PYTHONPATH}" INTERNVL_RUNTIME_CACHE_ROOT="$work/cache"
export INTERNVL_RUNTIME_TERMINATION_LOG=/dev/null INTERNVL_RUNTIME_HOST=127.0.0.1
mkdir -p "$work/cache" "$output"

runtime() { "$PYTHON" -m internvl_runtime "$@"; }
told() { tail -n 1 | "$PYTHON" -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }
is_ready() {
  "$PYTHON" -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz')" 2> /dev/null
}
timed() { echo "$SECONDS s: $1" >&2; }

weights=$(runtime resolve --source "$source" | told weights)
runtime fetch --source "$source" --weights "$weights" > /dev/null
checkpoint=$(runtime convert --weights "$weights" | told checkpoint)
timed "converted"
engine=$(runtime build --checkpoint "$checkpoint" --flags "{\"maxBatchSize\": 32, \"maxTilesPerImage\": 12,
  \"maxSequenceTokens\": $MAX_SEQUENCE_TOKENS, \"maxInputTokens\": $((MAX_SEQUENCE_TOKENS - 1)),
  \"maxBatchedTokens\": $MAX_BATCHED_TOKENS, \"maxTilesPerRequest\": 13}" | told engine)
ln -sfn "$work/cache/engines/$engine" "$work/engine"
timed "built"
"$PYTHON" -m internvl_runtime serve --engine "$work/engine" --step-log "$output/steps.jsonl" \
  > "$output/server.log" 2>&1 &
server=$!
until is_ready; do
  kill -0 "$server" || { tail -n 30 "$output/server.log"; exit 1; }
  sleep 1
done
timed "ready"
for concurrency in $CONCURRENCY; do
  runtime bench --url http://127.0.0.1:8000 --picture "$PICTURE" --words 40 \
    --max-tokens "$MAX_TOKENS" --concurrency "$concurrency" --requests $((24 + 4 * concurrency)) \
    --warmup $((2 * concurrency)) --output "$output/c$concurrency"
  timed "measured at concurrency $concurrency"
done
runtime plot-steps "$output/steps.jsonl" --output "$output/steps.svg"
