#!/usr/bin/env bash
# Pack what a GPU machine without this project's packages needs for bench/gpu_run.sh: .cache/gpu_kit.tar.xz.
# Tritonserver comes from .venv, packages for CPython 3.12 at the versions of build/constraints.txt from the registry.
# The machine is expected to have torch for CUDA, transformers, safetensors, pillow, httpx, pytest and cuda-bindings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
limit_mb=35 # with the tracked files less than 64 MiB
out=.cache/gpu_kit.tar.xz
kit=.cache/gpu_kit
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
packages=(annotated-doc annotated-types click deprecated h11 importlib-metadata msgspec numpy opentelemetry-api prometheus-client
    pydantic pydantic-core python-multipart python-rapidjson shtab starlette tritonclient typing-extensions typing-inspection
    uvicorn wrapt zipp)

versions() { # NAME==VERSION of each package, as .venv has it
    .venv/bin/python - "$@" <<'EOF'
import sys
from importlib.metadata import PackageNotFoundError, version

for name in sys.argv[1:]:
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:  # of no need in these versions
        continue
EOF
}

rm -rf "$kit" && mkdir -p "$kit/wheels"
# tritonclient's wheels for Linux bring perf_analyzer; the one for any platform is its Python alone.
versions "${packages[@]}" | grep -v '^tritonclient' >"$kit/requirements.txt"
.venv/bin/python -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 \
    --dest "$kit/wheels" -r "$kit/requirements.txt"
.venv/bin/python -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --platform any --dest "$kit/wheels" "$(versions tritonclient)"
for wheel in "$kit"/wheels/*.whl; do
    .venv/bin/python -m zipfile -e "$wheel" "$kit"
done
for part in "$kit"/*.data/purelib "$kit"/*.data/platlib; do # what pip would put beside the rest
    [ ! -d "$part" ] || cp -r "$part/." "$kit/"
done
rm -rf "$kit/wheels" "$kit/requirements.txt" "$kit"/*.data
# Tests and build tools of the largest package; its machine code and type stubs stay.
find "$kit/numpy" -type d \( -name tests -o -name f2py -o -name distutils \) -prune -exec rm -rf {} +
find "$kit" \( -name '*.pyi' -o -name '__pycache__' \) -prune -exec rm -rf {} +

server=pytriton/tritonserver
mkdir -p "$kit/$server/backends" "$kit/$server/bin" "$kit/$server/python_backend_stubs"
cp "$site/pytriton/__init__.py" "$kit/pytriton/" 2>/dev/null || true
cp -r "$site/$server/backends/python" "$kit/$server/backends/"
cp "$site/$server/bin/tritonserver" "$kit/$server/bin/"
cp -r "$site/$server/python_backend_stubs/3.12" "$kit/$server/python_backend_stubs/"
cp -r "$site/nvidia_pytriton.libs" "$kit/"
strip_from=("$kit/$server" "$kit/nvidia_pytriton.libs" "$kit"/rapidjson*.so "$kit/wrapt")
find "${strip_from[@]}" -type f -exec strip --strip-unneeded {} + 2>/dev/null || true
nice tar -C "$kit" -cf - . | nice xz --x86 --lzma2=preset=9 >"$out"
rm -rf "$kit"
size=$(stat -c %s "$out")
echo "$out: $((size / 1000000)) MB"
[ "$size" -le $((limit_mb * 1000000)) ] || { echo "gpu-kit: error: more than $limit_mb MB" >&2; exit 1; }
