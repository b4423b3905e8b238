#!/bin/sh
# fetch.sh: text and prompt sets that others published, for the recipes. Usage: data/fetch/fetch.sh [--packages] DIR
#
# Downloads what sources.tsv lists into DIR/upstream, checks each file's SHA-256, and makes DIR/text and DIR/prompts in the
# forms that `--text DIR/text --prompts DIR/prompts` take. A source without a pinned hash ("-") is downloaded, its hash is
# printed, and nothing is made from it until somebody has looked at the file and written the hash into sources.tsv.
# With --packages the Debian packages of packages.tsv are listed with installed version and licence, for a data card.
# Needs curl and python3. Exit codes: 0 done, 1 a hash is missing or differs, 2 usage, 4 a download failed.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
packages=
case ${1:-} in
--packages) packages=1 && shift ;;
-h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 0 ;;
-*) echo "fetch.sh: unknown option '$1'; see --help" >&2 && exit 2 ;;
esac
[ $# -eq 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
out=$1
mkdir -p "$out/upstream"

if [ -n "$packages" ]; then
  printf 'package\tversion\tuse\tlicence\n'
  tail -n +2 "$here/packages.tsv" | while IFS='	' read -r package use licence files; do
    version=$(dpkg-query -W -f '${Version}' "$package" 2>/dev/null || true)
    printf '%s\t%s\t%s\t%s\n' "$package" "${version:-not installed}" "$use" "$licence"
  done
fi

missing=0
good=
while IFS='	' read -r name use licence pinned url; do
  [ "$name" != name ] || continue
  file=$out/upstream/$name
  if [ ! -f "$file" ]; then
    curl -fsSL --retry 3 -o "$file.part" "$url" || { echo "fetch.sh: $name: cannot download $url" >&2; exit 4; }
    mv "$file.part" "$file"
  fi
  sum=$(sha256sum "$file" | cut -d ' ' -f 1)
  if [ "$pinned" = - ]; then
    echo "fetch.sh: $name: not pinned; SHA-256 $sum ($licence): check the file, write the hash into sources.tsv" >&2
    missing=1
  elif [ "$pinned" != "$sum" ]; then
    echo "fetch.sh: $name: SHA-256 is $sum, pinned is $pinned" >&2
    missing=1
  else
    good="$good $name"
  fi
done < "$here/sources.tsv"

python3 "$here/prepare.py" "$out" $good
exit $missing
