"""Check that two recorded runs hold the same tokens. Usage: same_tokens.py PLAIN.jsonl OTHER.jsonl; exit 1 if not."""
import json
import sys


def tokens(path):
    with open(path) as lines:
        return {(r["id"], r.get("turn", 0), r.get("sample", 0)): r["ids"] for r in map(json.loads, lines)}


def main():
    plain, other = tokens(sys.argv[1]), tokens(sys.argv[2])
    different = sorted(k for k in plain.keys() | other.keys() if plain.get(k) != other.get(k))
    for key in different[:5]:
        print(f"{key[0]} (turn {key[1]}, sample {key[2]}): tokens differ", file=sys.stderr)
    if different:
        sys.exit(1)
    print(f"{len(plain)} answers, {sum(map(len, plain.values()))} tokens: the same in both runs", file=sys.stderr)


main()
