#!/bin/sh
# run.sh: run the fuzz targets. Usage: tests/fuzz/run.sh SECONDS [TARGET...]
#
# Builds them in build-fuzz/ (clang, AddressSanitizer, UndefinedBehaviorSanitizer) and runs each for SECONDS, from its
# seeds in tests/fuzz/corpus/TARGET and what earlier runs found (build-fuzz/corpus/TARGET). A finding leaves its input
# and log in build-fuzz/findings/TARGET. The last line is "N passed, N failed"; exit 0 if none failed.
set -u
US_ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$US_ROOT/data/recipes/common.sh"

case ${1:-} in
'' | *[!0-9]*) sed -n '2,6s/^# //p' "$0" >&2 && exit 2 ;;
esac
seconds=$1
shift

export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:allocator_may_return_null=1

build=$US_ROOT/build-fuzz
CC=clang us_build "$build" -Dcuda=disabled -Dfuzz=true -Db_lundef=false || exit 1

passed=0 failed=0
for program in "$build"/tests/fuzz/f_*; do
  if [ ! -f "$program" ] || [ ! -x "$program" ]; then continue; fi
  name=$(basename "$program")
  case " ${*:-$name} " in
  *" $name "*) ;;
  *) continue ;;
  esac
  found=$build/findings/$name
  mkdir -p "$build/corpus/$name" "$found"
  us_say "$name for $seconds s"
  if "$program" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -verbosity=0 -print_final_stats=1 \
    -artifact_prefix="$found/" "$build/corpus/$name" "$US_ROOT/tests/fuzz/corpus/$name" >"$found/log" 2>&1; then
    passed=$((passed + 1))
    sed -n 's/^stat::number_of_executed_units: */  runs: /p' "$found/log" >&2
  else
    failed=$((failed + 1))
    tail -n 40 "$found/log" >&2
  fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
