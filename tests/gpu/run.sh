#!/bin/sh
# run.sh: build and run every GPU test program. Usage: tests/gpu/run.sh [PROGRAM...]
#
# Needs only nvcc and a Hopper GPU: no meson, no libraries of the CPU toolkit. Prints JSON lines: those of the programs,
# then one a program with its exit status (0 passed, 1 a check failed, 5 a CUDA call failed, 77 no GPU, 124 hung) and
# seconds. US_GPU_TIMEOUT (120) is the watchdog in seconds, US_GPU_BUILD (build-gpu) the folder built in. Exit 0 if no
# program failed and one passed.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${US_GPU_BUILD:-$root/build-gpu}
limit=${US_GPU_TIMEOUT:-120}
case ${1:-} in
-*) sed -n '2,7s/^# //p' "$0" >&2 && exit 2 ;;
esac
PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$build"

compile() { # compile NAME LINK-OPTION...: with the options of the top-level meson.build
  name=$1
  shift
  nvcc -std=c++17 -O2 -gencode=arch=compute_90a,code=sm_90a -fmad=false -Werror=all-warnings \
    -Xcompiler=-Wall,-Wextra,-Wno-unused-parameter,-ffp-contract=off -I"$root/libcore" -I"$root" -I"$root/tests/gpu" \
    "$root/tests/gpu/$name.cu" -o "$build/$name" "$@" >&2
}

record() { printf '{"program": "%s", "status": %s, "seconds": %s}\n' "$1" "$2" "$3"; }

passed=0 failed=0
# The list is the one in meson.build: ['name'] or ['name', ['-lone', '-ltwo']].
list=$(sed -n "s/^    \['\([a-z0-9_]*\)'\(.*\)\],.*/\1 \2/p" "$root/tests/gpu/meson.build" | tr -d "[],'")
while read -r name options; do
  case " ${*:-$name} " in
  *" $name "*) ;;
  *) continue ;;
  esac
  # shellcheck disable=SC2086 # a list of options
  if ! compile "$name" $options; then
    record "$name" 2 0
    failed=$((failed + 1))
    continue
  fi
  start=$(date +%s)
  timeout -k 5 "$limit" "$build/$name"
  status=$?
  record "$name" "$status" $(($(date +%s) - start))
  case $status in
  0) passed=$((passed + 1)) ;;
  77) ;;
  *) failed=$((failed + 1)) ;;
  esac
done <<EOF
$list
EOF
echo "$passed passed, $failed failed" >&2
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
