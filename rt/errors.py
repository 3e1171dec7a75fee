"""The errors of ``rt``, from "the group could not form" to "it broke, and stays broken".

::

    RTError (a RuntimeError)
    ├ ConfigError, RendezvousError         the group could not form
    ├ GroupClosedError                     closed in order, by you or by a peer
    └ GroupBrokenError                     it broke, and stays broken
      ├ PeerLostError                      a peer died, or its connections were cut
      ├ MismatchError                      two ranks called different things
      ├ ProtocolError                      bytes arrived that no rank of this version sends
      ├ CollectiveTimeoutError             a time limit you gave expired (also a TimeoutError)
      └ GroupAbortedError                  some rank called abort()

May live here: exception classes and nothing else. Bad arguments are TypeError or ValueError where they are found and leave the
group usable.
"""

from __future__ import annotations


class RTError(RuntimeError):
    """Base of every error this package raises about groups."""


class ConfigError(RTError):
    """The configuration is incomplete, malformed or contradicts itself.

    The message is one line that names the variable or file, what was found and what was expected.
    """


class RendezvousError(RTError):
    """The ranks did not find each other in time. The message names the missing ranks and the addresses tried."""


class GroupClosedError(RTError):
    """The group was closed in order, by this rank or by a peer that is still needed."""


class GroupBrokenError(RTError):
    """The group broke; every work in flight and every later call fails with the same cause.

    Attributes:
        group: what the group is called in messages, for example ``world``.
        culprit: rank (in the world) that caused the failure, or None where none is known.
        work: the work that found out, for example ``all_sum #17``, or None.
    """

    def __init__(self, message: str, *, group: str = "world", culprit: int | None = None, work: str | None = None) -> None:
        super().__init__(message)
        self.group = group
        self.culprit = culprit
        self.work = work

    def again(self) -> GroupBrokenError:
        """Return a fresh exception of the same content: one raised instance must not collect the tracebacks of many calls."""
        return type(self)(str(self), group=self.group, culprit=self.culprit, work=self.work)


class PeerLostError(GroupBrokenError):
    """A peer died or its connections were cut; ``culprit`` says which."""


class MismatchError(GroupBrokenError):
    """Two ranks disagree about a call (dtype, shape, op, root, kind, order); the message names both sides."""


class ProtocolError(GroupBrokenError):
    """A peer sent bytes that no rank of this version sends."""


class CollectiveTimeoutError(GroupBrokenError, TimeoutError):
    """A collective took longer than the timeout given to the call or to the group."""


class GroupAbortedError(GroupBrokenError):
    """Some rank called ``abort()``."""
