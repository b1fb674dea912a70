"""Who may use the service. On this machine alone: everybody, but no page of another site. From elsewhere: whoever knows the token."""

import hmac
import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from pikastream_jax.live.hub import Refused

OPEN = ("/health", "/ready", "/", "/openapi.json")  # and the page's own files, which hold no secret


def is_loopback(host: str) -> bool:
    """Whether an address to listen at, or a name asked for, is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """The rules of one server.

    Args:
      host: address that is listened at.
      token: what a client must know; None asks for none, which only a loopback address may.
      origins: of other sites whose pages may use the service, as `https://example.org`.

    Raises:
      ValueError: no token for an address that others can reach, or a short one.
    """

    def __init__(self, host: str, token: str | None = None, origins: tuple[str, ...] = ()):
        if token is None and not is_loopback(host):
            raise ValueError(f"{host} can be reached from other machines: set a token in PIKASTREAM_TOKEN, or listen at 127.0.0.1")
        if token is not None and len(token) < 16:
            raise ValueError(f"a token of {len(token)} characters is easily guessed: use at least 16")
        self._token, self._origins, self._local = token, origins, is_loopback(host)

        @web.middleware
        async def middleware(request: web.Request, handler):
            self.check(request)
            return await handler(request)

        self.middleware = middleware

    def check(self, request: web.Request) -> None:
        """Raises Refused where a request may not be served."""
        host = urlsplit(f"//{request.host}").hostname or ""
        if self._local and not is_loopback(host):
            # A name of somebody else's that leads here: a page of his could then read what is only meant for this machine.
            raise Refused(421, f"this server is only for this machine, and {host} is not its name: ask for 127.0.0.1 or localhost")
        origin = request.headers.get("Origin")
        if origin and origin not in self._origins and urlsplit(origin).netloc != request.host:
            raise Refused(403, f"pages of {origin} may not use this server: start it with --origin {origin}")
        if self._token is None or request.path in OPEN or request.path.startswith("/page/"):
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.query.get("token", "")  # a WebSocket and a picture's address take no headers from a page
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            raise Refused(401, "a token is needed: send Authorization: Bearer TOKEN, or ?token=TOKEN")
