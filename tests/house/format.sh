#!/bin/sh
# format.sh: every C source is as clang-format 14 writes it. Usage: format.sh SOURCE; exit 77 (skipped) without it.
set -eu
cd "$1"
formatter=$(command -v clang-format-14 || command -v clang-format || true)
[ -n "$formatter" ] || exit 77
case $("$formatter" --version) in
*"version 14."*) ;;
*) echo "clang-format is not version 14" && exit 77 ;;
esac
wrong=$(find docs kernels libcore tests tools training \( -name '*.c' -o -name '*.h' \) -print0 |
  xargs -0 "$formatter" --dry-run 2>&1 | sed -n 's/:[0-9]*:[0-9]*: warning: .*//p' | sort | uniq -c)
[ -z "$wrong" ] && exit 0
printf '%s\n' "$wrong" >&2
echo "format.sh: run clang-format -i on these files" >&2
exit 1
