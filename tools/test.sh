#!/usr/bin/env bash
# Every test. llama.cpp and vLLM bring their own OpenMP runtimes, so each gets a process of its own.
set -uo pipefail
cd "$(dirname "$0")/.."

status=0
closing=()
run() {
    local log
    log=$(mktemp)
    .venv/bin/python -m pytest -m "$1" 2>&1 | tee "$log"
    local rc=${PIPESTATUS[0]}
    [ "$rc" = 0 ] || status=1
    closing+=("$(printf '%-28s %s' "$1:" "$(tail -n 1 "$log")")")
    rm -f "$log"
}

run "not llamacpp and not vllm"
run "llamacpp and not vllm"
if .venv/bin/python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("vllm") is None)'; then
    run "vllm"
else
    closing+=("vllm:                        not run, vLLM is not installed (see the note of make setup)")
    [ "${CI:-}" != true ] || status=1
fi
printf '%s\n' "" "${closing[@]}"
exit "$status"
