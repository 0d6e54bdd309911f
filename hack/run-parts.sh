#!/usr/bin/env bash
# run-parts.sh TARGET...: runs make targets, stops at the first that fails, shows their times.
set -uo pipefail
cd "$(dirname "$0")/.."
times=()
for target in "$@"; do
  started=$SECONDS
  echo "=== make $target"
  make --no-print-directory "$target" || { echo "FAILED: make $target"; exit 1; }
  times+=("$(printf '  %-18s %5d s' "$target" $((SECONDS - started)))")
done
printf '%s\n' "=== times" "${times[@]}" "$(printf '  %-18s %5d s' all $SECONDS)"
