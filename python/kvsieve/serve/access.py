"""Who may ask, and whose conversations they are."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence

from kvsieve.errors import ArgumentError
from kvsieve.serve.openai import Refusal

__all__ = ["Access", "is_loopback"]

LEAST_LENGTH = 16
"""Characters of a key. Shorter ones can be guessed."""


class Access:
    """The keys that open a server; without any, everybody who reaches it may ask.

    Args:
        keys: printable ASCII of 16 characters or more.

    Raises:
        ArgumentError: for a key that is none; the message does not tell it.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        for at, key in enumerate(keys, 1):
            if len(key) < LEAST_LENGTH or not (key.isascii() and key.isprintable()) or " " in key:
                raise ArgumentError(f"API key {at} must be {LEAST_LENGTH} printable ASCII characters or more, without spaces")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in dict.fromkeys(keys)]

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return not self._digests

    def check(self, headers: Mapping[str, str]) -> bytes:
        """What tells the keys apart: the digest of the one that was given; empty where none is asked for.

        All keys are compared, each in a time that does not depend on what is equal.

        Raises:
            Refusal: 401 without a key that opens; 403 for another host's name where there are no keys, which is how a page in a
                browser reaches a server that listens to this machine only.
        """
        if self.open:
            name = _host(headers.get("host", ""))
            if not is_loopback(name):
                said = f"no key is asked for here, so the host must be this machine, not {name!r}"
                raise Refusal(403, said, kind="permission_error")
            return b""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(found):
            said = "give an API key: Authorization: Bearer KEY" if not given else "this API key does not open this server"
            raise Refusal(401, said, kind="authentication_error", code="invalid_api_key")
        return digest

    def owner(self, headers: Mapping[str, str], user: str | None) -> str:
        """Whose conversation a request goes on with: who has the key, and of theirs that of ``X-Session-Key``, else of ``user``.

        Raises:
            Refusal: as :meth:`check`.
        """
        digest = self.check(headers)
        session = headers.get("x-session-key") or user or ""
        if not digest and not session:
            return ""
        return hmac.new(digest or b"\0", session.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def is_loopback(name: str) -> bool:
    """Whether a host's name, or an address, is this machine as itself sees it."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
