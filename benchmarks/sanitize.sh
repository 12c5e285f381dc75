#!/bin/sh
# compute-sanitizer's memcheck and racecheck over every CUDA rung and the case table, several processes at a
# time; what each found goes to gpu_tests.json beside the results.
#   benchmarks/sanitize.sh [--quick] [--only NAME] [--deadline SECONDS] [--commit ID] [--out FOLDER]
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" exec python3 tests/gpu/run.py sanitize "$@"
