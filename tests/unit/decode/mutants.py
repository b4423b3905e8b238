"""Every fault that speculative decoding is known for, made on purpose, must fail a test.

Usage: mutants.py SOURCE_ROOT LIBRARY. A mutant is one textual change of one source file; it is compiled, linked before
the library with the named test, and the test must fail. The unchanged sources must pass the same way.
"""
import concurrent.futures
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

ROOT, LIBRARY = pathlib.Path(sys.argv[1]), sys.argv[2]
DECODE = ROOT / "libcore/decode"
PACKAGES = ["check", "hdf5", "libpng", "cairo", "jansson", "libpcre2-8", "libutf8proc", "libcrypto"]
FLAGS = ["-std=gnu17", "-D_GNU_SOURCE", "-O1", "-ffp-contract=off", f"-I{ROOT}/libcore", f"-I{ROOT}",
         f"-I{ROOT}/tests/unit", f"-I{ROOT}/tests/unit/decode"]

# Name, file (of libcore/decode, or with its folder of libcore), what is there, what replaces it, the test that must fail.
MUTANTS = [
    ("no residual", "verify.c", "all ? p[i] : pi * p[i] - q_of(v, accepted, i)", "p[i]", "t_verify"),
    ("residual without pi", "verify.c", "pi * p[i] - q_of(v, accepted, i)", "p[i] - q_of(v, accepted, i)", "t_verify"),
    ("bonus from the row before", "verify.c", "v->p + accepted * v->N", "v->p + (accepted ? accepted - 1 : 0) * v->N",
     "t_verify"),
    ("block forgets the prefix", "verify.c", "rule == US_VERIFY_BLOCK ? pi : 1.0", "1.0", "t_verify"),
    ("block stops at the first rejection", "base/speculate.h", "else if (rule != US_VERIFY_BLOCK)", "else", "t_verify"),
    ("q without temperature", "round.c",
     "us_sample_probs(round->draft_logits + i * N, N, &request->sampling, scratch->q + i * N)",
     "us_sample_probs(round->draft_logits + i * N, N, &(struct us_sampling){.temperature = 1.0f}, scratch->q + i * N)",
     "t_laws"),
    ("p without filters", "round.c",
     "us_sample_probs(logits + i * N, N, &request->sampling, scratch->p + i * N)",
     "us_sample_probs(logits + i * N, N, &(struct us_sampling){.temperature = request->sampling.temperature}, "
     "scratch->p + i * N)", "t_laws"),
    ("argmax drafts told as sampled", "round.c", "round->proposals[i] = us_sample_token(row, rules->N,",
     "round->proposals[i] = us_sample_token(row, rules->N, 1 ? &(struct us_sampling){0} :", "t_laws"),
    ("bonus off by one", "generate.c", "s->position += round->accepted + 1", "s->position += round->accepted",
     "t_generate"),
    ("stale cache after a rejection", "generate.c", "s->position += round->accepted + 1",
     "s->position += round->drafts + 1", "t_generate"),
    ("stop token overrun", "generate.c", "committed < count && s->output->finish == US_FINISH_NONE", "committed < count",
     "t_generate"),
    ("rejected rows in the drafter's context", "generate.c", "s->position, round->accepted + 1,",
     "s->position, round->drafts + 1,", "t_speculative"),
    ("context shifted by one", "generate.c", "append_context(d, s->draft_kv, s->position,",
     "append_context(d, s->draft_kv, s->position + 1,", "t_generate"),
    ("taps of another sequence's rows", "generate.c", "d->taps + first_row * d->taps_width", "d->taps", "t_generate"),
    ("prefill edges relative to the start", "generate.c", "(begin / US_PREFILL_CHUNK + 1) * US_PREFILL_CHUNK",
     "begin + 500", "t_generate"),
    ("samples share their noise", "round.c", "us_noise_target(request->seed, position, sample)",
     "us_noise_target(request->seed, position, 0)", "t_generate"),
    ("noise shifted by a position", "round.c", "s->position + 1 + i, logits + i * rules->N",
     "s->position + i, logits + i * rules->N", "t_generate"),
    ("replay shifted by one", "round.c", "s->output->ids.count + slot;", "s->output->ids.count + slot + 1;",
     "t_generate"),
    ("a stop string is streamed", "sequence.c", "end -= held_bytes(s->request, &out->text, s->sent_bytes);", ";",
     "t_generate"),
    ("the stop string that is named first wins", "sequence.c", "(size_t)(hit - text->data) < first", "first == SIZE_MAX",
     "t_generate"),
    ("the last of equals is the best", "generate.c", ".mean_logprob > result->outputs[result->best].mean_logprob",
     ".mean_logprob >= result->outputs[result->best].mean_logprob", "t_generate"),
    ("the first rate of a replay repeats", "round.c", "slot < rules->accept_count ? slot : rules->accept_count - 1",
     "slot < rules->accept_count ? slot : 0", "t_generate"),
    ("ties to the highest id", "base/sample.h", "if (logits[i] > best_logit)", "if (logits[i] >= best_logit)", "t_sample"),
    ("top-k keeps all ties", "base/sample.h", "key == cut.key && id <= cut.last", "key == cut.key", "t_sample"),
    ("top-p of everything", "base/sample.h", "us_cut_mass(logits, N, max, inv, cut)",
     "us_cut_mass(logits, N, max, inv, us_cut_everything())", "t_sample"),
]


def run(command, **kwargs):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def libraries():
    done = run(["pkg-config", "--cflags", "--libs", *PACKAGES])
    if done.returncode:
        sys.exit(done.stdout)
    return shlex.split(done.stdout) + ["-lm", "-lpthread"]


def build(folder, sources, test, libs):
    """Compile the given sources and the test, link with the library; returns the executable."""
    exe = folder / test
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, f"-I{folder}", *FLAGS, *map(str, sources), str(ROOT / f"tests/unit/decode/{test}.c"), LIBRARY,
               "-o", str(exe), *libs]
    done = run(command)
    if done.returncode:
        raise RuntimeError(f"does not compile:\n{done.stdout}")
    return exe


def passes(exe):
    done = run([exe], env=dict(os.environ, CK_FORK="no"), timeout=300)
    return done.returncode == 0


def flat(text):
    return " ".join(text.split())


def try_mutant(mutant, libs):
    """Returns what is wrong with a mutant, or None."""
    name, file, old, new, test = mutant
    path = pathlib.Path(file if "/" in file else f"decode/{file}")
    text = (ROOT / "libcore" / path).read_text()
    words = old.split()
    pattern = re.compile(r"\s+".join(re.escape(w) for w in words))
    if len(pattern.findall(text)) != 1:
        return f"{name}: {file} does not hold the text once: {flat(old)}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        mutated = folder / path
        mutated.parent.mkdir()
        mutated.write_text(pattern.sub(lambda _: new, text))
        sources = [mutated] if file.endswith(".c") else []
        try:
            if passes(build(folder, sources, test, libs)):
                return f"{name}: {test} passes"
        except subprocess.TimeoutExpired:
            return None  # a loop without end is noticed too
        except RuntimeError as problem:
            return f"{name}: {problem}"
    return None


def try_originals(libs):
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        sources = [DECODE / f for f in ("verify.c", "round.c", "generate.c", "sequence.c")]
        tests = sorted({m[4] for m in MUTANTS} - {"t_laws"})
        return [f"unchanged: {t} fails" for t in tests if not passes(build(folder, sources, t, libs))]


def main():
    libs = libraries()
    problems = try_originals(libs)
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        problems += [p for p in pool.map(lambda m: try_mutant(m, libs), MUTANTS) if p]
    print(f"{len(MUTANTS)} mutants, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems else 0


sys.exit(main())
