"""Every error a user can meet, and the exit code it ends the process with.

An error's text is one line of cause and, where there is one, what to do about it. All of them pickle, so
that they cross process boundaries unchanged. `assert` is kept for invariants of our own.
"""

EXIT_DONE = 0
EXIT_BUG = 1  # an error that is none of those below, with a traceback
EXIT_CONFIG = 2
EXIT_ENVIRONMENT = 3
EXIT_RECOVERABLE = 4
EXIT_BUDGET_SPENT = 5
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class PipelineRLError(Exception):
    """Base of all errors that end a run with a message instead of a traceback."""

    exit_code = EXIT_RECOVERABLE


class ConfigError(PipelineRLError):
    """The configuration is wrong: unknown key, bad type or range, or settings that contradict each other."""

    exit_code = EXIT_CONFIG


class DataError(ConfigError):
    """The user's data is wrong. The text names the file and the line."""


class EnvironmentProblem(PipelineRLError):
    """This machine or installation cannot run what was asked (missing device, package, model directory)."""

    exit_code = EXIT_ENVIRONMENT


class ParityError(EnvironmentProblem):
    """A setting that makes engine and trainer logprobs comparable is not in force."""


class WorkerDied(PipelineRLError):
    """A process of the run (engine, trainer rank, grader) ended that should be alive."""


class WorkerFailed(PipelineRLError):
    """A call raised something unforeseen in a process that is alive: a fault of the code, which a restart repeats."""


class TrainerLost(PipelineRLError):
    """A trainer rank died or hangs, and with it the group of all ranks. It can be started again from a checkpoint."""


class Stalled(PipelineRLError):
    """Nothing made progress within the stated time."""


class WeightSyncError(PipelineRLError):
    """A weight update did not complete. The text says whether the engine it names stays paused for that."""


class VerificationFailed(WeightSyncError):
    """The canary of an engine found parameters that are not what the trainer sent."""


class EvaluationError(PipelineRLError):
    """An evaluation could not be had at one version: its engines sampled by another one."""


class TokenPrefixError(PipelineRLError):
    """A turn of an episode does not extend the tokens of the turns before it."""


class BudgetSpent(PipelineRLError):
    """Too many groups or optimizer steps in a row had to be thrown away."""

    exit_code = EXIT_BUDGET_SPENT


def first_line(error: BaseException) -> str:
    """The first line of the error's text, for a message of one line; its type's name when it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real error inside an exception group, however deep it lies."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
