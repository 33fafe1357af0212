#!/usr/bin/env bash
# Write locks/train.txt and locks/dev.txt: what `make quickstart` and `make test` install, with the digests of all files
# that the index has of these versions, for any Python and machine. Run it after a change of constraints.txt.
#   launch/lock.sh UV       (pip install uv)
set -euo pipefail
uv=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# torch and the libraries of its CUDA builds, which constraints.txt does not have, are the choice of whoever installs it.
grep -Ev '^(#|torch==)' constraints.txt | sed -E 's/^[^=]+/\L&/; :again; s/^([^=]*)_/\1-/; t again' >"$folder/pins"
compile() { "$uv" pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate "$@"; }

lock() { # NAME EXTRAS
    local extra options=()
    for extra in $2; do options+=(--extra "$extra"); done
    echo setuptools >"$folder/build.txt" # builds the package itself
    compile -c constraints.txt "${options[@]}" pyproject.toml "$folder/build.txt" | sed 's/ *;.*//' >"$folder/needed"
    grep -xF -f "$folder/needed" "$folder/pins" >"$folder/$1.in"
    { echo "# Written by launch/lock.sh."; compile --no-deps --generate-hashes "$folder/$1.in"; } >"locks/$1.txt"
}

mkdir -p locks
lock train "train"
lock dev "train export deepspeed dev"
