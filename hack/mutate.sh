#!/usr/bin/env bash
# mutate.sh REPORT [MUTANTS]: lets mutmut change the adapter of TensorRT-LLM's executor, place by place,
# and writes down the changes that no test fails on. An hour on two cores; MUTANTS are names, or
# patterns like internvl_runtime.engine.tensorrt.requests.x__table*, of those that count.
set -euo pipefail
cd "$(dirname "$0")/.."
report=$PWD/$1 mutmut=$PWD/.venv/bin/mutmut scratch=build/mutate
shift
rm -rf "$scratch"
mkdir -p "$scratch"
cp -r runtime/internvl_runtime tests hack pyproject.toml "$scratch"
cd "$scratch"
cat >> pyproject.toml << 'EOF'

[tool.mutmut]
source_paths = ["internvl_runtime"]
only_mutate = ["internvl_runtime/engine/tensorrt/*.py"]
also_copy = ["hack"]
# One family is enough: what differs between the two is not here.
pytest_add_cli_args = ["-p", "no:cacheprovider", "-k", "not internlm2"]
pytest_add_cli_args_test_selection = [
  "tests/unit/runtime/test_tensorrt_requests.py",
  "tests/unit/runtime/test_tensorrt_counts.py",
  "tests/unit/runtime/test_tensorrt_core.py",
  "tests/unit/runtime/test_tensorrt_loading.py",
  "tests/integration/test_tensorrt_engine.py",
]
EOF
# Processes that fork have no threads of OpenMP.
OMP_NUM_THREADS=1 "$mutmut" run --max-children "$(nproc)" "$@" | tr '\r' '\n' | tail -n 3
results=$("$mutmut" results --all true | sed -n '/: not checked$/d; s/^ *\(.*__mutmut_.*\)/\1/p')
survivors=$(grep -v ': \(killed\|timeout\)$' <<< "$results" || true)
{
  echo "hack/mutate.sh, $(date -u +%F), commit $(git -C ../.. rev-parse --short HEAD), $("$mutmut" --version)"
  echo "mutants: $(sed 's/.*: //' <<< "$results" | sort | uniq -c | paste -sd, | tr -s ' ')"
  echo "What hangs is ended by a time-out. What no test fails on:"
  echo
  while read -r mutant; do
    echo "$mutant"
    "$mutmut" show "${mutant%%:*}" | grep '^[-+] ' || true
    echo
  done <<< "$survivors"
} > "$report"
