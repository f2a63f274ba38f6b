#!/usr/bin/env bash
# Installs NIXL into an environment of its own, to be measured beside kvbaton.
# usage: setup_nixl.sh DIR     (340 MB, half a minute)
set -euo pipefail
dir=${1:?usage: setup_nixl.sh DIR}
version=1.5.1
python3 -m venv "$dir"
# Without what it asks for: torch is 4 GB, and imported only where tensors are handed in.
"$dir/bin/pip" install -q --no-deps "nixl==$version" "nixl-cu12==$version"
"$dir/bin/pip" install -q numpy
"$dir/bin/python" -c 'from importlib.metadata import version; import nixl._api; print("nixl", version("nixl"))'
