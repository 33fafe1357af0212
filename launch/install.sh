#!/usr/bin/env bash
# Create the virtual environment and install partialfc with some of its extras.
#   launch/install.sh PYTHON VENV TORCH EXTRAS PIP_ARGS
set -euo pipefail
python=$1 venv=$2 torch=$3 extras=$4
read -ra pip_args <<<"${5:-}"

stop() { printf 'error: %s\n' "$@" >&2; exit 1; }

command -v "$python" >/dev/null || stop "$python is not installed: apt-get install python3 python3-venv"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "$("$python" --version) is too old, Python 3.11 or newer is needed; choose one with: make PYTHON=python3.12 …"
if [ ! -x "$venv/bin/pip" ]; then
    "$python" -m venv "$venv" >/dev/null || stop "cannot create a virtual environment: apt-get install python3-venv"
fi

if [ "$(cat "$venv/torch.txt" 2>/dev/null)" != "$torch ${5:-}" ]; then
    # Ask pip for its plan first: the default build for Linux brings several GB of CUDA.
    plan=$venv/plan.json && rm -f "$plan"
    "$venv/bin/pip" install --dry-run --quiet --report "$plan" "${pip_args[@]}" "$torch" >/dev/null 2>&1 || true
    if "$venv/bin/python" -c '
import json, sys
try:
    names = [item["metadata"]["name"] for item in json.load(open(sys.argv[1]))["install"]]
except (OSError, ValueError):  # pip itself will report the error
    names = []
sys.exit(not any(name.startswith("nvidia") for name in names))' "$plan"; then
        echo "note: pip takes a CUDA build of torch here: several GB."
        if ! command -v nvidia-smi >/dev/null; then
            echo "      This machine shows no NVIDIA GPU. For a CPU build, stop this (Ctrl-C) and name one, for example"
            echo "        make … PIP_ARGS='--extra-index-url URL-OF-AN-INDEX-WITH-CPU-BUILDS'"
            echo "               (the page \"Get started\" of pytorch.org names it, under Compute Platform: CPU)"
            echo "        make … TORCH=/path/to/torch-cpu.whl"
            echo "      Continuing in 10 seconds."
            sleep 10
        fi
    fi
    echo "installing $torch into $venv"
    "$venv/bin/pip" install --progress-bar on "${pip_args[@]}" "$torch" ||
        stop "pip could not install $torch; choose another with TORCH=…, or give pip arguments with PIP_ARGS=…"
    echo "$torch ${5:-}" >"$venv/torch.txt"
fi
echo "installing partialfc[$extras] into $venv"
# The constraints pin the tested versions; the user may have chosen another torch.
grep -v '^torch==' constraints.txt >"$venv/constraints.txt"
"$venv/bin/pip" install --quiet --progress-bar on "${pip_args[@]}" -c "$venv/constraints.txt" -e ".[$extras]" ||
    stop "pip could not install partialfc's dependencies: the lines above say which"
