#!/bin/sh
# install_example.sh: install into a fresh folder and use it. Usage: install_example.sh BUILD SOURCE CC MESON TOOL...
#
# Every tool has its binary, man page and completion there; every installed header compiles alone; docs/example.c builds
# with nothing but pkg-config (statically, as the README says) and prints 32 lines that are near the weights.
set -eu
build=$1 source=$2 cc=$3 meson=$4
shift 4
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
fail() {
  echo "install_example.sh: $*" >&2
  exit 1
}

"$meson" install -C "$build" --no-rebuild --quiet --destdir "$place"
pc=$(find "$place" -name ultraspeed.pc)
[ -n "$pc" ] || fail "no ultraspeed.pc"
prefix=$(cd "$(dirname "$pc")" && sed -n 's/^prefix=//p' ultraspeed.pc)
sed "s|^prefix=.*|prefix=$place$prefix|" "$pc" >"$pc.here" && mv "$pc.here" "$pc"
PKG_CONFIG_PATH=$(dirname "$pc")
export PKG_CONFIG_PATH

for tool in "$@"; do
  [ -x "$place$prefix/bin/$tool" ] || fail "no bin/$tool"
  [ -s "$place$prefix/share/man/man1/$tool.1" ] || fail "no man page of $tool"
  [ -s "$place$prefix/share/bash-completion/completions/$tool.bash" ] || fail "no completion of $tool"
done

cflags=$(pkg-config --cflags ultraspeed)
headers=$(find "$place$prefix/include/ultraspeed" -name '*.h')
[ -n "$headers" ] || fail "no headers"
for header in $headers; do
  # shellcheck disable=SC2086 # compiler flags are words
  $cc -std=gnu17 -fsyntax-only -x c $cflags "$header" || fail "$header does not compile alone"
done

# shellcheck disable=SC2046,SC2086
$cc -std=gnu17 -Wall -Wextra -Werror "$source/docs/example.c" -o "$place/example" $(pkg-config --static --cflags --libs ultraspeed)
"$place/example" >"$place/out" || fail "the example failed"
[ "$(wc -l <"$place/out")" = 32 ] || fail "the example printed $(wc -l <"$place/out") lines, expected 32"
# Half a step of the largest binade (4 to 6 times the scale, |w| <= 1.6, scale 2^-2): 0.25; first weight is -1.6.
awk -F '\t' '{ d = $1 - $2; if (d < 0) d = -d; if (d > 0.2501) bad = 1 } END { exit bad }' "$place/out" ||
  fail "the example's weights came back wrong"
