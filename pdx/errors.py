"""The errors a user can meet, each with what to do about it in its text."""


class PdxError(Exception):
    """Base of every error pdx raises on purpose; the command line prints it without a traceback.

    Example:
      >>> try:
      ...     pdx.SamplingOptions(temperature=-1)
      ... except pdx.PdxError as error:
      ...     print(type(error).__name__, "of", "temperature" in str(error))
      RequestError of True
    """


class ModelNotFoundError(PdxError):
    """A model argument that names nothing pdx can find."""


class ModelFileError(PdxError):
    """A model file that is corrupted, truncated, incomplete or of an unknown kind.

    The text names the file, the tensor or field, and what was expected.
    """


class UnsupportedModelError(PdxError):
    """A well-formed model of an architecture, or with a feature, that pdx does not have."""


class DownloadError(PdxError):
    """A built-in model that could not be fetched or does not match its checksum."""


class ContextLengthError(PdxError, ValueError):
    """A prompt, or a prompt with what it is to generate, that the context or the cache cannot hold."""


class QueueFullError(PdxError):
    """An engine with as many waiting requests as it may have: back-pressure, to be tried again later."""


class EngineError(PdxError):
    """A request that an engine could not serve: a failed step, NaN logits, an engine that was closed."""


class DonatedError(PdxError, RuntimeError):
    """A cache, or another state, that was given to a step before: its memory holds what the step returned."""


class NotFiniteError(EngineError):
    """Logits that are NaN or infinite, where a token or a score was to come from them: the model overflows.

    `index`: which of several prompts it is, None if there is one; `reason`: the text without it.
    """

    def __init__(self, reason: str, index: int | None = None):
        super().__init__(reason if index is None else f"prompt {index}: {reason}")
        self.reason, self.index = reason, index


class RequestError(PdxError, ValueError):
    """A request with a setting that makes no sense (an empty prompt, a negative temperature)."""


class VersionError(PdxError):
    """jax, jaxlib and libtpu or a CUDA plugin that do not fit; the text ends in the command that mends it."""
