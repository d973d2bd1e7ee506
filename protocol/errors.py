"""Every error Millrace raises on purpose, split by who has to act.

MillraceError
├── CallerError              the caller's mistake: never retried, the message names value, limit and way out
│   ├── InvalidRequest       a Request that cannot be read or asks for something unknown; carries a `code`
│   ├── ConfigurationError   settings, files or models that do not fit together
│   ├── DamagedInput         a file that breaks off, is corrupt or changes: what was read before stands
│   ├── JobNotFound          no Job under that id or name
│   ├── DeadLetterNotFound   no Request was given up there
│   ├── JobNotEnded          the Job is still being submitted or worked on
│   ├── StateLocked          another run holds the state folder
│   └── SubmissionConflict   the Job got these lines from somebody else, or takes no more
└── Unavailable              the world's trouble: retried with backoff
    ├── BrokerUnavailable    Redis does not answer
    ├── DatabaseUnavailable  the SQL database does not answer
    ├── TimedOut             what was waited for did not happen in the time given, and goes on
    ├── EngineDied           the engine process ended without being asked to
    └── WorkerDied           a worker on this machine does not start, or keeps ending without being asked to

Anything else that is raised is our bug and is logged with its traceback.
"""


class MillraceError(Exception):
    """Root of the tree."""


class CallerError(MillraceError):
    """The caller's mistake."""


class InvalidRequest(CallerError):
    """A Request that is refused; `code` is stable and lands in the error row beside the message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ConfigurationError(CallerError):
    """Settings, files or models that do not fit together."""


class DamagedInput(CallerError):
    """A file that breaks off, is corrupt or changes while it is read: what was read before stands."""


class JobNotFound(CallerError):
    """No Job under that id or name."""


class JobNotEnded(CallerError):
    """The Job is still being submitted or worked on."""


class DeadLetterNotFound(CallerError):
    """No Request was given up there."""


class StateLocked(CallerError):
    """Another run holds the state folder."""


class SubmissionConflict(CallerError):
    """The Job got these lines from somebody else, or takes no more."""


class Unavailable(MillraceError):
    """The world's trouble."""


class BrokerUnavailable(Unavailable):
    """Redis does not answer."""


class DatabaseUnavailable(Unavailable):
    """The SQL database does not answer."""


class TimedOut(Unavailable, TimeoutError):
    """What was waited for did not happen in the time given, and goes on."""


class EngineDied(Unavailable):
    """The engine process ended without being asked to."""


class WorkerDied(Unavailable):
    """A worker on this machine does not start, or keeps ending without being asked to."""
