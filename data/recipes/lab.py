"""Steps of an experiment: tools' command lines, run once for the same inputs, several at a time, within a budget of seconds.

What a step writes lies in FOLDER/cache/KEY, KEY being the hash of the command with every input file replaced by the hash of its content, so
that a step is run again only when its inputs, its options or its tool's version change.
"""
import concurrent.futures
import contextlib
import hashlib
import json
import pathlib
import subprocess
import sys
import threading
import time


class OutOfTime(Exception):
    """A step was not begun, or not ended, because the budget is spent."""


class Slots:
    """Steps run beside each other, or alone."""

    def __init__(self):
        self.changed = threading.Condition()
        self.running = self.waiting = 0
        self.alone = False

    @contextlib.contextmanager
    def take(self, alone):
        with self.changed:
            self.waiting += alone
            self.changed.wait_for(lambda: not self.alone and (self.running == 0 if alone else self.waiting == 0))
            self.waiting -= alone
            self.alone = alone
            self.running += 1
        try:
            yield
        finally:
            with self.changed:
                self.alone = False
                self.running -= 1
                self.changed.notify_all()


class Lab:
    """Runs steps and tasks. A task is a function that runs steps; tasks are begun in the order in which they are given, so that one may wait
    for an earlier one."""

    def __init__(self, folder, jobs=1, budget=0, limit=480):
        self.cache = pathlib.Path(folder) / "cache"
        self.budget, self.limit = budget, limit
        self.hashes, self.versions, self.locks, self.run_count = {}, {}, {}, 0
        self.mutex, self.slots = threading.Lock(), Slots()
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)
        self.failures, self.late = [], []
        self.started = time.time()
        self.cache.mkdir(parents=True, exist_ok=True)

    def seconds(self):
        return time.time() - self.started

    def lock(self, name):
        with self.mutex:
            return self.locks.setdefault(name, threading.Lock())

    def hash(self, path):
        path = pathlib.Path(path)
        key = (str(path), path.stat().st_mtime_ns, path.stat().st_size)
        with self.lock(key):
            if key not in self.hashes:
                with open(path, "rb") as file:
                    self.hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self.hashes[key]

    def named(self, word):
        """What stands for a word in a step's key: a file by its content, a checkpoint's folder by that of its files."""
        path = pathlib.Path(word)
        if path.is_file():
            return self.hash(path)
        if (path / "config.json").is_file():
            return [self.hash(part) for part in sorted(path.iterdir()) if part.is_file()]
        return word

    def version(self, tool):
        with self.lock(tool):
            if tool not in self.versions:
                self.versions[tool] = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        return self.versions[tool]

    def __call__(self, *words, stdout=None, seconds=0, alone=False):
        """Run a command and return the folder with its outputs, the words that begin with '@'. Paths of files are inputs. It is not begun when
        fewer than `seconds` are left; `alone`: nothing else runs meanwhile, because it is timed or wants the whole device."""
        words = [str(word) for word in words]
        named = [self.named(word) for word in words]
        key = hashlib.sha256(json.dumps([self.version(words[0]), named, stdout]).encode()).hexdigest()[:16]
        folder = self.cache / key
        with self.lock(key):
            if not (folder / "done").exists():
                with self.slots.take(alone):
                    self.run(words, folder, stdout, seconds)
        return folder

    def run(self, words, folder, stdout, seconds):
        left = self.budget - self.seconds() if self.budget else self.limit
        if left < max(seconds, 1):
            raise OutOfTime(f"{words[0]} was not begun with {left:.0f} s left")
        folder.mkdir(exist_ok=True)
        command = [str(folder / word[1:]) if word.startswith("@") else word for word in words]
        begun = time.time()
        try:
            with open(folder / (stdout or "stdout"), "w") as out, open(folder / "stderr", "w") as errors:
                status = subprocess.run(command, stdout=out, stderr=errors, timeout=min(left, self.limit)).returncode
        except subprocess.TimeoutExpired:
            raise OutOfTime(f"{words[0]} did not end within {min(left, self.limit):.0f} s") from None
        if status:
            raise RuntimeError(f"{' '.join(command)}: exit {status}: {(folder / 'stderr').read_text().strip()[-300:]}")
        (folder / "command").write_text(" ".join(command) + "\n")
        (folder / "done").write_text(f"{time.time() - begun:.1f}\n")
        with self.mutex:
            self.run_count += 1
        shown = " ".join(pathlib.Path(word).name if "/" in word else word for word in words)
        print(f"{self.seconds():6.1f} s {time.time() - begun:6.1f} s  {shown[:170]}", file=sys.stderr, flush=True)

    def task(self, name, function, *args):
        """Begin function(*args) when its turn comes. The future's result is None when it was late or failed; both are noted."""

        def body():
            try:
                return function(*args)
            except OutOfTime as late:
                with self.mutex:
                    self.late.append(name)
                print(f"{self.seconds():6.1f} s  late: {name}: {late}", file=sys.stderr, flush=True)
            except (RuntimeError, KeyError, ValueError, OSError) as error:
                with self.mutex:
                    self.failures.append(name)
                print(f"{self.seconds():6.1f} s  failed: {name}: {error}", file=sys.stderr, flush=True)
            return None

        return self.pool.submit(body)
