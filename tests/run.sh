#!/bin/sh
# run.sh: build the toolkit and run its tests. Usage: tests/run.sh [--quick] [--no-install] [--cuda auto|enabled|disabled]
#
# Parts: all tests; unit and command-line tests under AddressSanitizer and UndefinedBehaviorSanitizer; unit tests under
# ThreadSanitizer; every fuzz target for 30 seconds (US_FUZZ_SECONDS). --quick runs only the first part.
# Builds in build/, build-asan/, build-tsan/ and build-fuzz/. Ends with what failed, the end of its output below its name;
# the last line is "N passed, N failed"; exit 0 if none failed.
set -u
US_ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$US_ROOT/data/recipes/common.sh"

quick=no install=yes cuda=auto
while [ $# -gt 0 ]; do
  case $1 in
  --quick) quick=yes ;;
  --no-install) install=no ;;
  --cuda) cuda=${2:?--cuda needs auto, enabled or disabled} && shift ;;
  -h | --help) sed -n '2,7s/^# //p' "$0" && exit 0 ;;
  *) us_say "run.sh: unknown option '$1'; see --help" && exit 2 ;;
  esac
  shift
done

passed=0 failed=0
count() { # count OK FAIL: add to the sums
  passed=$((passed + $1))
  failed=$((failed + $2))
}

spent() {
  us_say "processor time so far: this shell, then what it ran (user, system)"
  times >&2
}

failures=$(mktemp) || exit 1
trap 'rm -f "$failures"' EXIT

finish() {
  cat "$failures" >&2
  echo "$passed passed, $failed failed"
  [ "$failed" -eq 0 ]
  exit
}

# run_tests FOLDER ARGUMENT...: meson test, its sums read from its own log.
run_tests() {
  folder=$1
  shift
  rm -f "$folder/meson-logs/testlog.json"
  meson test -C "$folder" --no-rebuild --print-errorlogs "$@" >&2
  log=$folder/meson-logs/testlog.json
  if [ ! -s "$log" ]; then
    echo "no test ran in $folder" >>"$failures"
    count 0 1
    return
  fi
  ok=$(grep -cE '"result": "(OK|EXPECTEDFAIL)"' "$log")
  skipped=$(grep -c '"result": "SKIP"' "$log")
  all=$(grep -c '"result": ' "$log")
  [ "$skipped" -eq 0 ] || us_say "$skipped skipped"
  count "$ok" $((all - ok - skipped))
  "$US_ROOT/tests/failures.py" "$log" >>"$failures"
}

# part NAME FOLDER OPTION...: build; a build that fails counts as one failure and ends the part.
part() {
  us_say "== $1"
  folder=$2
  shift 2
  us_build "$folder" "$@" && return 0
  echo "the build in $folder failed" >>"$failures"
  count 0 1
  return 1
}

# The fuzz targets, built and run by their own script, whose last line has the sums.
fuzz() {
  us_say "== fuzz targets"
  sums=$("$US_ROOT/tests/fuzz/run.sh" "${US_FUZZ_SECONDS:-30}" | tail -n 1)
  case $sums in
  *" passed, "*" failed")
    ok=${sums%% *} bad=${sums#*, }
    count "$ok" "${bad%% *}"
    [ "$sums" != "0 passed, 0 failed" ] || count 0 1
    ;;
  *) count 0 1 ;;
  esac
}

if [ "$install" = yes ]; then
  # shellcheck disable=SC2086 # lists of words
  if ! us_install_packages $US_BUILD_PACKAGES $US_TEST_PACKAGES; then
    echo "packages are missing" >>"$failures"
    count 0 1
    finish
  fi
fi
us_find_nvcc || [ "$cuda" != enabled ] || us_say "no nvcc found; the configuration will say so"

export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:allocator_may_return_null=1
export LSAN_OPTIONS="suppressions=$US_ROOT/tests/lsan.supp:print_suppressions=0"
export TSAN_OPTIONS=halt_on_error=1

part "unit, command line, parity" "$US_ROOT/build" "-Dcuda=$cuda" -Dtests=true && run_tests "$US_ROOT/build"
spent
if [ "$quick" = no ]; then
  # clang's sanitizers: under gcc's the training tests take thirty times as long. -O1 halves the time of the build.
  export CC=clang
  part "AddressSanitizer and UndefinedBehaviorSanitizer" "$US_ROOT/build-asan" -Dcuda=disabled \
    -Db_sanitize=address,undefined -Db_lundef=false -Doptimization=1 &&
    run_tests "$US_ROOT/build-asan" --suite unit --suite cli --timeout-multiplier 5
  spent
  part "ThreadSanitizer" "$US_ROOT/build-tsan" -Dcuda=disabled -Db_sanitize=thread -Db_lundef=false -Doptimization=1 &&
    run_tests "$US_ROOT/build-tsan" --suite unit --timeout-multiplier 5
  spent
  fuzz
  spent
fi
finish
