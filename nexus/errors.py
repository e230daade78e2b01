"""Errors a user can cause. The command line prints them on one line and exits with 2.

Every message names both sides (what was expected, what was given) and the next step.
Anything else that is raised is a bug of ours or a failure of the machine (exit 1).
"""


class NexusError(Exception):
    """A mistake of the user or of the data, explained in one line."""


class BadRecord(NexusError):
    """A data row cannot be read or understood; the message starts with `file:line`."""


class BadConfig(NexusError):
    """A recipe or an option is wrong: names file, key, expected and given."""


class BadCheckpoint(NexusError):
    """A model folder or weight file does not fit: names the keys or shapes."""


class BadMedia(NexusError):
    """Sound, picture or video that cannot be decoded or breaks a stated limit."""


class Misaligned(NexusError):
    """Placeholders in the prompt and embeddings from an encoder differ in number."""


class Busy(NexusError):
    """A resource (a result folder, a device) is in use by another process."""
