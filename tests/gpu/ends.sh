#!/bin/sh
# ends.sh: us-serve on a GPU is interrupted and killed in the midst of its rounds. Usage: tests/gpu/ends.sh TOOLS DATA
#
# TOOLS has us-serve (build/tools), DATA the bundled model (data). Prints a JSON line a check. Ctrl-C ends with "interrupted" and exit
# code 130; a run after each end gives the text of the run before, so nothing of the ended one is left on the GPU. Exit 0, 1.
set -u
tools=${1:?"usage: ends.sh TOOLS DATA"}
data=${2:?"usage: ends.sh TOOLS DATA"}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

pico="-q -m $data/models/pico/pico.h5 -d $data/models/pico/draft.h5 --device cuda --text -t 1"
endless="--prompt-tokens 50 --max-tokens 3500 --samples 256 --ignore-end"
record() { # record CHECK OK NOTE
  [ "$2" = true ] || failed=1
  printf '{"check": "%s", "ok": %s, "note": "%s"}\n' "$1" "$2" "$3"
}
text_is_as_before() { # text_is_as_before NAME
  # shellcheck disable=SC2086 # lists of options, here and below
  "$tools/us-serve" $pico -p 'def fib(n):' --max-tokens 64 >"$scratch/$1" 2>"$scratch/err"
  if cmp -s "$scratch/before" "$scratch/$1"; then record "after the $1 run: the same text" true ""; else
    record "after the $1 run: the same text" false "$(tail -1 "$scratch/err" | tr -d '"')"
  fi
}

# shellcheck disable=SC2086
"$tools/us-serve" $pico -p 'def fib(n):' --max-tokens 64 >"$scratch/before" || exit $?

# shellcheck disable=SC2086
timeout --preserve-status -k 10 -s INT 2 "$tools/us-serve" $pico $endless >"$scratch/out" 2>"$scratch/err"
status=$?
if [ "$status" -eq 130 ] && grep -q 'interrupted' "$scratch/err"; then ok=true; else ok=false; fi
record "Ctrl-C in the midst of rounds: exit 130, one line" "$ok" "exit $status"
text_is_as_before interrupted

# shellcheck disable=SC2086
"$tools/us-serve" $pico $endless >"$scratch/out" 2>&1 &
sleep 2
kill -9 $! && wait $! 2>/dev/null
text_is_as_before killed
exit $failed
