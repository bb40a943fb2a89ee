#!/usr/bin/env bash
# Make .venv with everything the project needs; a second run with nothing changed does nothing.
# PYTHON=/path/to/python3.12 chooses the interpreter; otherwise the first fitting one on PATH is taken.
# VENV=folder makes the environment there, with the EXTRAS given (default: cpu,test,lint); VERBOSE=1 shows pip's output.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
extras=${EXTRAS-cpu,test,lint}

fail() {
    echo "setup: error: $1" >&2
    exit 1
}

fits() { # whether $1 runs and is a Python this project supports
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null
}

find_python() {
    local candidate candidates=${PYTHON:-python3 python3.12 python3.11}
    for candidate in $candidates; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed, and found under none of: $candidates (set PYTHON=/path/to/python3.12)"
}

step() { # run a command under a title; its output is shown only if it fails, or with VERBOSE=1
    local title=$1 began=$SECONDS
    shift
    if [ -n "${VERBOSE:-}" ]; then
        echo "setup: $title"
        "$@"
        return
    fi
    printf 'setup: %s ... ' "$title"
    if "$@" >"$log" 2>&1; then
        echo "$((SECONDS - began)) s"
    else
        echo "failed"
        tail -n 20 "$log" >&2
        return 1
    fi
}

mooncake() { # what keeps the connector mooncake from working; nothing where it works
    "$venv/bin/python" - <<'EOF'
from bagel_triton.kv.connectors.base import ConnectorUnavailable
from bagel_triton.kv.connectors.mooncake import load

try:
    load("mooncake.engine")
except (ConnectorUnavailable, ImportError) as error:
    print(error)
EOF
}

unpack_libibverbs() ( # beside Mooncake's modules, from the packages of Debian or Ubuntu; installs nothing
    modules=$("$venv/bin/python" -c 'import mooncake; print(mooncake.__path__[0])')
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    chmod 755 "$folder"
    cd "$folder"
    timeout 60 apt-get -qq download libibverbs1 libnl-3-200 libnl-route-3-200
    for package in *.deb; do
        dpkg --extract "$package" .
    done
    find . \( -name libibverbs.so.1 -o -name 'libnl-*.so.200' \) -exec cp --dereference {} "$modules" \;
    # Mooncake's programs, such as mooncake_master, look for libraries in another folder than its modules do.
    for library in "$modules"/libibverbs.so.1 "$modules"/libnl-*.so.200; do
        ln -sf "$library" "$modules/../mooncake_transfer_engine_non_cuda.libs/"
    done
)

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "Linux on x86_64 is needed; this is $(uname -s) on $(uname -m)"
python=$(find_python)
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv and pip modules; install the package $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"

stamp=$venv/.setup
wanted=$({ "$python" -VV; cat pyproject.toml setup.py build/constraints.txt build/setup_env.sh; } | sha256sum)
if [ -x "$venv/bin/bagel-triton" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "setup: making $venv with $("$python" --version); the first time takes a few minutes"
rm -f "$stamp"
if [ "$("$venv/bin/python" -VV 2>/dev/null)" != "$("$python" -VV)" ]; then
    step "virtual environment" "$python" -m venv --clear "$venv"
fi
install=("$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off --constraint build/constraints.txt)
step "setuptools" "${install[@]}" setuptools
step "the package and its dependencies (1.7 GB with torch, most of the time)" \
    "${install[@]}" --no-build-isolation --editable ".${extras:+[$extras]}"
# Only the server binaries of this wheel are used, so what its Python API needs is left out.
step "tritonserver" "${install[@]}" --no-deps nvidia-pytriton
# The connector mooncake is an extra: without it everything else works, and its tests are skipped.
if [ -z "$extras" ]; then
    : # only the server is wanted
elif step "mooncake" "${install[@]}" --no-build-isolation --editable '.[mooncake]'; then
    if [[ $(mooncake) = *libibverbs* ]]; then
        # The wheel leaves this library to the system, but looks for it beside its own files first.
        step "libibverbs for mooncake" unpack_libibverbs || true
    fi
    missing=$(mooncake)
    [ -z "$missing" ] || echo "setup: $missing; until then its tests are skipped"
else
    echo "setup: the connector mooncake could not be installed; its tests are skipped"
fi
echo "$wanted" >"$stamp"
echo "setup: $venv is ready"
