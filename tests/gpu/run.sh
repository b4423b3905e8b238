#!/bin/sh
# run.sh: build and run every GPU test program. Usage: tests/gpu/run.sh [PROGRAM...]
#
# Needs only nvcc and a Hopper GPU: no meson, no libraries of the CPU toolkit. Programs that need the whole library (parity, exactness,
# training against the CPU) are run from meson's build, where there is one, and with two or four GPUs a rank a GPU too. Prints JSON lines:
# those of the programs, then one a program with its exit status (0 passed, 1 a check failed, 5 a CUDA call failed, 77 no GPU, 124 hung)
# and seconds. US_GPU_TIMEOUT (120) is the watchdog in seconds, of the latter programs US_GPU_WHOLE_TIMEOUT (600); US_GPU_BUILD
# (build-gpu) the folder built in, US_GPU_WHOLE (build/tests/gpu) where the latter are. Exit 0 if no program failed and one passed.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${US_GPU_BUILD:-$root/build-gpu}
limit=${US_GPU_TIMEOUT:-120}
whole=${US_GPU_WHOLE:-$root/build/tests/gpu} whole_limit=${US_GPU_WHOLE_TIMEOUT:-600}
case ${1:-} in
-h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
-*) sed -n '2,9s/^# //p' "$0" >&2 && exit 2 ;;
esac
PATH=$PATH:/usr/local/cuda/bin

device() { # nvcc with the options of the top-level meson.build
  nvcc -std=c++17 -O2 -gencode=arch=compute_90a,code=sm_90a -fmad=false -Werror=all-warnings \
    -Xcompiler=-Wall,-Wextra,-Wno-unused-parameter,-ffp-contract=off -I"$root/libcore" -I"$root" -I"$root/tests/gpu" "$@" >&2
}

# Every device source of kernels/, the ceiling that figures are fractions of, and what of the CPU's toolkit their tests compare with, as one
# archive. links.py reads both lists.
library() {
  rm -f "$build/kernels.a"
  for source in "$root"/kernels/*/*.cu "$root"/libcore/device/ceiling.cu; do
    device -c "$source" -o "$build/$(basename "$source").o" &
  done
  for source in base/err base/pool formats/bf16 formats/fp8 formats/matrix formats/mxfp4 ../kernels/cpu/isa \
    ../kernels/embed/embed_grad ../kernels/experts/experts_grad ../kernels/gemm/gemm ../kernels/gemm/gemm_avx2 \
    ../kernels/gemm/gemm_avx512 ../kernels/head_loss/head_loss ../kernels/linear/linear_grad ../kernels/linear/linear_ref \
    ../kernels/pages/pages ../kernels/rmsnorm/rmsnorm_grad ../kernels/rope/rope_grad ../kernels/rope/rope_ref \
    ../kernels/router/router_grad ../kernels/router/router_ref ../kernels/seq/seq ../kernels/swiglu/swiglu_grad \
    ../training/gptq ../training/muon ../training/optim; do
    case $source in
    *_avx2) isa='-mavx2 -mfma -mf16c' ;;
    *_avx512) isa='-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c' ;;
    *) isa= ;;
    esac
    # shellcheck disable=SC2086 # a list of options
    ${CC:-cc} -std=gnu17 -O2 -ffp-contract=off -ffunction-sections -D_GNU_SOURCE $isa -I"$root/libcore" -I"$root" -c "$root/libcore/$source.c" \
      -o "$build/$(basename "$source").c.o" >&2
  done
  wait
  ar rcs "$build/kernels.a" "$build"/*.cu.o "$build"/*.c.o
}

compile() { # compile NAME SOURCE-OR-LINK-OPTION...
  name=$1
  shift
  sources=$root/tests/gpu/$name.cu
  for word; do
    case $word in
    *.cu) sources="$sources $root/tests/gpu/$word" ;;
    *) sources="$sources $word" ;;
    esac
  done
  # Functions that a program does not call go, and with them what only they call (the optimizers know all parameters).
  # shellcheck disable=SC2086 # a list of files and options
  device -Xlinker=--gc-sections $sources "$build/kernels.a" -o "$build/$name"
}

passed=0 failed=0
# run NAME SECONDS COMMAND...: under a watchdog, and its record.
run() {
  name=$1 seconds=$2
  shift 2
  start=$(date +%s)
  timeout -k 5 "$seconds" "$@"
  record "$name" $? $(($(date +%s) - start))
}
record() { # record NAME STATUS SECONDS
  printf '{"program": "%s", "status": %s, "seconds": %s}\n' "$1" "$2" "$3"
  case $2 in
  0) passed=$((passed + 1)) ;;
  77) ;;
  *) failed=$((failed + 1)) ;;
  esac
}

wanted() { # wanted NAME ARGUMENT...: it is named, or none is
  name=$1
  shift
  case " ${*:-$name} " in
  *" $name "*) ;;
  *) return 1 ;;
  esac
}

# The list is the one in meson.build: ['name'] or ['name', ['other.cu'], ['-lone']].
list=$(sed -n "s/^    \['\([a-z0-9_]*\)'\(.*\)\],.*/\1 \2/p" "$root/tests/gpu/meson.build" | tr -d "[],'" |
  while read -r name options; do wanted "$name" "$@" && echo "$name $options"; done)
if [ -n "$list" ]; then
  command -v nvcc >/dev/null || { echo "run.sh: no nvcc" >&2 && exit 2; }
  [ -e /dev/nvidia0 ] || echo "run.sh: no GPU here: all is compiled, for many minutes, and then skipped" >&2
  mkdir -p "$build"
  library
  while read -r name options; do
    rm -f "$build/$name"
    # shellcheck disable=SC2086 # a list of options
    compile "$name" $options &
  done <<EOF
$list
EOF
  wait
  while read -r name options; do
    if [ -x "$build/$name" ]; then
      run "$name" "$limit" "$build/$name" </dev/null
    else
      record "$name" 2 0
    fi
  done <<EOF
$list
EOF
fi

# What needs the whole library: names, and arguments.
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .)
else
  gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l)
fi
several=''
[ "$gpus" -lt 2 ] || several=gpus2
[ "$gpus" -lt 4 ] || several="$several gpus4"
whole_list() {
  printf '%s\n' weights_bits engine_loop engine_parity engine_exact prefill_parity train_parity train_generate train_group
  for many in $several; do printf '%s\n' "engine_parity $many" "engine_exact $many"; done
}
export ULTRASPEED_DATA="${ULTRASPEED_DATA:-$root/data}"
missing=''
while read -r name argument; do
  wanted "$name" "$@" || continue
  if [ -x "$whole/$name" ]; then
    # shellcheck disable=SC2086 # one word or none
    run "$name${argument:+ $argument}" "$whole_limit" "$whole/$name" $argument </dev/null
  else
    missing="$missing $name"
  fi
done <<EOF
$(whole_list)
EOF
[ -z "$missing" ] || echo "run.sh: not in $whole, so not run:$missing" >&2
echo "$passed passed, $failed failed" >&2
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
