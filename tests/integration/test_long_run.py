"""Two thousand steps: nothing grows."""

import os
import statistics

import pytest
from detectron2.engine import HookBase
from test_faults import build_trainer
from test_resume import folder, no_jit  # noqa: F401

STEPS = 2000


def resident_kib():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_memory_open_files_and_the_log_do_not_grow(folder, tmp_path):  # noqa: F811
    """Memory may differ by 3 % between the first and the second half of what follows the warm-up;
    a step's losses kept alive by mistake would be far more."""
    found = []

    class Count(HookBase):
        def after_step(self):
            if (self.trainer.iter + 1) % 100 == 0:
                found.append((resident_kib(), len(os.listdir("/proc/self/fd"))))

    opts = ("SOLVER.MAX_ITER", STEPS, "SOLVER.STEPS", (), "SOLVER.BASE_LR", 1e-4)
    trainer = build_trainer(folder / "RCNN.yaml", tmp_path / "run", *opts)
    trainer.checkpointer.save = lambda *_, **__: None
    trainer.register_hooks([Count()])
    trainer.train()
    memory, files = zip(*found[5:])
    half = len(memory) // 2
    assert max(memory[half:]) <= 1.03 * max(memory[:half])
    # Writing events opens a file now and then.
    assert statistics.median(files[half:]) <= statistics.median(files[:half]) < 100
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert sum(sizes.values()) < 1000 * STEPS, sizes
