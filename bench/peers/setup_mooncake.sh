#!/usr/bin/env bash
# Installs Mooncake's transfer engine into an environment of its own, to be measured beside kvbaton.
# usage: setup_mooncake.sh DIR     (180 MB, half a minute)
set -euo pipefail
dir=${1:?usage: setup_mooncake.sh DIR}
version=0.3.13.post1
python3 -m venv "$dir"
"$dir/bin/pip" install -q "mooncake-transfer-engine-non-cuda==$version"
# The wheel needs libibverbs even for TCP. Where the system has none, Debian's packages are unpacked into the environment.
mkdir -p "$dir/lib/verbs"
if ! ldconfig -p | grep -q 'libibverbs\.so\.1'; then
    packages=$(mktemp -d)
    (cd "$packages" && apt-get download -qq libibverbs1 libnl-3-200 libnl-route-3-200)
    for package in "$packages"/*.deb; do dpkg-deb -x "$package" "$packages/root"; done
    find "$packages/root" -name 'lib*.so.*' -path '*x86_64-linux-gnu/lib*' -exec cp -P {} "$dir/lib/verbs/" \;
    rm -r "$packages"
fi
LD_LIBRARY_PATH="$dir/lib/verbs" "$dir/bin/python" -c \
    'from importlib.metadata import version; import mooncake.engine; print("mooncake", version("mooncake-transfer-engine-non-cuda"))'
