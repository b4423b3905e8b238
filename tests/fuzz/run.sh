#!/bin/sh
# run.sh: run the fuzz targets. Usage: tests/fuzz/run.sh SECONDS [TARGET...]
#
# Builds them in build-fuzz/ (clang, AddressSanitizer, UndefinedBehaviorSanitizer) and runs each for SECONDS, one a
# processor at once (US_FUZZ_JOBS), from its seeds in tests/fuzz/corpus/TARGET and what earlier runs found
# (build-fuzz/corpus/TARGET). A finding leaves its input and log in build-fuzz/findings/TARGET. The last line is "N passed,
# N failed"; exit 0 if none failed.
set -u
US_ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$US_ROOT/data/recipes/common.sh"

case ${1:-} in
-h | --help) sed -n '2,7s/^# //p' "$0" && exit 0 ;;
'' | *[!0-9]*) sed -n '2,7s/^# //p' "$0" >&2 && exit 2 ;;
esac
seconds=$1
shift

export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:allocator_may_return_null=1

build=$US_ROOT/build-fuzz
CC=clang us_build "$build" -Dcuda=disabled -Dfuzz=true -Db_lundef=false || exit 1

# run_one TARGET: fuzz it; its log and exit status go to build-fuzz/findings/TARGET.
run_one() {
  found=$build/findings/$1
  mkdir -p "$build/corpus/$1" "$found"
  "$build/tests/fuzz/$1" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=60 -verbosity=0 -print_final_stats=1 \
    -artifact_prefix="$found/" "$build/corpus/$1" "$US_ROOT/tests/fuzz/corpus/$1" >"$found/log" 2>&1 </dev/null
  echo $? >"$found/status"
}

chosen=
for program in "$build"/tests/fuzz/f_*; do
  if [ ! -f "$program" ] || [ ! -x "$program" ]; then continue; fi
  name=$(basename "$program")
  case " ${*:-$name} " in
  *" $name "*) chosen="$chosen $name" ;;
  esac
done

# As many at once as there are processors; they all take equally long.
jobs=${US_FUZZ_JOBS:-$(getconf _NPROCESSORS_ONLN)} running=0
for name in $chosen; do
  us_say "$name for $seconds s"
  rm -f "$build/findings/$name/status"
  run_one "$name" &
  running=$((running + 1))
  if [ "$running" -ge "$jobs" ]; then
    wait
    running=0
  fi
done
wait

passed=0 failed=0
for name in $chosen; do
  found=$build/findings/$name
  if [ "$(cat "$found/status" 2>/dev/null)" = 0 ]; then
    passed=$((passed + 1))
    sed -n "s/^stat::number_of_executed_units: */$name: runs /p" "$found/log" >&2
  else
    failed=$((failed + 1))
    us_say "$name failed"
    tail -n 40 "$found/log" >&2
  fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
