#!/usr/bin/env bash
# .venv from the hashed locks: first what every machine can have (edge), then vLLM for CPU on top of it.
# Without vLLM the project runs on llama.cpp; in CI (CI=true) that is an error. Done before: returns at once.
set -euo pipefail
cd "$(dirname "$0")/.."

fits() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if fits "$name"; then echo "$name"; return; fi
    done
    echo "setup: no Python >= 3.11 with venv found: install one, or name it: make setup PYTHON=/path/to/python" >&2
    return 1
}

install() {
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation "$@"
}

without_vllm() {
    cat >&2 <<'NOTE'
setup: vLLM is not installed, so the cloud side runs on llama.cpp. vLLM for CPU needs torch 2.13.0+cpu, which pip
       found in no package index it knows. Set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index (its address:
       https://pytorch.org/get-started/locally/) and run make again. The lock has that build's hash for
       Python 3.11 on Linux x86-64; on other machines run `make lock` with the index set first.
NOTE
    if [ "${CI:-}" = true ]; then
        echo "setup: in CI (CI=true) this is an error" >&2
        return 1
    fi
}

stamp=.venv/.installed
locks=$(cat requirements/*.txt pyproject.toml tools/setup.sh | cksum)
done_before=$(cat "$stamp" 2>/dev/null || true)
if [ "$done_before" = "$locks cloud-cpu" ]; then exit 0; fi
if [ "$done_before" = "$locks edge" ] && [ "${CI:-}${PIP_EXTRA_INDEX_URL:-}" = "" ]; then without_vllm; exit; fi

if ! [ -x .venv/bin/python ] || ! fits .venv/bin/python; then
    python=$(find_python)
    "$python" -m venv --clear .venv
fi
echo "setup: $(.venv/bin/python --version), edge packages; llama.cpp is compiled (about 6 minutes on two cores)"
install --require-hashes -r requirements/build.txt
CMAKE_ARGS="${CMAKE_ARGS--DLLAVA_BUILD=OFF}" install --require-hashes -r requirements/edge.txt
install --editable .
flavour=cloud-cpu
echo "setup: vLLM for CPU"
install --require-hashes -r requirements/cloud-cpu.txt || { flavour=edge; without_vllm; }
echo "$locks $flavour" >"$stamp"
echo "setup: done ($flavour)"
