#!/usr/bin/env bash
# test-long.sh PART...: runs every test of tests/PART, a folder or a file, repetitions and matrices
# included, and writes the reports that are committed.
set -uo pipefail
cd "$(dirname "$0")/.."
reports=docs/test-reports
make_guidellm() {
  uv venv -q --allow-existing --python 3.11 .venv-guidellm \
    && uv pip sync -q --require-hashes --python .venv-guidellm/bin/python requirements/guidellm.txt
}

failed=0
for part; do
  [ "$part" != integration ] || make_guidellm || exit
  report=$reports/$(basename "${part//\//-}" .py).txt
  {
    echo "make test-long PARTS=$part, $(date -u +%F), commit $(git rev-parse --short HEAD)"
    echo "$(nproc) cores, $(free --giga | awk '/^Mem/ {print $2}') GB, Linux $(uname -r), $(.venv/bin/python --version)"
    echo "seeds are fixed in the tests; times are of a shared machine"
    echo
  } > "$report"
  .venv/bin/pytest "tests/$part" --durations=25 -rA --no-header --color=no 2>&1 \
    | tee -a /dev/stderr | sed -n '/slowest.*durations/,$p' >> "$report" || failed=1
done
exit $failed
