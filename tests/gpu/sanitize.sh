#!/bin/sh
# sanitize.sh: the GPU programs under compute-sanitizer. Usage: tests/gpu/sanitize.sh FOLDER [TOOL...]
#
# FOLDER has the programs (build/tests/gpu, or run.sh's build-gpu; those that are missing are left out). TOOL: memcheck, racecheck,
# synccheck; all without one. Prints a JSON line a program and tool: exit status, findings, seconds. US_SANITIZE_LIMIT (600) is the
# watchdog of one, in seconds; every wait of the engine gets as long, and nothing is timed. What is excused stands in
# sanitize.supp.xml, with its reason. US_SANITIZE_SMALL=1 runs the whole engine alone. Exit 0 if there was no finding.
set -u
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?"usage: sanitize.sh FOLDER [TOOL...]"}
shift
limit=${US_SANITIZE_LIMIT:-600}
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
PATH=$PATH:/usr/local/cuda/bin
export US_TEST_WATCHDOG="$limit"
command -v "$sanitizer" >/dev/null || {
  echo "sanitize.sh: no $sanitizer" >&2
  exit 2
}

findings=0
check() { # check TOOL PROGRAM ARGUMENT...
  tool=$1 program=$2
  shift 2
  [ -x "$folder/$program" ] || return 0
  log=$(mktemp)
  start=$(date +%s)
  timeout -k 5 "$limit" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
    --suppressions "$here/sanitize.supp.xml" "$folder/$program" "$@" >"$log" 2>&1
  status=$?
  found=$(sed -n 's/^=* *\(ERROR SUMMARY\|RACECHECK SUMMARY\): *\([0-9]*\).*/\2/p' "$log" | tail -1)
  printf '{"checker": "%s", "program": "%s", "status": %s, "findings": %s, "seconds": %s}\n' "$tool" "$program $*" \
    "$status" "${found:-null}" $(($(date +%s) - start))
  if [ "$status" -ne 0 ] && [ "$status" -ne 77 ]; then
    findings=$((findings + 1))
    grep '^=====' "$log" | head -60 >&2
    grep -v '^=====' "$log" | tail -5 >&2
  fi
  rm -f "$log"
}

for tool in ${*:-memcheck racecheck synccheck}; do
  # The whole engine: four layers, one rank, prompts, drafter, rounds with and without filters.
  check "$tool" engine_exact small
  # The operations by themselves, at shapes of the published model. The lab's weights fill gigabytes: racecheck keeps no account of
  # global memory, so it may see them too.
  [ -z "${US_SANITIZE_SMALL:-}" ] || continue
  check "$tool" engine_round
  check "$tool" engine_attention
  for part in gemm route experts reduce; do check "$tool" kernel_lab 1 "$part"; done
  for part in products rows attention; do check "$tool" prefill_lab 1 "$part"; done
done
[ "$findings" -eq 0 ]
