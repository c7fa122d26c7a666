#!/usr/bin/env python
"""SHA-256 of the weights after a few training steps of every quick config, one line each.

Two commits that print the same lines train the same networks, bit for bit. About 15 minutes on two
CPU cores; compare lines of one machine only.

    python benchmarks/repeatability/fingerprints.py [--steps 30] [--jobs 2] > fingerprints.txt
"""

import argparse
import concurrent.futures
import glob
import hashlib
import os
import subprocess
import sys
import tempfile

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FIXED = ["DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "100000", "MODEL.DEVICE", "cpu"]


def train(config, folder, steps, teachers):
    """Train and return the digest of all weights; the teacher is one of ``teachers``."""
    opts = [*FIXED, "SOLVER.MAX_ITER", str(steps), "OUTPUT_DIR", folder]
    teacher = teacher_of(config)
    if teacher:
        opts += ["MODEL.CROSSKD.TEACHER.WEIGHTS", teachers[teacher]]
    script = os.path.join(ROOT, "tools", "train_net.py")
    command = [sys.executable, script, "--config-file", config, *opts]
    path = os.path.join(ROOT, "projects")
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        return "failed: " + done.stderr.strip().splitlines()[-1]
    weights = torch.load(os.path.join(folder, "model_final.pth"), weights_only=True)["model"]
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def teacher_of(config):
    """The path of the teacher's config, "" without one."""
    from detectron2.config import get_cfg

    from crosskd_ifc import add_crosskd_ifc_config

    cfg = get_cfg()
    add_crosskd_ifc_config(cfg)
    cfg.merge_from_file(config)
    teacher = cfg.MODEL.CROSSKD.TEACHER.CONFIG_FILE
    return os.path.join(ROOT, "configs", teacher) if teacher else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--configs", nargs="+", help="only these, and their teachers")
    args = parser.parse_args()
    quick = os.path.join(ROOT, "configs", "quick")
    files = sorted(glob.glob(f"{quick}/*.yaml") + glob.glob(f"{quick}/options/*.yaml"))
    configs = [f for f in files if not os.path.basename(f).startswith("Base-")]
    if args.configs:
        configs = [os.path.abspath(f) for f in args.configs]
    teachers = sorted({teacher_of(config) for config in configs} - {""})
    with tempfile.TemporaryDirectory() as folder:
        folders = {c: os.path.join(folder, str(i)) for i, c in enumerate({*configs, *teachers})}
        weights = {t: os.path.join(folders[t], "model_final.pth") for t in teachers}
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for group in (teachers, [c for c in configs if c not in teachers]):
                jobs = {c: pool.submit(train, c, folders[c], args.steps, weights) for c in group}
                for config, job in jobs.items():
                    print(job.result(), os.path.relpath(config, ROOT), flush=True)


if __name__ == "__main__":
    main()
