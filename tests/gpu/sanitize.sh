#!/bin/sh
# sanitize.sh: the GPU programs under compute-sanitizer. Usage: tests/gpu/sanitize.sh FOLDER [TOOL...]
#
# FOLDER has the programs (build/tests/gpu, or run.sh's build-gpu; those that are missing are left out). TOOL: memcheck, racecheck,
# synccheck; all without one. Prints a JSON line a program and tool: exit status, findings, seconds. US_SANITIZE_LIMIT (600) is the
# watchdog of one, in seconds; every wait of the engine gets as long, shapes are small, and nothing is timed. Reports go to stderr,
# each pair of source lines once with its counts; race reports that are no races stand in sanitize.excused with their reasons and are
# counted apart. US_SANITIZE_SMALL=1 runs the whole engine alone, US_SANITIZE_ONLY=PATTERN the programs that match. Exit 0 if there
# was no other finding and every program came to its end.
set -u
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?"usage: sanitize.sh FOLDER [TOOL...]"}
shift
limit=${US_SANITIZE_LIMIT:-600}
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
PATH=$PATH:/usr/local/cuda/bin
export US_TEST_WATCHDOG="$limit" NV_COMPUTE_SANITIZER_MAX_RACECHECK_HAZARDS=400000000
command -v "$sanitizer" >/dev/null || {
  echo "sanitize.sh: no $sanitizer" >&2
  exit 2
}

# A log's reports, each once: how often it came, how many hazards it counted, what it says with functions and source lines, and whether
# it is excused. The last line: reports, how many of them are excused, how many not.
judge() { # judge TOOL LOG
  awk -v tool="$1" '
    function name(text) { # of the function
      sub(/^.* at /, "", text); sub(/^\[clone [^]]*\] /, "", text)
      sub(/[<(+].*/, "", text)
      sub(/^.* /, "", text) # what a template returns
      return text
    }
    function place(text, at) { # "function (file:line)"
      at = text
      if (!sub(/^.* in /, "", at)) return name(text)
      sub(/ *\[.*/, "", at)
      sub(/^.*\//, "", at)
      return name(text) " (" at ")"
    }
    function hazards(text) { return match(text, /\[[0-9]+ hazards?\]/) ? substr(text, RSTART + 1) + 0 : 0 }
    function excuse(a, b) { return ((a, b) in reason) ? reason[a, b] : ((b, a) in reason) ? reason[b, a] : "" }
    function finish(key) {
      if (what == "") return
      key = what
      fine = race && others > 0 && strangers == 0
      count[key]++; sum[key] += total; good[key] = fine; why[key] = because
      if (fine) excused++; else left++
      what = ""
    }
    FNR == NR {
      if ($1 == tool) { text = $0; sub(/^[^ ]+ [^ ]+ [^ ]+ /, "", text); reason[$2, $3] = text }
      next
    }
    /^========= *(Error|Warning|Invalid|Barrier|Program hit|Uninitialized|Divergent|Leaked|Race|Missing)/ {
      finish()
      race = /Race reported/; others = strangers = 0; because = ""; total = hazards($0); placed = race
      what = $0; sub(/^========= */, "", what)
      if (race) { base = name($0); kind = /Write access/ ? "write" : "read"; what = "race: " kind " " place($0) }
      next
    }
    what == "" { next }
    race && /^========= +and (Read|Write) access at/ {
      others++; total += hazards($0); reasoned = excuse(base, name($0))
      if (reasoned == "") strangers++; else because = reasoned
      other = " | " (/Write access/ ? "write " : "read ") place($0)
      if (!index(what " |", other " |")) what = what other
      next
    }
    !placed && /^========= +at / { what = what " " place($0); placed = 1; next }
    /^========= *$/ || /^========= .*SUMMARY/ { finish() }
    END {
      finish()
      for (key in count)
        printf "%s %d x, %d hazards: %s%s\n", good[key] ? "excused" : "NOT EXCUSED", count[key], sum[key], key, \
               good[key] ? ": " why[key] : "" | "sort"
      close("sort")
      printf "%d %d %d\n", excused + left, excused, left
    }' "$here/sanitize.excused" "$2"
}

failed=0
check() { # check TOOL PROGRAM ARGUMENT...
  tool=$1 program=$2
  shift 2
  [ -x "$folder/$program" ] || return 0
  [ -z "${US_SANITIZE_ONLY:-}" ] || echo "$program $*" | grep -Eq "$US_SANITIZE_ONLY" || return 0
  log=$(mktemp)
  start=$(date +%s)
  barriers= # of a block: initialised in a loop, they are not counted by themselves
  [ "$tool" = memcheck ] || barriers='--num-cuda-barriers 64'
  # shellcheck disable=SC2086 # none or two words
  timeout -k 5 "$limit" "$sanitizer" --tool "$tool" $barriers --print-limit 100000 "$folder/$program" "$@" >"$log" 2>&1
  status=$?
  grep -q COMPUTE-SANITIZER "$log" || status=2 # it never looked
  reports=$(judge "$tool" "$log")
  counts=$(echo "$reports" | tail -1)
  left=${counts##* } excused=${counts% *}
  excused=${excused#* }
  printf '{"checker": "%s", "program": "%s", "status": %s, "checks": %s, "findings": %s, "excused": %s, "seconds": %s}\n' "$tool" \
    "$program $*" "$status" "$(grep -c '"ok": true\|"ok":true' "$log")" "$left" "$excused" $(($(date +%s) - start))
  echo "$reports" | sed '$d' >&2
  if [ "$status" -ne 77 ] && { [ "$status" -ne 0 ] || [ "$left" -ne 0 ]; }; then
    failed=$((failed + 1))
    grep -v '^=====' "$log" | tail -5 >&2
  fi
  rm -f "$log"
}

[ $# -gt 0 ] || set -- memcheck racecheck synccheck
for tool; do
  # The whole engine: four layers, one rank, prompts, drafter, rounds with and without filters.
  check "$tool" engine_exact small
  # The operations by themselves, which are small when a checker looks ($US_TEST_WATCHDOG).
  [ -z "${US_SANITIZE_SMALL:-}" ] || continue
  check "$tool" engine_round
  check "$tool" engine_attention
  for part in gemm route experts reduce chain; do check "$tool" kernel_lab 1 "$part"; done
  for part in products rows attention; do check "$tool" prefill_lab 1 "$part"; done
done
[ "$failed" -eq 0 ]
