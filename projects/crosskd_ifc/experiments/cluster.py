"""Runs as jobs of submitit: of a SLURM cluster, or of this machine.

Needs submitit, this project's extra ``cluster``.
"""

import concurrent.futures
import contextlib
import os
import threading
import time
from typing import Any, Callable, Mapping, Optional, Sequence, Union

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

from ..common.errors import said
from ..common.files import read_json_if_any
from ..config import ConfigError
from .child_process import RunFailed, RunStopped, StepCounter, supervise
from .run_training import command_of, train
from .runs import Run, state_digest

_TIMEOUTS = 1000  # so often a job that is out of its time is put back into the queue
_PERIOD = 1.0  # seconds between two looks at a job
_PATIENCE = 600  # seconds until another machine must have begun a run


class Job:
    """What runs in a job: :func:`.run_training.train` in its first process, and in the processes of
    other machines the training alone.

    submitit calls :meth:`checkpoint` when the job is preempted or runs out of its time, and starts
    it again later.
    """

    def __init__(self, run: Run, train_net: str, arguments: Sequence[str] = (), threads: int = 0):
        """
        Args:
            run, train_net, arguments, threads: as of :func:`.run_training.train`.
        """
        self.run, self.train_net = run, train_net
        self.arguments, self.threads = list(arguments), threads

    def __call__(self) -> Union[dict, str, None]:
        """The run's results, or why it failed; None in the processes of other machines."""
        self._stop, job = threading.Event(), submitit.JobEnvironment()
        arguments = [*self.arguments, *_place(job)]
        work = self._train if job.global_rank == 0 else self._help
        # In a thread: submitit's signals interrupt this one.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            self._future = pool.submit(work, arguments)
            try:
                return self._future.result()
            except (ConfigError, OSError, RunFailed) as error:
                return str(error)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Ends the training, which saves its state; returns what is to go on."""
        self._stop.set()
        concurrent.futures.wait([self._future])
        job = Job(self.run, self.train_net, self.arguments, self.threads)
        return submitit.helpers.DelayedSubmission(job)

    def _train(self, arguments: Sequence[str]) -> dict:
        options = dict(arguments=arguments, threads=self.threads, stop=self._stop)
        return train(self.run, self.train_net, on_progress=self._look, **options)

    def _look(self, *_) -> None:
        if os.path.exists(_stop_file(self.run)):
            self._stop.set()

    def _help(self, arguments: Sequence[str]) -> None:
        """The part of a run that another machine has begun."""
        digest, start = state_digest(self.run), time.monotonic()
        while (read_json_if_any(self.run.path("started.json")) or {}).get("digest") != digest:
            if time.monotonic() - start > _PATIENCE:
                raise RunFailed(f"{self.run.name}: the first machine hasn't begun")
            time.sleep(1)
        if self.run.result() is not None:
            return
        command = command_of(self.run, self.train_net, arguments)
        path = self.run.path(f"console_{submitit.JobEnvironment().global_rank}.log")
        with open(path, "ab") as log:
            status, _ = supervise(command, log, self.threads, self._stop, self._look)
        if status != 0:
            raise RunFailed(f"{self.run.name} failed; see {path}")


class ClusterTrain:
    """Does what :func:`.run_training.train` does in a job of its own, for which it waits.

    Attributes:
        elsewhere: whether runs have other devices than this process.
    """

    def __init__(
        self,
        executor: str,
        folder: str,
        *,
        machines: int = 1,
        gpus: int = 0,
        parameters: Mapping[str, Any] = {},
    ):
        """
        Args:
            executor: "slurm", or "local" for jobs on this machine.
            folder: for submitit's files; all machines must see it.
            machines: for each run; those of "local" are processes of this one.
            gpus: of each machine.
            parameters: more of ``submitit.AutoExecutor.update_parameters``, such as
                ``{"timeout_min": 240, "slurm_partition": "gpu"}``.

        Raises:
            ConfigError: for parameters that submitit doesn't know, or without a SLURM here.
        """
        local = executor == "local"
        self.elsewhere = not local
        limit = {f"{executor}_max_num_timeout": _TIMEOUTS}
        try:
            self._executor = submitit.AutoExecutor(os.path.abspath(folder), executor, **limit)
        except RuntimeError as error:
            raise ConfigError(f"--executor {executor}: {error}") from error
        shape = {"tasks_per_node": machines} if local else {"nodes": machines, "tasks_per_node": 1}
        defaults = {"timeout_min": 60 * 24, "gpus_per_node": gpus, **shape}
        try:
            self._executor.update_parameters(**{**defaults, **parameters})
        except (AssertionError, NameError, TypeError, ValueError) as error:
            given = " ".join(f"{key}={value}" for key, value in parameters.items())
            raise ConfigError(f"--cluster {given}: {error or 'a wrong value'}") from error
        self._lock = threading.Lock()  # submitit's executors have one caller

    def __call__(
        self,
        run: Run,
        train_net: str,
        *,
        stop: Optional[threading.Event] = None,
        on_progress: Callable[[int, int, float], None] = lambda *_: None,
        **options,
    ) -> dict:
        """As :func:`.run_training.train`; a job that isn't wanted any more saves and ends, or is
        cancelled while it waits for its turn."""
        done = run.result()
        if done is not None:
            return done
        counter = StepCounter(run.path("metrics.json"), run.cfg().SOLVER.MAX_ITER)
        stop = stop or threading.Event()
        with contextlib.suppress(FileNotFoundError):  # of one that was killed
            os.remove(_stop_file(run))
        with self._lock:
            job = self._executor.submit(Job(run, train_net, **options))
        try:
            while not job.done():
                on_progress(*counter.look())
                if stop.wait(_PERIOD):
                    raise RunStopped(f"{run.name} was stopped")
            done = job.results()[0]
        except (FailedJobError, UncompletedJobError) as error:
            where = f"job {job.job_id} ({job.paths.stderr})"
            raise RunFailed(f"{run.name} failed in {where}: {said(error)}") from error
        finally:
            self._end(job, run, counter)
        if isinstance(done, str):
            raise RunFailed(done)
        return done

    @staticmethod
    def _end(job: submitit.Job, run: Run, counter: StepCounter) -> None:
        """End a job that isn't done, and wait for it."""
        if job.done():
            return
        if job.state == "RUNNING":
            with open(_stop_file(run), "w"):
                pass
            end = time.monotonic() + counter.grace()
            while not job.done() and time.monotonic() < end:
                time.sleep(_PERIOD)
            with contextlib.suppress(FileNotFoundError):
                os.remove(_stop_file(run))
        if not job.done():
            job.cancel()


def _stop_file(run: Run) -> str:
    """What tells a job to stop. Beside the run's folder, which may be moved aside."""
    return f"{os.path.normpath(run.folder)}.stop_requested"


def _place(job: submitit.JobEnvironment) -> Sequence[str]:
    """Arguments of ``tools/train_net.py`` that say which of several machines this is."""
    if job.num_tasks == 1:
        return []
    several = job.num_nodes > 1
    host = job.hostnames[0] if several else "127.0.0.1"
    port = 20000 + int(job.raw_job_id) % 20000
    rank = ("--num-machines", str(job.num_tasks), "--machine-rank", str(job.global_rank))
    return [*rank, "--dist-url", f"tcp://{host}:{port}"]
