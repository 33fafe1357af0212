#!/usr/bin/env bash
# Make the virtual environment and install partialfc with what locks/LOCK.txt names, the digest of each file checked.
# torch is not in the locks: its build is the choice of whoever installs it.
#   launch/install.sh PYTHON VENV TORCH LOCK PIP_ARGS
set -euo pipefail
python=$1 venv=$2 torch=$3 lock=$4
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
            echo "               (the page \"Get started\" of pytorch.org names it, under Compute Platform: CPU. Take one that you"
            echo "               trust: pip takes the highest version that any index offers under a name, dependency confusion;"
            echo "               digests protect what is locked, but not torch and its libraries)"
            echo "        make … TORCH=/path/to/torch-cpu.whl"
            echo "      Continuing in 10 seconds."
            sleep 10
        fi
    fi
fi
# Before torch, which then finds what it needs and brings only itself and its CUDA libraries.
echo "installing the packages of locks/$lock.txt into $venv"
"$venv/bin/pip" install --quiet --progress-bar on --no-deps --no-build-isolation --require-hashes \
    "${pip_args[@]}" -r "locks/$lock.txt" || stop "pip could not install locks/$lock.txt: the lines above say why"
if [ "$(cat "$venv/torch.txt" 2>/dev/null)" != "$torch ${5:-}" ]; then
    echo "installing $torch into $venv"
    "$venv/bin/pip" install --progress-bar on "${pip_args[@]}" "$torch" ||
        stop "pip could not install $torch; choose another with TORCH=…, or give pip arguments with PIP_ARGS=…"
    echo "$torch ${5:-}" >"$venv/torch.txt"
fi
"$venv/bin/pip" install --quiet --no-deps --no-build-isolation -e . || stop "pip could not install partialfc"
