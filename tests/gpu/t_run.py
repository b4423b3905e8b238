"""Does run.sh run what needs the whole library, once a number of GPUs, and fail when it fails? With stand-ins. Usage: t_run.py SOURCE"""
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

SOURCE = pathlib.Path(sys.argv[1])
WHOLE = ["weights_bits", "engine_loop", "engine_parity", "engine_exact", "prefill_parity", "train_parity", "train_generate", "train_group"]


def run(folder, gpus, bad=""):
    """Records of run.sh, its status and what it says, with programs that end with 1 if `bad` is their name and argument."""
    for name in WHOLE:
        (folder / name).write_text(f'#!/bin/sh\n[ "{name}${{1:+ $1}}" != "{bad}" ]\n')
        (folder / name).chmod(0o755)
    done = subprocess.run(["sh", SOURCE / "tests/gpu/run.sh", *WHOLE], capture_output=True, text=True,
                          env=dict(os.environ, US_GPU_WHOLE=str(folder), CUDA_VISIBLE_DEVICES=",".join(map(str, range(gpus)))))
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode, done.stderr


def main():
    known = (SOURCE / "tests/gpu/meson.build").read_text()
    for name in WHOLE:
        assert re.search(rf"'{name}'", known), f"{name} is no program of meson.build"
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for gpus, more in (1, []), (2, ["gpus2"]), (4, ["gpus2", "gpus4"]):
            rows, status, said = run(folder, gpus)
            expected = WHOLE + [f"{name} {many}" for many in more for name in ("engine_parity", "engine_exact")]
            assert [row["program"] for row in rows] == expected and status == 0, (rows, status, said)
            assert f"{len(expected)} passed, 0 failed" in said, said
        for bad in "engine_exact", "engine_parity gpus4":
            rows, status, said = run(folder, 4, bad)
            assert status == 1 and [row["program"] for row in rows if row["status"]] == [bad], (rows, status, said)
        (folder / "engine_exact").unlink()
        done = subprocess.run(["sh", SOURCE / "tests/gpu/run.sh", "engine_exact", "engine_loop"], capture_output=True, text=True,
                              env=dict(os.environ, US_GPU_WHOLE=str(folder), CUDA_VISIBLE_DEVICES="0"))
        assert done.returncode == 0 and "not run: engine_exact" in done.stderr and "1 passed" in done.stderr, done.stderr
    print("run.sh runs them and fails with them")


main()
