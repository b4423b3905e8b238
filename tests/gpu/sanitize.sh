#!/bin/sh
# sanitize.sh: the GPU programs under compute-sanitizer. Usage: tests/gpu/sanitize.sh FOLDER [TOOL...]
#
# FOLDER has the programs (build/tests/gpu, or run.sh's build-gpu; those that are missing are left out). TOOL: memcheck, racecheck,
# synccheck; all without one. Prints a JSON line a program and tool: exit status, findings, seconds. US_SANITIZE_LIMIT (600) is the
# watchdog of one, in seconds; every wait of the engine gets as long, and nothing is timed. Race reports that are no races stand in
# sanitize.excused, with their reasons; they are counted apart. US_SANITIZE_SMALL=1 runs the whole engine alone. Exit 0 if there was
# no other finding.
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

# The reports of a log that are not excused; the last line: how many were, and how many were not.
judge() { # judge TOOL LOG
  awk -v tool="$1" '
    BEGIN { n = 0 }
    function name(text) {
      sub(/^.* access at /, "", text); sub(/^\[clone [^]]*\] /, "", text); sub(/^(void|static|bool|uint4|unsigned int) /, "", text)
      sub(/[<(].*/, "", text)
      return text
    }
    function excuse(a, b, i) {
      for (i = 0; i < n; i++)
        if ((first[i] == a && second[i] == b) || (first[i] == b && second[i] == a)) return 1
      return 0
    }
    function finish() {
      if (!report) return
      if (fine && others) excused++; else { left++; printf "%s", report }
      report = ""
    }
    FNR == NR { if ($1 == tool) { first[n] = $2; second[n++] = $3 } next }
    /^========= *(Error|Warning|Invalid|Barrier|Program hit|Uninitialized|Divergent|Leaked|Race|Missing)/ {
      finish(); report = $0 "\n"; fine = /Race reported/; others = 0; base = name($0); next
    }
    report && /^========= +and (Read|Write) access at/ { report = report $0 "\n"; others++; if (!excuse(base, name($0))) fine = 0; next }
    /^========= *$/ { finish(); next }
    /^========= .*SUMMARY/ { finish(); next }
    report { report = report $0 "\n" }
    END { finish(); printf "%d %d\n", excused, left }' "$here/sanitize.excused" "$2"
}

failed=0
check() { # check TOOL PROGRAM ARGUMENT...
  tool=$1 program=$2
  shift 2
  [ -x "$folder/$program" ] || return 0
  log=$(mktemp)
  start=$(date +%s)
  timeout -k 5 "$limit" "$sanitizer" --tool "$tool" --print-limit 1000 "$folder/$program" "$@" >"$log" 2>&1
  status=$?
  grep -q COMPUTE-SANITIZER "$log" || status=2 # it never looked
  left=$(judge "$tool" "$log")
  set -- "$program $*" "$(echo "$left" | tail -1)"
  printf '{"checker": "%s", "program": "%s", "status": %s, "findings": %s, "excused": %s, "seconds": %s}\n' "$tool" "$1" \
    "$status" "${2#* }" "${2% *}" $(($(date +%s) - start))
  if [ "$status" -ne 77 ] && { [ "$status" -ne 0 ] || [ "${2#* }" -ne 0 ]; }; then
    failed=$((failed + 1))
    echo "$left" | sed '$d' | head -80 >&2
    grep -v '^=====' "$log" | tail -5 >&2
  fi
  rm -f "$log"
}

[ $# -gt 0 ] || set -- memcheck racecheck synccheck
for tool; do
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
[ "$failed" -eq 0 ]
