#!/usr/bin/env bash
# Runs every test, repetitions and matrices included, and writes the report that is committed.
set -uo pipefail
cd "$(dirname "$0")/.."
report=docs/test-reports/test-long.txt
mkdir -p "$(dirname "$report")"
{
  echo "make test-long, $(date -u +%F), commit $(git rev-parse --short HEAD)"
  echo "$(nproc) cores, $(free --giga | awk '/^Mem/ {print $2}') GB, Linux $(uname -r), $(.venv/bin/python --version)"
  echo "seeds are fixed in the tests; times are of a shared machine"
  echo
} > "$report"
uv venv -q --allow-existing --python 3.11 .venv-guidellm || exit
uv pip sync -q --require-hashes --python .venv-guidellm/bin/python requirements/guidellm.txt || exit
.venv/bin/pytest tests --durations=25 -rA --no-header --color=no 2>&1 | tee /dev/stderr \
  | sed -n '/slowest.*durations/,$p' >> "$report"
exit "${PIPESTATUS[0]}"
