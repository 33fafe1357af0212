#!/usr/bin/env bash
# Measure the head on one NVIDIA GPU, from this checkout alone. It needs torch, and triton for the section `kernels`.
#
#   benchmarks/gpu.sh OUT_DIR [--seconds N] [--small] [SECTION…]
#
# OUT_DIR gets results.json, rewritten after each section, and results.txt, the same as a table. A section that runs out
# of its share of the N seconds (450) leaves out its least important parts, and says so. Without a GPU all sizes are small,
# and parts that need one say so. `--help` lists the sections. Exit status: 0 no problem, 1 problems found.
#
# PYTHON=… chooses the Python. PARTIALFC_DATA=… is a folder of training data for the section `trainer`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m gpu "$@"
