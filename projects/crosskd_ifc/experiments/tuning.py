"""Search of settings by Optuna: what is searched, the study, and how often something is tried."""

import os
from typing import Any, Callable, Dict, Mapping, Optional

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ..config import ConfigError
from .child_process import RunDiverged

Space = Mapping[str, BaseDistribution]  # config key -> its possible values
# Trials that are drawn by chance, and that are finished before one may be pruned.
_FIRST = 5


def number_range(key: str, low: str, high: str, *, log: bool) -> BaseDistribution:
    """The numbers from ``low`` to ``high``, whole ones if both are; with ``log`` each ratio is as
    likely as another, not each difference.

    Raises:
        ConfigError: naming ``key``.
    """
    whole = not set(".en") & set((low + high).lower())
    try:
        if whole:
            return IntDistribution(int(low), int(high), log=log)
        return FloatDistribution(float(low), float(high), log=log)
    except ValueError as error:
        raise ConfigError(f"{key} from {low} to {high}: {error}") from None


def open_study(
    path: str,
    space: Space,
    *,
    runs: Optional[Mapping[str, str]] = None,
    seed: int = 0,
    jobs: int = 1,
) -> optuna.Study:
    """The study that a journal file holds, a new one if there is no file.

    What a process left when it ended is put back to be done first.

    Args:
        path: the file; its folder is made.
        space: what is searched.
        runs: seed -> digest of the arm that is tuned, which the scores depend on.
        seed: of the sampler.
        jobs: how many trials are to run at once.

    Raises:
        ConfigError: if the file is of a search of something else, of other seeds, or with other
            settings.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    _end_last_record(path)
    study = optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(path)),
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_FIRST),
    )
    # A search that goes on must not draw its first trials again.
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + len(study.trials), n_startup_trials=_FIRST, constant_liar=jobs > 1
    )
    wanted = {key: str(distribution) for key, distribution in space.items()}
    # Without a trial nothing depends on them.
    before = study.user_attrs if study.trials else {}
    found = before.get("space", wanted)
    if found != wanted:
        raise ConfigError(f"{path} is of a search of {found}, not {wanted}; give another --output")
    study.set_user_attr("space", wanted)
    now = dict(runs or {})
    then = before.get("runs", now)
    if then != now:
        what = "with other settings" if set(then) == set(now) else f"of the seeds {', '.join(then)}"
        raise ConfigError(f"{path} is of a search {what}; give another --output")
    study.set_user_attr("runs", now)
    settled = [t.params for t in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))]
    waiting = study.get_trials(states=(TrialState.WAITING,))
    settled += [trial.system_attrs.get("fixed_params") for trial in waiting]
    for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
        if trial.state is TrialState.RUNNING:  # of a killed process
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.params and trial.params not in settled:
            settled.append(trial.params)
            study.enqueue_trial(trial.params)
    return study


def search(
    study: optuna.Study,
    space: Space,
    objective: Callable[[optuna.Trial, Dict[str, Any]], float],
    *,
    trials: int,
    start: Optional[Mapping[str, Any]] = None,
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> optuna.trial.FrozenTrial:
    """Try settings until ``trials`` of them are done, those of earlier calls included.

    Args:
        study: of :func:`open_study`.
        space: what is searched.
        objective: called with a trial and its settings; returns a score, the higher the better. It
            may raise TrialPruned; RunDiverged makes the settings bad ones, unless they are
            ``start``. Anything else ends the search, and what was tried is tried again when it
            goes on.
        trials: how many.
        start: settings to try first.
        jobs: trials at once, in threads.
        say: called with lines for people.

    Returns:
        The best trial.

    Raises:
        RunDiverged: if that of ``start`` or all trials have diverged.
    """
    judged = (TrialState.COMPLETE, TrialState.PRUNED)
    if start is not None and not study.trials:
        study.enqueue_trial(dict(start))

    def one(trial: optuna.Trial) -> float:
        settings = {key: _suggest(trial, key, space[key]) for key in space}
        try:
            return objective(trial, settings)
        except RunDiverged as error:
            if settings == start:
                raise  # the fault isn't one of the search
            say(str(error))
            raise optuna.TrialPruned(str(error)) from None

    left = trials - len(study.get_trials(deepcopy=False, states=judged))
    if left > 0:
        study.optimize(one, n_trials=left, n_jobs=jobs)
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise RunDiverged(f"None of the {trials} trials of {', '.join(space)} has come to its end")
    return study.best_trial


def _suggest(trial: optuna.Trial, key: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    is_float = isinstance(distribution, FloatDistribution)
    suggest = trial.suggest_float if is_float else trial.suggest_int
    return suggest(key, distribution.low, distribution.high, log=distribution.log)


def _end_last_record(path: str) -> None:
    """Cut off what a full disk has left unfinished at the end of a journal: Optuna couldn't read
    what is added to it."""
    if os.path.exists(path):
        with open(path, "rb+") as f:
            whole = f.read()
            f.truncate(whole.rfind(b"\n") + 1)
