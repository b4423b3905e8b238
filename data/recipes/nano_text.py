"""Collect the text that nano and mini are trained on from installed packages. Usage: nano_text.py --out DIR [options]

  --site DIR    folder of installed Python packages (repeat; default: this Python's own); data/recipes/nano_packages.txt is the
                list that nano was trained on: pip install --no-deps --no-compile --target site -r data/recipes/nano_packages.txt
  --debian DIR  root of a Debian system that has the documentation packages named below in DOCS (default /; "none": leave out)
  --most MB     of one package's sources (5)

Writes DIR/code/PACKAGE.jsonl, DIR/prose/PACKAGE.jsonl, DIR/words/wordnet.jsonl, and DIR/card.tsv: package, version, licence,
documents and bytes of each. Python packages whose licence is not plainly permissive are left out, as are tests, tables and vendored copies.
What is left of a package that is larger than --most is chosen by hash, so that the same versions give the same text anywhere.
"""
import argparse
import csv
import gzip
import hashlib
import importlib.metadata
import json
import multiprocessing
import pathlib
import re
import subprocess
import sys
import sysconfig

import text_html
from collect_text import write_lines

PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Unlicense|0BSD|Zlib|HPND)\b", re.I)
RESTRICTED = re.compile(r"GPL|MPL|Mozilla|Proprietary|Commercial|NVIDIA|non-?commercial|CC-BY", re.I)
SKIPPED = {"test", "tests", "testing", "migrations", "locale", "_vendor", "vendor", "vendored", "third_party", "__pycache__", "idlelib",
           "encodings", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "_sources_static", "c-api", "whatsnew", "translations"}
MAX_BYTES = 150_000

# Debian package, folder below /usr/share/doc, pattern, licence (debian/copyright)
DOCS = [("python3.11-doc", "python3.11/html/_sources", "*.rst.txt", "PSF-2.0"),
        ("cmake-doc", "cmake-data/html/_sources", "*.rst.txt", "BSD-3-Clause"),
        ("llvm-14-doc", "llvm-14-doc/html/_sources", "*.rst.txt", "Apache-2.0 WITH LLVM-exception"),
        ("sphinx-doc", "sphinx-doc/html/_sources", "*.rst.txt", "BSD-2-Clause"),
        ("python-flask-doc", "python-flask-doc/html/_sources", "*.rst.txt", "BSD-3-Clause"),
        ("python-tornado-doc", "python-tornado-doc/html/_sources", "*.rst.txt", "Apache-2.0"),
        ("python-werkzeug-doc", "python-werkzeug-doc/html/_sources", "*.rst.txt", "BSD-3-Clause"),
        ("python-jinja2-doc", "python-jinja2-doc/html/_sources", "*.rst.txt", "BSD-3-Clause"),
        ("python-django-doc", "python-django-doc/html", "*.html", "BSD-3-Clause"),
        ("python-sqlalchemy-doc", "python-sqlalchemy-doc/html", "*.html", "MIT"),
        ("postgresql-doc-15", "postgresql-doc-15/html", "*.html", "PostgreSQL"),
        ("apache2-doc", "apache2-doc/manual/en", "*.html", "Apache-2.0"),
        ("sqlite3-doc", "sqlite3", "*.html", "public domain"),
        ("nodejs-doc", "nodejs/api", "*.html", "MIT"),
        ("erlang-doc", "erlang-doc", "*.html", "Apache-2.0"),
        ("rust-doc", "rust-doc/html/book", "*.html", "MIT OR Apache-2.0"),
        ("rust-doc", "rust-doc/html/reference", "*.html", "MIT OR Apache-2.0"),
        ("rust-doc", "rust-doc/html/rust-by-example", "*.html", "MIT OR Apache-2.0"),
        ("rust-doc", "rust-doc/html/nomicon", "*.html", "MIT OR Apache-2.0"),
        ("rust-doc", "rust-doc/html/rustc", "*.html", "MIT OR Apache-2.0"),
        ("rust-doc", "rust-doc/html/rustdoc", "*.html", "MIT OR Apache-2.0")]
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


class Card:
    def __init__(self, out):
        self.out, self.rows, self.seen = out, [], set()

    def add(self, part, package, version, licence, texts, name=None):
        """Write the texts that no package had before, and a row about them."""
        rows = []
        for text in texts:
            key = hashlib.sha256(text.encode()).digest()
            if key not in self.seen and len(text) > 200:
                self.seen.add(key)
                rows.append({"text": text})
        if rows:
            write_lines(self.out / part / f"{name or package}.jsonl", rows)
            self.rows.append([part, package, version, licence, len(rows), sum(len(row["text"].encode()) for row in rows)])

    def write(self):
        with open(self.out / "card.tsv", "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["part", "package", "version", "licence", "documents", "bytes"])
            writer.writerows(self.rows)


def licence_of(metadata):
    """The licence in a few words, or None when it is not plainly permissive."""
    stated = metadata.get("License-Expression") or ""
    classified = ", ".join(c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License :: "))
    first = (metadata.get("License") or "").strip().splitlines()[:1]
    text = stated or classified or (first[0][:60] if first else "")
    return text if PERMISSIVE.search(text) and not RESTRICTED.search(text) else None


def is_prose_or_code(text):
    """Not a table, nor generated: lines of ordinary length, mostly letters and spaces."""
    lines = text.splitlines() or [""]
    words = sum(c.isalpha() or c.isspace() or c == "_" for c in text[:20000])
    return max(map(len, lines)) < 1000 and len(text) / len(lines) < 75 and words > 0.7 * min(len(text), 20000)


def read(path):
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if is_prose_or_code(text) else None


def chosen(paths, most):
    """Texts of the files, those whose hash is smallest, up to `most` bytes; in the order of the paths."""
    texts = [(path, text) for path, text in ((path, read(path)) for path in sorted(paths)) if text]
    order = sorted(texts, key=lambda item: hashlib.sha256(item[1].encode()).digest())
    kept, size = set(), 0
    for path, text in order:
        size += len(text)
        if size <= most:
            kept.add(path)
    return [text for path, text in texts if path in kept]


def sources(root, paths):
    for path in paths:
        inside = path.relative_to(root)
        if path.suffix == ".py" and not SKIPPED & set(inside.parts) and not path.name.startswith(("test_", "conftest")) and \
                path.is_file() and 200 < path.stat().st_size <= MAX_BYTES:
            yield path


def package_texts(job):
    folder, files, most = job
    return chosen(sources(folder, [folder / file for file in files]), most)


def collect_site(card, folder, most):
    kept = []
    for package in sorted(importlib.metadata.distributions(path=[str(folder)]), key=lambda d: d.metadata["Name"].lower()):
        name, licence = package.metadata["Name"], licence_of(package.metadata)
        if licence is None:
            print(f"left out {name}: no plainly permissive licence", file=sys.stderr)
        else:
            kept.append((name, package.version, licence, [str(file) for file in package.files or []]))
    with multiprocessing.Pool() as pool:
        jobs = ((folder, files, most) for *_, files in kept)
        for (name, version, licence, _), texts in zip(kept, pool.imap(package_texts, jobs)):
            card.add("code", name, version, licence, texts)


def collect_library(card, most):
    """This Python's standard library."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    card.add("code", "python-stdlib", sys.version.split()[0], "PSF-2.0", chosen(sources(folder, folder.rglob("*.py")), most))


def debian_version(share, package):
    for name in ("changelog.Debian.gz", "changelog.gz"):
        path = share / package / name
        if path.exists():
            first = gzip.open(path, "rt", errors="replace").readline()
            if "(" in first:
                return first[first.index("(") + 1:first.index(")")]
    query = subprocess.run(["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True)
    return query.stdout or "unknown"


def collect_docs(card, share):
    for package, folder, pattern, licence in DOCS:
        paths = [p for p in sorted((share / folder).rglob(pattern)) if not SKIPPED & set(p.relative_to(share).parts) and
                 p.is_file() and not p.is_symlink() and p.stat().st_size < 20 * MAX_BYTES and p.name not in ("print.html", "all.html")]
        texts = [path.read_text(errors="replace") for path in paths]
        if pattern == "*.html":
            texts = [text_html.to_text(text) for text in texts]
        name = package if folder.count("/") < 2 else package + "-" + folder.rsplit("/", 1)[1].strip("_")
        card.add("prose", package, debian_version(share, package), licence, texts, name)


def definitions(folder):
    """WordNet's glosses that come with examples."""
    for kind, spoken in PARTS_OF_SPEECH.items():
        for line in (folder / f"data.{kind}").read_text().splitlines():
            if line.startswith(" "):
                continue
            fields, gloss = line.split(" | ", 1)
            fields, gloss = fields.split(" "), gloss.strip()
            words = [re.sub(r"\(.*", "", w).replace("_", " ") for w in fields[4:4 + 2 * int(fields[3], 16):2]]
            meaning, *examples = re.split(r'; (?=")', gloss)
            if not examples:
                continue
            answer = f"{words[0][:1].upper()}{words[0][1:]} ({spoken}): {meaning}. For example: {' '.join(examples)}"
            if len(words) > 1:
                answer += f" Other words for it: {', '.join(words[1:])}."
            yield answer


def collect_words(card, root):
    """Pages of a dictionary. As single questions they were what a model wrote behind everything else: it ended an answer and asked for a word."""
    folder = root / "usr/share/wordnet"
    if folder.exists():
        lines = list(definitions(folder))
        rows = [{"text": "\n".join(lines[i:i + 40]) + "\n"} for i in range(0, len(lines), 40)]
        write_lines(card.out / "words" / "wordnet.jsonl", rows)
        card.rows.append(["words", "wordnet-base", debian_version(root / "usr/share/doc", "wordnet-base"), "WordNet-3.0", len(rows),
                          sum(len(json.dumps(row)) for row in rows)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--site", type=pathlib.Path, action="append", help="folder of installed Python packages")
    parser.add_argument("--debian", default="/", help="root of a Debian system with documentation packages, or none")
    parser.add_argument("--most", type=float, default=5, help="megabytes of one package's sources")
    args = parser.parse_args()
    card, most = Card(args.out), int(args.most * 1e6)
    for folder in args.site or [pathlib.Path(sysconfig.get_paths()["purelib"])]:
        collect_site(card, folder, most)
    collect_library(card, 2 * most)
    if args.debian != "none":
        collect_docs(card, pathlib.Path(args.debian) / "usr/share/doc")
        collect_words(card, pathlib.Path(args.debian))
    card.write()


main()
